"""What `benchmarks.gpu` measures: ceilings of the device, sum_grad_squared by backend, whole passes over nets.

Every call of a timed series takes the next of several copies of its operands, together larger than the cache twice
over: what is measured is memory, not the cache. `Clock` counts events on the device (on the CPU, for a rehearsal of
the program itself, seconds).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.fisher.fisher_ways import Workload, backpack, nngeometry, one_by_one, opacus, plain, vmap_grad
from fastfip.fisher import backward_with_fisher, fisher_diagonal
from fastfip.ops import OPS, ConvShape, sum_grad_squared, sum_grad_squared_conv
from fastfip.testing import nets
from fastfip.testing.definitions import worst_error

Row = dict[str, object]
Calls = Sequence[Callable[[], object]]

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
    "ViT, bf16 autocast": (functools.partial(nets.ViT, 10, dim=16, depth=1, heads=2), (4, 3, 32, 32), torch.bfloat16),
    "bottlenecks": (functools.partial(nets.BottleneckResNet, 10, (1, 1), 4), (4, 3, 32, 32), None),
}


class Clock:
    """Times series of calls on a device."""

    def __init__(self, device: str, repeat: int, least_ms: float) -> None:
        self.device, self.repeat, self.least_ms = device, repeat, least_ms
        cuda = device == "cuda"
        self.cache = torch.cuda.get_device_properties(0).L2_cache_size if cuda else 1 << 12

    def copies(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Return copies of the operands that fill the cache more than twice."""
        size = sum(x.numel() * x.element_size() for x in tensors)
        many = min(64, 1 + 2 * self.cache // max(1, size))
        return [tensors, *(tuple(x.clone() for x in tensors) for _ in range(many))]

    def run(self, calls: Iterator[Callable[[], object]], many: int) -> float:
        """Milliseconds of one of `many` calls in a row."""
        if self.device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            for call in itertools.islice(calls, many):
                call()
            end.record()
            torch.cuda.synchronize()
            return begin.elapsed_time(end) / many
        start = time.perf_counter()
        for call in itertools.islice(calls, many):
            call()
        return (time.perf_counter() - start) * 1e3 / many

    def ms(self, calls: Calls) -> float:
        """Return the median of several series, each as long as `least_ms`, over the calls in turn."""
        turn = itertools.cycle(calls)
        self.run(turn, len(calls))  # compiles, and fills what is kept
        many = max(1, int(self.least_ms / max(self.run(turn, 1), 1e-4)))
        return sorted(self.run(turn, many) for _ in range(self.repeat))[self.repeat // 2]


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
            ms = clock.ms([functools.partial(torch.mm, a, b, out=out)])
        title = "tf32" if precision == "high" else name_of(dtype)
        yield {
            "part": "ceiling", "workload": f"matrix product {size}", "dtype": title, "ms": ms,
            "rate": 2 * size**3 / ms / 1e9, "unit": "TFLOP/s",
        }  # fmt: skip


def backends(op: str, *arguments: object) -> Iterator[tuple[str, str]]:
    """Every backend of an op that could run on a GPU, and why it cannot."""
    for backend in OPS[op].backends:
        if not backend.name.startswith("native"):
            yield backend.name, backend.refuses(*arguments)


def dense(
    clock: Clock, workloads: dict[str, tuple[int, int, int, int]], dtypes: Sequence[torch.dtype]
) -> Iterator[Row]:
    """sum_grad_squared of matrices, with and without the gradient, against the ordinary weight gradient's product."""
    for (title, (n, t, o, i)), dtype in itertools.product(workloads.items(), dtypes):
        g, a = (torch.randn(n, t, f, device=clock.device).to(dtype) for f in (o, i))
        pairs, work = clock.copies(g, a), 2 * n * t * o * i
        room = torch.empty(o, i, device=clock.device, dtype=dtype)
        shape = f"{n}x{t}x{o}x{i}"
        base: Row = {"part": "dense", "workload": title, "size": shape, "dtype": name_of(dtype), "unit": "TFLOP/s"}

        def weight_gradient(g: Tensor, a: Tensor, room: Tensor = room) -> Tensor:
            return torch.mm(g.flatten(0, 1).t(), a.flatten(0, 1), out=room)

        plain_ms = clock.ms([functools.partial(weight_gradient, *pair) for pair in pairs])
        yield {
            **base,
            "way": "torch: weight gradient only",
            "ms": plain_ms,
            "rate": work / plain_ms / 1e9,
            "ratio": 1.0,
        }
        out, grad = (torch.zeros(o, i, device=clock.device) for _ in range(2))
        few = slice(0, min(n, 4))
        exact = torch.einsum("nto,nti->noi", g[few].double(), a[few].double()).square().sum(0)
        for backend, why in backends("sum_grad_squared", g, a, out, grad):
            if why:
                yield {**base, "way": backend, "error": f"cannot run: {why}"}
                continue
            got = sum_grad_squared(g[few], a[few], backend=backend).double()
            error = f"{float((got - exact).norm() / exact.norm()):.1e}"
            for results, also in (({"out": out}, ""), ({"out": out, "grad": grad}, " + gradient")):
                calls = [functools.partial(sum_grad_squared, *pair, backend=backend, **results) for pair in pairs]
                ms = clock.ms(calls)
                rate = work / ms / 1e9
                yield {**base, "way": backend + also, "ms": ms, "rate": rate, "ratio": ms / plain_ms, "error": error}


def conv(clock: Clock, workloads: dict[str, tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> Iterator[Row]:
    """Convolutions, against torch's own weight gradient."""
    for (title, (n, c, o, size, k, s, groups)), dtype in itertools.product(workloads.items(), dtypes):
        shape = ConvShape((k, k), (s, s), (k // 2, k // 2), (1, 1), groups)
        x, w = (torch.randn(*dims, device=clock.device) for dims in ((n, c, size, size), (o, c // groups, k, k)))
        g = torch.randn_like(F.conv2d(x, w, None, s, k // 2, 1, groups)).to(dtype)
        x, w = x.to(dtype), w.to(dtype)
        pairs, work = clock.copies(g, x), 2 * g.numel() * (c // groups) * k * k

        def weight_gradient(g: Tensor, x: Tensor, w: Tensor = w, shape: ConvShape = shape) -> Tensor:
            options = (shape.stride, shape.padding, shape.dilation, False, [0, 0], shape.groups, [False, True, False])
            return torch.ops.aten.convolution_backward(g, x, w, None, *options)[1]

        sizes = f"{n}x{c}x{o}x{size} k{k} s{s} g{groups}"
        base: Row = {"part": "conv", "workload": title, "size": sizes, "dtype": name_of(dtype), "unit": "TFLOP/s"}
        plain_ms = clock.ms([functools.partial(weight_gradient, *pair) for pair in pairs])
        yield {
            **base,
            "way": "torch: weight gradient only",
            "ms": plain_ms,
            "rate": work / plain_ms / 1e9,
            "ratio": 1.0,
        }
        out, grad = (torch.zeros(w.shape, device=clock.device) for _ in range(2))
        few = slice(0, 2)
        each = [weight_gradient(y[None].double(), z[None].double(), w.double()) for y, z in zip(g[few], x[few])]
        exact = torch.stack(each).square().sum(0)
        for backend, why in backends("sum_grad_squared_conv", g, x, shape, n, out, grad):
            if why:
                yield {**base, "way": backend, "error": f"cannot run: {why}"}
                continue
            got = sum_grad_squared_conv(g[few], x[few], shape, backend=backend).double()
            error = f"{float((got - exact).norm() / exact.norm()):.1e}"
            options = {"out": out, "grad": grad, "backend": backend}
            ms = clock.ms([functools.partial(sum_grad_squared_conv, *pair, shape, **options) for pair in pairs])
            rate, ratio = work / ms / 1e9, ms / plain_ms
            yield {**base, "way": f"{backend} + gradient", "ms": ms, "rate": rate, "ratio": ratio, "error": error}


def ours(w: Workload, backend: str) -> dict[str, Tensor]:
    return fisher_diagonal(w.model, (w.x, w.y), backend=backend)


def together(w: Workload, backend: str) -> dict[str, Tensor]:
    w.model.zero_grad()
    return backward_with_fisher(w.losses(), w.model, backend=backend)


def passes(clock: Clock, workloads: dict[str, tuple], peers: bool) -> Iterator[Row]:
    """Whole passes: the Fisher diagonal by itself and beside the gradients, against plain forward and backward."""
    ways: dict[str, Callable[[Workload], dict[str, Tensor]]] = {}
    for backend in ("reference", "triton", "cuda"):
        ways[f"fisher_diagonal {backend}"] = functools.partial(ours, backend=backend)
        ways[f"backward_with_fisher {backend}"] = functools.partial(together, backend=backend)
    ways["one backward each"] = one_by_one
    if peers:
        ways |= {"vmap(grad)": vmap_grad, "backpack": backpack, "opacus": opacus, "nngeometry": nngeometry}
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
            plain_ms = clock.ms([functools.partial(plain, w) for w in work])
            yield {**base, "way": "plain forward + backward", "ms": plain_ms, "ratio": 1.0}
            few = work[0].few(3)
            want = {k: v.double() for k, v in one_by_one(few).items()}
            for way, run in ways.items():
                try:
                    got = run(few)
                    error = f"{worst_error(got, {k: want[k] for k in got}, 1e-6):.1e}"
                    left_out = len(want) - len(got)
                    ms = clock.ms([functools.partial(run, w) for w in work])
                except Exception as error:  # a peer that cannot do this net, or this memory, says so in many ways
                    what = (str(error).splitlines() or [""])[0][:100]
                    yield {**base, "way": way, "error": f"{type(error).__name__}: {what}"}
                    if clock.device == "cuda":
                        torch.cuda.empty_cache()
                    continue
                left = f" ({left_out} parameters left out)" if left_out else ""
                yield {**base, "way": way, "ms": ms, "ratio": ms / plain_ms, "error": error + left}
