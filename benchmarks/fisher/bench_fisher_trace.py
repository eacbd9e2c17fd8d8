"""What the gradient of the Fisher trace costs, as a multiple of one plain forward and backward pass.

    python -m benchmarks.fisher.bench_fisher_trace [--workloads abc] [--threads 1] [--repeat 5] [--memory] [--slow]

The workloads are those of bench_fisher_diagonal.py, (c) with four samples: (a) an MLP, (b) PreActResNet-18 in eval
mode, (c) ViT-S/16. Ways: ours (`exact`) by backend of its op, `perturb` and `signs` (whose error on the ReLUs of (a)
and (b) shows why they are not chosen there), ghost norms with double backward as a hundred lines of Python do it, the
term of the released FIP code (which is no trace), and with --slow a loop over samples and torch.func. Each way leaves
the gradient of its term with respect to every parameter.

Times are CPU times (`wall` is the clock's); all ways take turns in one process, the order reversed every second time,
and each gets its least time. `error` is that of the gradient on three samples against the per-sample loop in float64; a
way that is wrong is timed all the same, and its row says so. Memory: the peak of a fresh process, less that of the
plain pass, over the size of the parameters.
Rows go to benchmarks/results/fisher_trace.csv.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import harness
from benchmarks.fisher.fisher_ways import Workload, plain, vmap_gradients, workload
from benchmarks.harness import Row
from benchmarks.ops.problems import ghost_norm
from benchmarks.purification.released_fip import surrogate
from fastfip.errors import BackendError
from fastfip.fisher.penalty import FisherPenalty, Way
from fastfip.fisher.trace import trace_and_logits
from fastfip.ops import OPS
from fastfip.testing import nets
from fastfip.testing.definitions import loop_trace, worst_error

RESULTS = harness.Results(
    "fisher_trace",
    "workload way ratio ms wall error memory threads commit torch cpu native",
    run="workload way threads",
    order=lambda r: (str(r["threads"]), r["workload"]),
)
Call = Callable[[Workload], object]


def load(key: str) -> Workload:
    w = workload(key)
    return Workload(w.model, w.x[:4], w.y[:4]) if key == "c" else w


# ----------------------------------------------------------------------------------------------------------- the ways


@contextlib.contextmanager
def only(backend: str) -> Iterator[None]:
    """Let an op choose no other backend than this one, where it can run."""
    ops = [OPS["grad_norm_squared"], OPS["grad_norm_squared_conv"]]
    before = [op.choose for op in ops]

    def choose(op: object, choice: Callable[..., object], wanted: str, *arguments: object) -> object:
        return choice(backend, *arguments)

    for op, choice in zip(ops, before):
        object.__setattr__(op, "choose", functools.partial(choose, op, choice))
    try:
        yield
    finally:
        for op in ops:
            object.__delattr__(op, "choose")


def ours(backend: str) -> Call:
    def run(w: Workload) -> None:
        with contextlib.nullcontext() if backend == "auto" else only(backend):
            trace_and_logits(w.model, (w.x, w.y)).trace.backward()

    return run


def by_differences(way: Way, difference: Literal["forward", "central"] = "forward") -> Call:
    """FisherPenalty without second derivatives."""
    made: dict[int, FisherPenalty] = {}  # one for each model, which is looked at once

    def run(w: Workload) -> None:
        if id(w.model) not in made:
            with warnings.catch_warnings():  # of kinks: (b) has them, and its row shows what comes of it
                warnings.simplefilter("ignore")
                made[id(w.model)] = FisherPenalty(w.model, way, difference=difference)
                made[id(w.model)](w.x[:1], w.y[:1])
        made[id(w.model)](w.x, w.y).backward()

    return run


def ghost(w: Workload) -> None:
    """Ghost norms in Python: layer inputs from hooks, gradients at the outputs, Gram or direct, `backward`."""
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    kinds = (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm)
    hooks = [
        m.register_forward_hook(lambda m, a, z: seen.append((m, a[0], z)))
        for m in w.model.modules()
        if isinstance(m, kinds)
    ]
    tokens = {k: p for k, p in w.model.named_parameters() if "." not in k}
    expanded = {k: p.expand(len(w.x), *p.shape[1:]) for k, p in tokens.items()}
    try:
        with sdpa_kernel(SDPBackend.MATH):
            z = torch.func.functional_call(w.model, expanded, (w.x,)) if tokens else w.model(w.x)
    finally:
        for hook in hooks:
            hook.remove()
    losses = F.cross_entropy(z, w.y, reduction="none")
    outputs = [z for _, _, z in seen]
    grads = torch.autograd.grad(losses.sum(), [*outputs, *expanded.values()], create_graph=True)
    norms = [g.flatten(1).square().sum(1) for g in grads[len(outputs) :]]
    for (m, a, _), g in zip(seen, grads):
        norms += ghost_norms(m, a, g)
    torch.stack(norms).sum(0).mean().backward()


def ghost_norms(m: nn.Module, a: Tensor, g: Tensor) -> list[Tensor]:
    if isinstance(m, nn.Conv2d):
        a = F.unfold(a, m.kernel_size, m.dilation, m.padding, m.stride).mT  # type: ignore[arg-type]
        g = g.flatten(2).mT
    elif isinstance(m, nn.BatchNorm2d):
        assert m.running_mean is not None and m.running_var is not None
        mean, var = m.running_mean[:, None], m.running_var[:, None]
        a, g = ((a.flatten(2) - mean) * (var + m.eps).rsqrt()).mT, g.flatten(2).mT
    elif isinstance(m, nn.LayerNorm):
        a = (a - a.mean(-1, keepdim=True)) * (a.var(-1, correction=0, keepdim=True) + m.eps).rsqrt()
    a, g = (x.reshape(len(x), -1, x.shape[-1]) for x in (a, g))
    bias = [g.sum(1).square().sum(1)] if m.bias is not None else []
    if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm)):
        return [(a * g).sum(1).square().sum(1), *bias]
    return [ghost_norm(g, a), *bias]


def released(w: Workload) -> None:
    """The released term with its five probes; its result is no trace."""
    tensors: list[Tensor] = list(w.model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        log_p = w.model(w.x).log_softmax(1)
    probes = [[torch.randn_like(t) for t in tensors] for _ in range(5)]
    surrogate(log_p, w.y, tensors, probes).backward()


def one_by_one(w: Workload) -> None:
    params = list(w.model.parameters())
    for x, y in zip(w.x.split(1), w.y.split(1)):
        with sdpa_kernel(SDPBackend.MATH):
            loss = F.cross_entropy(w.model(x), y)
        grads = torch.autograd.grad(loss, params, create_graph=True)
        (sum(g.square().sum() for g in grads) / len(w.x)).backward()  # type: ignore[union-attr]


def vmap_grad(w: Workload) -> None:
    params = dict(w.model.named_parameters())

    def trace(p: dict[str, Tensor]) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            each = vmap_gradients(w, p)
        return torch.stack([g.flatten(1).square().sum(1).mean() for g in each.values()]).sum()

    for name, g in torch.func.grad(trace)({k: p.detach() for k, p in params.items()}).items():
        params[name].grad = g


def ways(slow: bool) -> dict[str, Call]:
    found: dict[str, Call] = {"plain": plain, "fastfip": ours("auto")}
    if any(b.automatic and b.name != "reference" for b in OPS["grad_norm_squared"].backends):
        found["reference backend"] = ours("reference")  # what it is without native kernels
    found |= {"perturb": by_differences("perturb"), "perturb central": by_differences("perturb", "central")}
    found["signs"] = by_differences("signs")
    found |= {"ghost norms in Python": ghost, "released term": released}
    return {**found, "loop over samples": one_by_one, "torch.func": vmap_grad} if slow else found


# ---------------------------------------------------------------------------------------------------------- measuring


def checked(w: Workload, call: Call) -> str:
    """Error of the gradient on a few samples against the definition in float64, or why there is none."""
    few = Workload(w.model, w.x[:3], w.y[:3])
    wide = copy.deepcopy(w.model).double()
    params = dict(wide.named_parameters())
    want = torch.autograd.grad(loop_trace(wide, (few.x.double(), few.y), 3), list(params.values()))
    w.model.zero_grad()
    try:
        call(few)
    except BackendError as error:
        return f"not here: {error}"
    except Exception as error:  # a peer that cannot do this net says so in many ways
        return f"fails: {harness.failure(error)}"
    got = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in w.model.named_parameters()}
    return f"{worst_error(got, dict(zip(params, want)), 1e-6):.1e}"


def measure(key: str, repeat: int, slow: bool, names: str | None) -> list[Row]:
    w, rows, calls = load(key), list[Row](), dict[str, Call]()
    for name, call in ways(slow).items():
        if names and name != "plain" and not any(part in name for part in names.split(",")):
            continue
        error = {"plain": "", "released term": "no trace"}.get(name)
        error = checked(w, call) if error is None else error
        if not error.startswith(("not here", "fails")):
            calls[name] = call
        rows.append({"workload": key, "way": name, "ratio": "", "ms": "", "wall": "", "error": error})
    works = {name: functools.partial(call, w) for name, call in calls.items()}
    times = harness.take_turns(works, repeat, before=lambda: forget(w))
    base = times["plain"]
    for row in rows:
        if row["way"] in times:
            cpu, wall = times[row["way"]]
            row |= {"ratio": round(cpu / base.cpu, 2), "ms": round(cpu * 1e3, 1), "wall": round(wall / base.wall, 2)}
    return rows


def forget(w: Workload) -> None:
    for p in w.model.parameters():
        p.grad = None


def peak_here(key: str, way: str) -> int:
    """Peak memory of this process while the workload is made and the way runs twice."""

    def twice() -> None:
        w, call = load(key), ways(True)[way]
        for _ in range(2):
            forget(w)
            call(w)

    return harness.peak(twice)


def peak(key: str, way: str, threads: int) -> int:
    """Peak memory in bytes of a fresh process that does nothing else."""
    options = ("--peak", way, "--workloads", key, "--threads", threads)
    return harness.fresh("benchmarks.fisher.bench_fisher_trace", *options)[0]


def main() -> None:
    parser = harness.Parser(__doc__, "threads", "repeat", "peak")
    parser.add_argument("--workloads", default="abc")
    parser.add_argument("--only", help="only ways with one of these (separated by commas) in their name")
    parser.add_argument("--slow", action="store_true", help="the loop over samples and torch.func as well")
    parser.add_argument("--memory", action="store_true", help="measure the peak memory of each way as well")
    parser.add_argument("--dry", action="store_true", help="write no file")
    options = parser.parse()
    if options.peak:
        print(peak_here(options.workloads, options.peak))
        return
    for key in options.workloads:
        found = measure(key, options.repeat, options.slow, options.only)
        size = 4 * nets.parameter_count(workload(key).model)
        base = peak(key, "plain", options.threads) if options.memory else 0
        for row in found:
            row["memory"] = ""
            if options.memory and row["ratio"] != "":
                row["memory"] = round((peak(key, row["way"], options.threads) - base) / size, 2)
            harness.show(row, way=-24)
        if not options.dry:
            RESULTS.add(found)


if __name__ == "__main__":
    main()
