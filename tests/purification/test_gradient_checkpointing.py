"""Gradient checkpointing in a purification: the same weights, by our own setting and by the model's own code."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastfip
from fastfip.data import Task
from fastfip.data.cleanset import CleanSet
from fastfip.errors import ConfigError, ModelError
from fastfip.methods import _reach, _search, get
from fastfip.methods.run import Run
from fastfip.methods.wfip import search
from fastfip.purification import memory
from tests.support.small_nets import pretrained_for

pytestmark = pytest.mark.usefixtures("short_search")

#: What is asked for, and what it comes to where there is room.
HOW = {"auto": False, False: False, True: True}
X = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 4


class Tokens(nn.Module):
    """A small vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        layer = {"dim_feedforward": 16, "dropout": 0.1, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, **layer) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Maps(nn.Module):
    """Blocks of convolution, BatchNorm and dropout, which the model checkpoints itself where `reentrant` is given."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.2))
            for _ in range(2)
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))


class Counts(nn.Module):
    """A block that is another function each time."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.a, self.b, self.runs = nn.Linear(size, 64), nn.Linear(64, 64), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return torch.tanh(self.b(torch.tanh(self.runs * self.a(x))))


def made(kind: type[nn.Module], dtype: torch.dtype = torch.float32, *args: object) -> nn.Module:
    torch.manual_seed(0)
    return kind(*args).to(dtype).eval()


def purified(model: nn.Module, method: str, **options: object) -> fastfip.PurifyResult:
    dtype = next(model.parameters()).dtype
    # Adam's first steps are the signs of gradients, those of rounding included.
    given = {"steps": 3, "batch_size": 6, "force": True, "progress": False, "optimizer": "sgd"}
    given |= pretrained_for(method, model)
    return fastfip.purify(model, (X.to(dtype), Y), method, **(given | options))


def distance(a: fastfip.PurifyResult, b: fastfip.PurifyResult) -> float:
    pairs = zip(a.state_dict().values(), b.state_dict().values())
    return max(float((p - q).double().norm() / (q.double().norm() + 1e-12)) for p, q in pairs)


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-6), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("method", ["fisher_steps", "fast_wfip"])
@pytest.mark.parametrize("kind", [Tokens, Maps])
def test_purified_weights_are_those_without(kind, method, dtype, close):
    model = made(kind, dtype)
    options = {"bn_mode": "train", "dropout": True, "measure": ("acc", "fisher_trace")}
    plain = purified(model, method, **options)
    again = purified(model, method, gradient_checkpointing=True, **options)
    assert again.settings["gradient_checkpointing"] is True and plain.settings["gradient_checkpointing"] is False
    assert distance(again, plain) < close < distance(purified(model, method, seed=1, **options), plain)
    assert again.after.fisher_trace == pytest.approx(plain.after.fisher_trace, rel=1e-3)


@pytest.mark.parametrize(
    "method", ["fine_tune", "wfip", "super_fine_tune", "ft_sam", "fip", "fast_fip", "i_bau", "fine_mixing"]
)
def test_other_methods_work_as_well(method):
    model = made(Maps, torch.float64)
    options = {"trust": 0.01} if method == "wfip" else {"optimizer": "adam"} if method == "i_bau" else {}
    results = [purified(model, method, gradient_checkpointing=how, **options) for how in (False, True)]
    assert distance(*results) < 1e-6 and results[1].settings["gradient_checkpointing"]


@pytest.mark.parametrize("inplace", [False, True])
def test_the_model_that_is_handed_back_is_as_it_was_given(inplace):
    model = made(Maps)
    calls, kinds, keys = [], [type(m) for m in model.modules()], list(model.state_dict())
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    result = purified(model, "fast_wfip", gradient_checkpointing=True, inplace=inplace).model
    assert [type(m) for m in result.modules()] == kinds and list(result.state_dict()) == keys
    before = len(calls)
    result(X)
    assert len(calls) == before + 1 and (result is model) == inplace


@pytest.mark.parametrize("method", ["fisher_steps", "fast_wfip", "fine_tune"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"memory": "100GB"}], ids=["whole", "memory"])
def test_checkpoints_of_the_models_own_change_nothing(method, reentrant, options):
    """Not BatchNorm's statistics either, into which torch alone would count each batch twice."""
    own = {"bn_mode": "train", "dropout": True, **options}
    plain, again = (purified(made(Maps, torch.float64, how), method, **own) for how in (None, reentrant))
    assert distance(again, plain) < 1e-6 and again.model.reentrant is reentrant


