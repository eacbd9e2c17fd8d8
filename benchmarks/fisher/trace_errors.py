"""How far the gradient of the Fisher trace by differences is from the exact one, step by step.

    python -m benchmarks.fisher.trace_errors [--nets mlp conv vit vit-s relu] [--trained 60]

Smooth nets first (GELU): the relative error of the whole gradient against `exact` in float64, by precision, kind of
difference and relative step. Then a ReLU MLP: the size of the gradient over that of the exact one, which has no limit
as the step shrinks. Rows go to benchmarks/results/trace_errors.csv.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.harness import Row
from fastfip.data import Task
from fastfip.fisher import fisher_trace
from fastfip.fisher.differences.perturb import default_step, perturbed
from fastfip.fisher.graph.plan import selected
from fastfip.testing import nets
from fastfip.testing.definitions import relative_error

RESULTS = harness.Results(
    "trace_errors",
    "net trained precision difference step default error size commit torch cpu native",
    run="net trained",
)
STEPS = {
    "float64": (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9),
    "float32": (1e-2, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 1e-6),
    "bfloat16": (3e-2, 1e-2, 3e-3, 1e-3, 3e-4),
}


def mlp(act: Callable[[], nn.Module], *widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in zip(widths, widths[1:]):
        layers += [nn.Linear(i, o), act()]
    return nn.Sequential(*layers[:-1])


def conv_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.GELU(), nn.GroupNorm(4, 32), nn.Conv2d(32, 64, 3, stride=2), nn.GELU()),
        *(nn.Conv2d(64, 64, 3, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(256, 10)),
    )


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: (mlp(nn.GELU, 100, 256, 256, 10), torch.randn(32, 100)),
    "conv": lambda: (conv_net(), torch.randn(8, 3, 12, 12)),
    "vit": lambda: (nets.ViT(10, size=32, patch=8, dim=64, depth=2, heads=4), torch.randn(8, 3, 32, 32)),
    "vit-s": lambda: (nets.vit_s16(10), torch.randn(2, 3, 224, 224)),
    "relu": lambda: (mlp(nn.ReLU, 100, 512, 512, 10), torch.randn(64, 100)),
}


def flat(gradients: Iterable[Tensor]) -> Tensor:
    return torch.cat([g.detach().double().flatten() for g in gradients])


def measure(name: str, trained: int) -> list[Row]:
    torch.manual_seed(0)
    model, x = NETS[name]()
    model, y = nets.randomize_norms(model).eval(), torch.randint(0, 10, (len(x),))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(trained):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    wide = copy.deepcopy(model).double()
    want = flat(torch.autograd.grad(fisher_trace(wide, x.double(), y), list(wide.parameters())))
    rows = []
    for precision, steps in STEPS.items():
        net = wide if precision == "float64" else model
        dtype = torch.float64 if precision == "float64" else torch.float32
        params = selected(net, None)
        low = torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()
        for difference in ("forward", "central"):
            default = default_step(getattr(torch, precision), difference)
            for step in sorted({*steps, default}, reverse=True):
                with low:
                    found = perturbed(net, (x.to(dtype), y), Task(), params, difference=difference, step=step)
                got = flat(found.gradient.get(k, torch.zeros_like(p)) for k, p in params.items())
                row: Row = {"net": name, "trained": trained, "precision": precision}
                row |= {"difference": difference, "step": f"{step:.0e}", "default": step == default}
                row |= {"error": f"{relative_error(got, want):.1e}", "size": f"{float(got.norm() / want.norm()):.3g}"}
                rows.append(row)
                harness.show(row)
    return rows


def main() -> None:
    parser = harness.Parser(__doc__)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["mlp", "conv", "vit", "relu"])
    parser.add_argument("--trained", type=int, nargs="+", default=[0, 60], help="steps of training before")
    options = parser.parse()
    RESULTS.add([row for name in options.nets for t in options.trained for row in measure(name, t)])


if __name__ == "__main__":
    main()
