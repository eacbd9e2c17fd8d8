"""FisherPenalty in training loops of all kinds: what is in `.grad` afterwards, which way was taken, and why."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fastfip
from fastfip.errors import ConfigError, ModelError
from fastfip.fisher import fisher_trace
from fastfip.testing import nets
from fastfip.testing.definitions import relative_error, worst_error

N, C, ETA = 6, 4, 0.1
WAYS = ("exact", "perturb", "signs")


def vit(dtype=torch.float64):
    torch.manual_seed(0)
    model = nets.randomize_norms(nets.ViT(C, size=8, dim=8, depth=1, heads=2)).to(dtype)
    return model, torch.randn(N, 3, 8, 8, dtype=dtype), torch.randint(0, C, (N,))


def conv_bn():
    """A smooth net with BatchNorm and dropout, in train mode."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, C)]
    model = nets.randomize_norms(nn.Sequential(*layers)).double()
    return model, torch.randn(N, 3, 8, 8, dtype=torch.float64), torch.randint(0, C, (N,))


def grads(model):
    return {k.removeprefix("module.").removeprefix("_orig_mod."): p.grad.clone() for k, p in model.named_parameters()}


def wanted(model, x, y, trace=True):
    """The gradient of the whole objective from the graph of `exact`."""
    model = copy.deepcopy(model).eval()
    loss = F.cross_entropy(model(x), y)
    (loss + ETA * fisher_trace(model, x, y) if trace else loss).backward()
    return grads(model)


@pytest.mark.parametrize("way", ["auto", "exact", "perturb"])
def test_a_term_of_a_loss(way):
    model, x, y = vit()
    penalty = fastfip.FisherPenalty(model, way, difference="central")
    term = penalty(x, y)
    assert term.dim() == 0 and term.requires_grad
    torch.testing.assert_close(term.detach(), fisher_trace(model, x, y).detach())
    (F.cross_entropy(model(x), y) + ETA * term).backward()
    assert worst_error(grads(model), wanted(model, x, y), 1e-3) < 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_the_weights_may_change_between_forward_and_backward_of_nothing_else(way):
    """The graph of the user's own loss, made before the term, is still good after it."""
    model, x, y = vit()
    loss = F.cross_entropy(model(x), y)
    term = fastfip.FisherPenalty(model, way, difference="central", seed=1)(x, y)
    (loss + 0 * term).backward()
    assert worst_error(grads(model), wanted(model, x, y, trace=False), 1e-6) < 1e-9


@pytest.mark.parametrize("way", ["exact", "perturb"])
def test_accumulation(way):
    model, x, y = vit()
    penalty = fastfip.FisherPenalty(model, way, difference="central")
    for part in (slice(0, 3), slice(3, 6)):
        (ETA * penalty(x[part], y[part]) / 2).backward()
    got = grads(model)
    both = [fisher_trace(model, x[part], y[part]) for part in (slice(0, 3), slice(3, 6))]
    model.zero_grad()
    (ETA * (both[0] + both[1]) / 2).backward()
    assert worst_error(got, grads(model), 1e-3) < 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_loss_and_trace_from_the_same_passes(way):
    model, x, y = vit()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    penalty = fastfip.FisherPenalty(model, way)
    penalty(x, y)
    del calls[:]
    loss, trace = penalty.with_loss(x, y)
    assert len(calls) == {"exact": 1, "perturb": 2, "signs": 3}[way]
    torch.testing.assert_close(loss.detach(), F.cross_entropy(model(x), y).detach())
    loss.backward(retain_graph=True)
    assert worst_error(grads(model), wanted(model, x, y, trace=False), 1e-6) < 1e-8
    before = grads(model)
    trace.backward()
    assert worst_error(grads(model), before) > 1e-3


def test_grad_scaler():
    """A scaled loss scales what is added; unscaled it is the gradient again."""
    model, x, y = vit(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    penalty = fastfip.FisherPenalty(model, "perturb", difference="central")
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(model(x), y) + ETA * penalty(x, y)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    want = wanted(model, x, y)
    got = torch.cat([v.flatten() for v in grads(model).values()])
    assert relative_error(got, torch.cat([want[k].flatten() for k in grads(model)])) < 0.1
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("way", WAYS)
def test_train_mode_is_put_back(way):
    """BatchNorm and dropout are taken in eval mode for the term only; running statistics do not move."""
    model, x, y = conv_bn()
    before = {k: v.clone() for k, v in model.named_buffers()}
    model[1].eval()
    flags = [m.training for m in model.modules()]
    term = fastfip.FisherPenalty(model, way, difference="central")(x, y)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())
    if way != "signs":
        want = fisher_trace(copy.deepcopy(model).eval(), x, y)
        torch.testing.assert_close(term.detach(), want.detach())


def test_batch_norm_without_statistics_is_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, C))
    with pytest.raises(ModelError, match="couples the samples"):
        fastfip.FisherPenalty(model)(torch.randn(N, 3), torch.randint(0, C, (N,)))


def relu_net():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, C))