def terms(model: nn.Module, method: str) -> memory.MemoryModel:
    config = get(method).Config().replace(holdout=0.0, batch_size=6)
    run = Run(model, Task(), CleanSet.of((X, Y)), config, torch.device("cpu"), torch.Generator(), classes=4)
    run.received = {name: p.detach() for name, p in model.named_parameters()}
    return memory.measured(run, get(method))


@pytest.mark.parametrize("method", ["fisher_steps", "fast_wfip"])
def test_a_budget_without_room_for_a_sample_turns_it_on(method, monkeypatch):
    for module, name in ((search, "ROUNDS"), (_search, "STEPS"), (_reach, "LAST")):
        monkeypatch.setattr(module, name, 1)
    for module in (_search, _reach, memory):
        monkeypatch.setattr(module, "SEARCH_BATCH", 6)
    monkeypatch.setattr(memory.MemoryModel, "peak", _activations_only)
    model, options = made(Tokens), {"bn_mode": "eval", "steps": 2}
    budget = terms(model, method).peak(1) - 1
    with pytest.raises(ConfigError, match="1 sample in a pass"):
        purified(model, method, memory=budget, gradient_checkpointing=False, **options)
    result = purified(model, method, memory=budget, **options)
    assert result.settings["gradient_checkpointing"] and result.settings["micro_batch"] >= 1
    assert any(note.startswith("gradient checkpointing is on, in ") for note in result.notes)
    whole = {how: purified(model, method, memory="100GB", gradient_checkpointing=how, **options) for how in HOW}
    assert {how: made.settings["gradient_checkpointing"] for how, made in whole.items()} == HOW
    assert distance(result, whole[False]) < 1e-5


def _activations_only(self: memory.MemoryModel, micro_batch: int) -> int:
    """Of so small a model everything else is larger, and nothing that is chosen would depend on its passes."""
    return self.constant + int(max(micro_batch, self.least) * self.per_sample)


def test_a_model_that_checkpoints_itself_is_measured_by_what_it_keeps():
    """Its Fisher diagonal is then taken one sample at a time, not of a graph that keeps all."""
    plain, again = (purified(made(Maps, torch.float32, how), "fast_wfip", memory="100GB") for how in (None, False))
    assert distance(again, plain) < 1e-5 and again.settings["gradient_checkpointing"] is False
    sizes = []
    model = made(Maps, torch.float32, False)
    model.head.register_forward_hook(lambda m, given, out: sizes.append(len(out)) if out.requires_grad else None)
    purified(model, "fast_wfip", memory="100GB", inplace=True, steps=1)
    assert sizes.count(1) >= 2 * len(X)  # for the shifts, and for biases and norms


def test_parts_that_are_other_functions_each_time_are_one_line():
    net = nn.Sequential(nn.Flatten(), Counts(192), Counts(64), Counts(64), nn.Linear(64, 4)).eval()
    with pytest.raises(ModelError, match="other gradients when they are computed again") as error:
        purified(net, "fine_tune", gradient_checkpointing=True)
    assert "\n" not in str(error.value)


def test_a_model_without_such_parts_runs_as_it_is_with_a_note():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    result = purified(net, "fine_tune", gradient_checkpointing=True)
    assert not result.settings["gradient_checkpointing"]
    assert any(note.startswith("no gradient checkpointing: no parts were found") for note in result.notes)


@pytest.mark.parametrize("wrong", ["on", 1, None, "yes"])
def test_another_setting_is_refused(wrong):
    with pytest.raises(ConfigError, match="gradient_checkpointing="):
        purified(made(Maps), "fine_tune", gradient_checkpointing=wrong)


class OnlyWithGradients(Maps):
    """Checkpoints its blocks only where gradients reach their inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if x.requires_grad else block(x)
        return self.head(x.mean((2, 3)))


def test_checkpoints_of_its_own_are_seen_where_they_need_gradients() -> None:
    seen = []
    for net in (OnlyWithGradients(), Maps()):
        fastfip.purify(
            net, (X, Y), "fine_tune", steps=1, micro_batch=4, bn_mode="eval", force=True, progress=False,
            callbacks=[lambda run, record: seen.append(run.checkpointed)],
        )  # fmt: skip
    assert seen == [True, False]
