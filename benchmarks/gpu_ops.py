"""What `benchmarks.gpu` measures of the other ops, of Fast FIP's steps, and of a whole purification on the device.

Every op is the same here: operands, how it is called with a backend, its operations, and the definition in float64. A
backend's ratio is to the reference, which is torch's own products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import fastfip
from benchmarks.harness import Clock, Row, failure
from benchmarks.ops.problems import name_of
from benchmarks.purification import steps
from fastfip.ops import OPS, grad_norm_squared, gram_apply, spectral_adjoint, spectral_apply, spectral_grad
from fastfip.testing import nets
from fastfip.testing.definitions import relative_error

# N, T, O, I, K of Linear layers of ViT-B/16, and of a small one for a rehearsal
LAYERS = {
    "ViT-B qkv": (64, 197, 2304, 768, 64),
    "ViT-B proj": (64, 197, 768, 768, 64),
    "ViT-B fc1": (64, 197, 3072, 768, 64),
    "ViT-B fc2": (64, 197, 768, 3072, 64),
}
SMALL_LAYERS = {"tiny": (2, 3, 8, 6, 2)}


@dataclass
class Case:
    """An op on operands: `call(*operands, backend=...)`, and what its table of backends asks about them."""

    op: str
    form: str
    operands: tuple[Tensor, ...]
    call: Callable[..., object]
    asked: Callable[..., tuple[object, ...]]
    work: int

    def exact(self, few: int) -> list[Tensor]:
        wide = (t[:few].double() if t.dim() == 3 and len(t) > 1 else t.double() for t in self.operands)
        return _tensors(self.call(*wide, backend="reference"))

    def error(self, backend: str, exact: list[Tensor], few: int) -> float:
        part = (t[:few] if t.dim() == 3 and len(t) > 1 else t for t in self.operands)
        found = _tensors(self.call(*part, backend=backend))
        return max(relative_error(a, b) for a, b in zip(found, exact))


def _tensors(found: object) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)  # type: ignore[call-overload]


def cases(n: int, t: int, o: int, i: int, k: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """The ops of one Linear layer."""

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=device).to(dtype)

    g, x = random(n, t, o), random(n, t, i)
    u = torch.linalg.qr(torch.randn(o, k, device=device)).Q.unsqueeze(0)
    v = torch.linalg.qr(torch.randn(i, k, device=device)).Q.unsqueeze(0)
    sigma = torch.linspace(2, 1, k, device=device).unsqueeze(0)
    weight = ((u[0] * sigma) @ v[0].mT).to(dtype)
    delta = torch.full_like(sigma, 0.1)
    p = (x.float() @ v[0]).to(dtype)
    product = 2 * n * t * o * i

    def known(g: Tensor, p: Tensor, u: Tensor, **options: str) -> Tensor:
        return spectral_grad(g, p, u, **options)

    def adjoint(g: Tensor, w: Tensor, u: Tensor, v: Tensor, s: Tensor, d: Tensor, **options: str) -> object:
        return spectral_adjoint(g, w, u, v, s, d, (*g.shape[:-1], w.shape[1]), **options)  # type: ignore[arg-type]

    whole = (weight, u, v, sigma, delta)
    yield Case("spectral_grad", "p known", (g, p, u), known, lambda g, p, u: (g, p, u, None, None), 2 * n * t * k * o)
    yield Case(
        "spectral_grad", "both", (g, x, u, v), spectral_grad, lambda g, x, u, v: (g, x, u, v, None),
        2 * n * t * k * (o + i),
    )  # fmt: skip
    few = lambda x, w, u, v, s, d: (x, w, u, v, None)  # noqa: E731
    more = 4 * n * t * k * min(o, i)
    yield Case("spectral_apply", "", (x, *whole), spectral_apply, few, product + more)
    yield Case("spectral_adjoint", "", (g, *whole), adjoint, few, product + more)
    yield Case("grad_norm_squared", "", (g, x), grad_norm_squared, lambda g, x: (g, x), product)
    yield Case("gram_apply", "", (x, x.clone(), g), gram_apply, lambda q, k, v: (q, k, v), 2 * n * t * t * (o + i))


def ops(clock: Clock, layers: dict[str, tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> Iterator[Row]:
    """Every op but `sum_grad_squared`, by backend."""
    for dtype in dtypes:
        for title, sizes in layers.items():
            for case in cases(*sizes, dtype, clock.device):  # type: ignore[misc]
                yield from _of_case(clock, title, sizes, dtype, case)


def _of_case(clock: Clock, title: str, sizes: tuple[int, ...], dtype: torch.dtype, case: Case) -> Iterator[Row]:
    base: Row = {
        "part": case.op, "workload": f"{title} {case.form}".strip(), "size": "x".join(map(str, sizes)),
        "dtype": name_of(dtype), "unit": "TFLOP/s",
    }  # fmt: skip
    copies, exact, reference_ms = clock.copies(*case.operands), case.exact(2), 0.0
    for backend in reversed(OPS[case.op].backends):  # the reference first: the others' ratio is to it
        if backend.name.startswith("native"):  # never on a GPU
            continue
        why = backend.refuses(*case.asked(*case.operands))
        if why:
            yield {**base, "way": backend.name, "error": f"cannot run: {why}"}
            continue
        try:
            error = case.error(backend.name, exact, 2)
            ms = clock.ms([partial(case.call, *operands, backend=backend.name) for operands in copies])
        except Exception as refusal:  # a kernel that fails on a device must not end the run
            yield {**base, "way": backend.name, "error": f"FAILED: {failure(refusal, 100)}"}
            continue
        if backend.name == "reference":
            reference_ms = ms
        ratio = {"ratio": ms / reference_ms} if reference_ms else {}
        row = {"way": backend.name, "ms": ms, "rate": case.work / ms / 1e9, **ratio}
        yield {**base, **row, "error": f"{error:.1e}"}


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ViT-B/16 224, N=64": (nets.vit_b16, (64, 3, 224, 224)),
    "PreActResNet-18 32, N=128": (nets.preact_resnet18, (128, 3, 32, 32)),
}
SMALL_NETS = {"PreActResNet": (partial(nets.PreActResNet, 4, blocks=(1, 1), width=8), (4, 3, 8, 8))}


def purification(clock: Clock, workloads: dict[str, tuple], turns: int) -> Iterator[Row]:
    """Steps of Fast FIP against plain ones, and a whole run of the default method of so many steps."""

    def sgd(tensors: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(tensors, lr=1e-6, momentum=0.9, weight_decay=5e-4)

    for title, (make, shape) in workloads.items():
        base: Row = {"part": "purify", "workload": title, "size": "x".join(map(str, shape)), "dtype": "float32"}
        x, y = torch.randn(shape, device=clock.device), torch.randint(0, 4, shape[:1], device=clock.device)
        plain_ms = 0.0
        ways = {"plain step": steps.weights, "fast_fip K=64 step": partial(steps.singular_values, rank=64)}
        for way, of in ways.items():
            torch.manual_seed(0)
            model = nets.randomize_norms(make()).eval().to(clock.device)
            ms = clock.ms([partial(of(model, sgd), x, y, False)])  # type: ignore[operator]
            plain_ms = plain_ms or ms
            yield {**base, "way": way, "ms": ms, "ratio": ms / plain_ms, "unit": ""}
        if len(shape) == 4 and shape[-1] <= 64:
            clean = torch.randn(4 * shape[0], *shape[1:])  # no labels: the model's answers
            result = fastfip.purify(make().to(clock.device), clean, "fisher_steps", steps=turns, seed=0)
            yield {**base, "way": f"purify, {turns} steps", "ms": sum(result.seconds.values()) * 1e3, "unit": ""}
