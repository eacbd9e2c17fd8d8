"""torch.compile: one graph, the gradients of the eager model, and no second compilation at the next delta.

The nets are so small that the gradient of a whole weight is the cheaper one: with `small=False` the layers do as large
ones do, and compute by the operator `spectral_apply`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func

from fastfip.spectral import SpectralShifts, layers
from fastfip.testing import nets

NETS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: nets.ViT(4, size=8, dim=8, depth=2, heads=2),
    "vit, packed attention": lambda: nets.ViT(4, size=8, dim=8, depth=1, heads=2, fused=False),
    "resnet": lambda: nets.randomize_norms(nets.PreActResNet(4, blocks=(1, 1), width=4)),
    "paddings": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3, padding="same", padding_mode="reflect"),
        nn.Conv2d(6, 8, (2, 3), padding="same", groups=2),
        nn.GELU(),
        nn.Conv2d(8, 6, 3, stride=2, padding=1, dilation=1, bias=False),
        nn.Flatten(2),
        nn.Conv1d(6, 6, 3, padding=1),
        nn.Flatten(1),
        nn.Linear(96, 4),
    ),
}


@pytest.fixture(params=[True, False], ids=["small", "as large ones"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(layers, "prefers_dense", lambda *args: False)
    torch._dynamo.reset()
    return request.param


def gradients(shifts: SpectralShifts, call: Callable[[], Tensor]) -> list[Tensor]:
    shifts.refresh()
    call().backward()
    shifts.collect()
    shifts.remove()
    found = [delta.grad for delta in shifts.deltas]
    for delta in shifts.deltas:
        delta.grad = None
    assert all(grad is not None for grad in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("name", NETS)
def test_one_graph(name: str, small: bool) -> None:
    torch.manual_seed(0)
    net: nn.Module = NETS[name]().double().eval().requires_grad_(False)
    x, y = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 3])
    shifts = SpectralShifts.of(net, 2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    means = [m.running_mean for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for turn in range(3):
        with torch.no_grad():
            for delta in shifts.deltas:
                delta.uniform_(-0.1, 0.1)
            for mean in means:  # a frozen norm's statistics may move between two steps
                assert mean is not None
                mean.add_(0.1)
        a, b = (gradients(shifts, lambda call=call: F.cross_entropy(call(x), y)) for call in (net, compiled))
        for one, two in zip(a, b):
            torch.testing.assert_close(one, two)
        assert counter.frame_count == 1, f"compiled again in step {turn}"


def targets(net: nn.Module, x: Tensor) -> tuple[list[str], list[str]]:
    """What the graphs of the forward and the backward pass of a compiled net call."""
    seen: list[list[str]] = []

    def watch(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        seen.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    shifts = SpectralShifts.of(net.requires_grad_(False), 2)
    backend = aot_autograd(fw_compiler=watch, bw_compiler=watch)
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    gradients(shifts, lambda: compiled(x).square().sum())
    forward, backward = seen
    return forward, backward


@pytest.mark.parametrize("small", [False], indirect=True)
@pytest.mark.parametrize("form", ["contiguous", "channels last", "no batch"])
def test_no_gradient_of_a_whole_weight_is_formed(form: str, small: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.Flatten(-2), nn.Linear(36, 5))
    x = torch.randn(4, 3, 8, 8)
    if form == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    forward, backward = targets(net, x[0] if form == "no batch" else x)
    assert sum("spectral_apply" in name for name in forward) == 3
    assert sum("spectral_apply_backward" in name for name in backward) == 3
    assert not any("mm" in name or "convolution" in name for name in backward), backward


@pytest.mark.parametrize("small", [False], indirect=True)
def test_what_goes_without_the_operator(small: bool) -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).requires_grad_(False)
    x = torch.randn(3, 6)
    shifts = SpectralShifts.of(net, 2)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for delta in shifts.deltas:
            delta.uniform_(-0.1, 0.1)
    for context in (torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        shifts.refresh()
        with context:
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-2, atol=1e-2)
        shifts.remove()
    shifts.refresh()
    mapped = torch.compile(lambda x: torch.func.vmap(net)(x), backend="aot_eager")(x)
    torch.testing.assert_close(mapped, net(x))
    shifts.remove()


@pytest.mark.parametrize("small", [False], indirect=True)
def test_hooks_and_a_bias_of_another_dtype(small: bool) -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(torch.bfloat16).requires_grad_(False)
    net[0].bias = nn.Parameter(net[0].bias.float(), requires_grad=False)
    handle = net[1].register_forward_hook(lambda module, args, out: 2 * out)
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    shifts = SpectralShifts.of(net, 2)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    a, b = (gradients(shifts, lambda call=call: call(x).square().sum()) for call in (net, compiled))
    for one, two in zip(a, b):
        torch.testing.assert_close(one, two, rtol=5e-2, atol=5e-2)
    handle.remove()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="inductor's code needs the CPU's own vectors")
@pytest.mark.parametrize("small", [False], indirect=True)
def test_generated_code_in_both_formats_of_memory(small: bool) -> None:
    """Inductor lays maps out as it likes: the operator takes and gives both formats."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(1), nn.Linear(288, 4))
    net.requires_grad_(False)
    x = torch.randn(4, 3, 8, 8)
    shifts = SpectralShifts.of(net, 3)
    compiled = torch.compile(net, fullgraph=True)
    a = gradients(shifts, lambda: net(x).square().mean())
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        for one, two in zip(a, gradients(shifts, lambda given=given: compiled(given).square().mean())):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
