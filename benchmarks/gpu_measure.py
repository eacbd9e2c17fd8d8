"""What `benchmarks.gpu` measures: ceilings of the device, sum_grad_squared by backend, whole passes over nets.

Every call of a timed series takes the next of several copies of its operands, together larger than the cache twice
over: what is measured is memory, not the cache.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from benchmarks.fisher.fisher_ways import PEERS, Way, Workload, one_by_one, ours, plain, together, vmap_grad
from benchmarks.harness import Clock, Row, failure
from benchmarks.ops.problems import Problem, name_of
from fastfip.testing import nets
from fastfip.testing.definitions import worst_error

# N, T, O, I: the Linear layers of ViT-B/16 at batch 64 (query, key and value; output; MLP), and fewer tokens
DENSE = {
    "ViT-B qkv": (64, 197, 2304, 768),
    "ViT-B proj": (64, 197, 768, 768),
    "ViT-B fc1": (64, 197, 3072, 768),
    "ViT-B fc2": (64, 197, 768, 3072),
    "T=16": (256, 16, 1024, 1024),
    "T=64": (128, 64, 1024, 1024),
    "T=1024": (16, 1024, 1024, 1024),
}
# N, C, O, size, kernel, stride, groups
CONV = {
    "ResNet-50 stem": (64, 3, 64, 224, 7, 2, 1),
    "ResNet-50 3x3 56": (64, 64, 64, 56, 3, 1, 1),
    "ResNet-50 1x1 56": (64, 64, 256, 56, 1, 1, 1),
    "ResNet-50 3x3 14": (64, 256, 256, 14, 3, 1, 1),
    "ResNet-50 1x1 14": (64, 256, 1024, 14, 1, 1, 1),
    "ResNet-50 3x3 7": (64, 512, 512, 7, 3, 1, 1),
    "PreActResNet-18 3x3 32": (128, 64, 64, 32, 3, 1, 1),
    "depthwise 7x7": (64, 96, 96, 56, 7, 1, 96),
}
NETS = {
    "ViT-B/16 224, N=64, bf16 autocast": (nets.vit_b16, (64, 3, 224, 224), torch.bfloat16),
    "ResNet-50 224, N=64": (nets.resnet50, (64, 3, 224, 224), None),
    "PreActResNet-18 32, N=128": (nets.preact_resnet18, (128, 3, 32, 32), None),
}
SMALL_NETS = {  # for a rehearsal
    "ViT, bf16 autocast": (partial(nets.ViT, 10, dim=16, depth=1, heads=2), (4, 3, 32, 32), torch.bfloat16),
    "bottlenecks": (partial(nets.BottleneckResNet, 10, (1, 1), 4), (4, 3, 32, 32), None),
}


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def ceilings(clock: Clock, size: int, dtypes: Sequence[torch.dtype]) -> Iterator[Row]:
    """What the device does at best: copies of memory, and torch's own matrix products of each type."""
    x = torch.empty(size * size * 4, device=clock.device)
    y = torch.empty_like(x)
    ms = clock.ms([lambda: y.copy_(x)])
    yield {"part": "ceiling", "workload": "copy", "ms": ms, "rate": 2 * x.numel() * 4 / ms / 1e6, "unit": "GB/s"}
    for dtype, precision in [*((d, "highest") for d in dtypes), (torch.float32, "high")]:
        a, b = torch.randn(2, size, size, device=clock.device).to(dtype)
        out = torch.empty_like(a)
        with matmul_precision(precision):
            ms = clock.ms([partial(torch.mm, a, b, out=out)])
        title = "tf32" if precision == "high" else name_of(dtype)
        yield {
            "part": "ceiling", "workload": f"matrix product {size}", "dtype": title, "ms": ms,
            "rate": 2 * size**3 / ms / 1e9, "unit": "TFLOP/s",
        }  # fmt: skip