@pytest.mark.parametrize(
    ("make", "shape", "way", "reason"),
    [
        (relu_net, (5,), "exact", "kinks"),
        (lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, C)), (3, 8, 8),
         "exact", "kinks"),
        (lambda: nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, C)), (5,), "exact", "second derivative"),
        (lambda: nets.ViT(C, size=8, dim=8, depth=1, heads=2), (3, 8, 8), "perturb", "fused attention"),
        (lambda: torch.compile(nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, C)), backend="eager"), (5,),
         "perturb", "compiled"),
        (lambda: torch.compile(relu_net(), backend="eager"), (5,), "exact", "kinks"),
    ],
)  # fmt: skip
def test_the_choice_and_its_reason(make, shape, way, reason):
    penalty = fastfip.FisherPenalty(make())
    assert penalty.way == "auto" and "first batch" in penalty.reason
    penalty(torch.randn(N, *shape), torch.randint(0, C, (N,)))
    assert penalty.way == way and reason in penalty.reason and way in repr(penalty)


def test_an_automatic_perturb_falls_back_with_the_names():
    """A fused-attention net with a parameter that cannot be shifted."""
    model, x, y = vit()
    nn.utils.parametrizations.weight_norm(model.head)
    penalty = fastfip.FisherPenalty(model)
    got = penalty(x, y)
    assert penalty.way == "exact" and "head.parametrizations" in penalty.reason
    torch.testing.assert_close(got, fisher_trace(model.eval(), x, y))
    with pytest.raises(ModelError, match=r"cannot shift 'head.parametrizations"):
        fastfip.FisherPenalty(model, "perturb")(x, y)


def test_differences_on_kinks_are_warned_about():
    with pytest.warns(UserWarning, match=r"kinks.*way='exact'"):
        penalty = fastfip.FisherPenalty(relu_net(), "perturb")
        penalty(torch.randn(N, 5), torch.randint(0, C, (N,)))
    assert penalty.way == "perturb" and "although" in penalty.reason


@pytest.mark.parametrize("way", ["perturb", "signs"])
def test_fused_attention_stays_fused(way, monkeypatch):
    """No backend is switched, and no second derivative is asked for."""
    model, x, y = vit()
    penalty = fastfip.FisherPenalty(model, way)
    from torch.nn import attention

    monkeypatch.setattr(attention, "sdpa_kernel", lambda *_: pytest.fail("fused attention was replaced"))
    penalty(x, y).backward()


@pytest.mark.parametrize("way", WAYS)
def test_compiled_models(way):
    model, x, y = vit()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    for net in (eager, compiled):
        penalty = fastfip.FisherPenalty(net, way, difference="central", seed=5)
        (F.cross_entropy(net(x), y) + ETA * penalty(x, y)).backward()
    assert worst_error(grads(compiled), grads(eager), 1e-3) < 1e-6


def test_no_grad_gives_the_value():
    model, x, y = vit()
    with torch.no_grad():
        for way in WAYS:
            value = fastfip.FisherPenalty(model, way)(x, y)
            assert not value.requires_grad
            torch.testing.assert_close(value, fisher_trace(model.eval(), x, y, create_graph=False))


def test_chosen_parameters_and_own_hooks():
    model, x, y = vit()
    names = ["head.weight", "cls_token"]
    options = {
        "params": names,
        "forward": lambda m, b: m(b["pixels"]),
        "loss": lambda z, b: F.cross_entropy(z, b["kind"], reduction="none", label_smoothing=0.1),
    }
    for way in ("exact", "perturb"):
        model.zero_grad()
        fastfip.FisherPenalty(model, way, difference="central", **options)({"pixels": x, "kind": y}).backward()
        if way == "exact":
            want = {k: dict(model.named_parameters())[k].grad.clone() for k in names}
    assert worst_error({k: dict(model.named_parameters())[k].grad for k in names}, want, 1e-3) < 1e-6


@pytest.mark.parametrize("bad", [{"way": "double"}, {"difference": "backward"}, {"step": 0.0}])
def test_settings_are_checked(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        fastfip.FisherPenalty(relu_net(), **bad)


def _worker(rank, port, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        results = {}
        for way in ("exact", "perturb"):
            model, x, y = vit()
            wrapped = nn.parallel.DistributedDataParallel(model)
            penalty = fastfip.FisherPenalty(wrapped, way, difference="central")
            mine = slice(3 * rank, 3 * rank + 3)
            (F.cross_entropy(wrapped(x[mine]), y[mine]) + ETA * penalty(x[mine], y[mine])).backward()
            results[way] = grads(wrapped)
        torch.save(results, f"{out}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    """Two processes with half a batch each leave the gradient of the whole batch in both.

    Spawned, not forked: a fork of a process with threads may wait for a lock that nobody holds any more.
    """
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_worker, (port, str(tmp_path)), nprocs=2, start_method="spawn")
    model, x, y = vit()
    want = wanted(model, x, y)
    for rank in range(2):
        for got in torch.load(tmp_path / f"{rank}.pt").values():
            assert worst_error(got, want, 1e-3) < 1e-6


def test_the_example_of_the_docs_runs():
    text = (Path(__file__).resolve().parents[2] / "docs" / "trace.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code is not None
    scope: dict = {}
    exec(code[1], scope)
    assert scope["penalty"].way in WAYS and all(p.grad is not None for p in scope["model"].parameters())