def kernels(
    clock: Clock,
    part: str,
    make: Callable[..., Problem],
    workloads: Mapping[str, tuple[int, ...]],
    dtypes: Sequence[torch.dtype],
) -> Iterator[Row]:
    """sum_grad_squared, for matrices with and without the gradient, against torch's ordinary weight gradient."""
    for (title, sizes), dtype in itertools.product(workloads.items(), dtypes):
        problem = make(*sizes, dtype, clock.device)
        pairs, work = clock.copies(problem.g, problem.a), problem.work
        base: Row = {"part": part, "workload": title, "size": problem.size, "dtype": name_of(dtype), "unit": "TFLOP/s"}
        plain_ms = clock.ms([partial(problem.weight_gradient, *pair) for pair in pairs])
        way = {"way": "torch: weight gradient only", "ms": plain_ms, "rate": work / plain_ms / 1e9, "ratio": 1.0}
        yield {**base, **way}
        exact, out, grad = problem.exact(), problem.results(), problem.results()
        forms = {" + gradient": {"out": out, "grad": grad}}
        if problem.shape is None:
            forms = {"": {"out": out}, **forms}
        for backend, why in problem.backends(out, grad):
            if backend.name.startswith("native"):  # never on a GPU
                continue
            if why:
                yield {**base, "way": backend.name, "error": f"cannot run: {why}"}
                continue
            error = f"{problem.error(backend.name, exact):.1e}"
            for also, results in forms.items():
                ms = clock.ms([partial(problem.ours, *pair, backend=backend.name, **results) for pair in pairs])
                way = {"way": backend.name + also, "ms": ms, "rate": work / ms / 1e9, "ratio": ms / plain_ms}
                yield {**base, **way, "error": error}


def passes(clock: Clock, workloads: dict[str, tuple], peers: bool) -> Iterator[Row]:
    """Whole passes: the Fisher diagonal by itself and beside the gradients, against plain forward and backward."""
    ways: dict[str, Way] = {}
    for backend in ("reference", "triton", "cuda"):
        ways[f"fisher_diagonal {backend}"] = partial(ours, backend=backend)
        ways[f"backward_with_fisher {backend}"] = partial(together, backend=backend)
    ways["one backward each"] = one_by_one
    if peers:
        ways |= {"vmap(grad)": vmap_grad, **PEERS}
    for title, (make, shape, dtype) in workloads.items():
        torch.manual_seed(0)
        model = nets.randomize_norms(make()).eval().to(clock.device)
        batches = [torch.randn(shape, device=clock.device) for _ in range(3)]
        work = [Workload(model, x, torch.randint(0, 10, (len(x),), device=clock.device)) for x in batches]
        for w in work[1:]:
            w.kept = work[0].kept
        number = "float32" if dtype is None else name_of(dtype)
        base: Row = {"part": "pass", "workload": title, "size": "x".join(map(str, shape)), "dtype": number, "unit": ""}
        with torch.autocast(clock.device, dtype, enabled=dtype is not None):
            plain_ms = clock.ms([partial(plain, w) for w in work])
            yield {**base, "way": "plain forward + backward", "ms": plain_ms, "ratio": 1.0}
            few = work[0].few(3)
            want = {k: v.double() for k, v in one_by_one(few).items()}
            for way, run in ways.items():
                try:
                    got = run(few)
                    error = f"{worst_error(got, {k: want[k] for k in got}, 1e-6):.1e}"
                    left_out = len(want) - len(got)
                    ms = clock.ms([partial(run, w) for w in work])
                except Exception as refusal:  # a peer that cannot do this net, or this memory, says so in many ways
                    yield {**base, "way": way, "error": failure(refusal, 100)}
                    if clock.device == "cuda":
                        torch.cuda.empty_cache()
                    continue
                left = f" ({left_out} parameters left out)" if left_out else ""
                yield {**base, "way": way, "ms": ms, "ratio": ms / plain_ms, "error": error + left}
