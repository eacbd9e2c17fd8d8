"""Small models for every layer and option, and what builds them; fisher_uses.py has those for every kind of use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastfip.data import Task
from fastfip.testing.nets import randomize_norms

N, C = 5, 3


@dataclass
class Problem:
    """A model and a batch; `slow` lists parts of the names that go a slower way than a rule."""

    model: nn.Module
    batch: Any
    task: Task = field(default_factory=Task)
    slow: tuple[str, ...] = ()


class Lambda(nn.Module):
    """A module of parts and a function of them."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._call = forward

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._call(self, *inputs)


def P(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(size) * 0.5)


def labels() -> Tensor:
    return torch.randint(0, C, (N,))


def on(
    shape: tuple[int, ...], forward: Callable[..., Tensor], slow: tuple[str, ...] = (), **parts: Any
) -> Callable[[], Problem]:
    """A problem with an input of that shape and a model of these parts."""

    def make() -> Problem:
        built = {
            name: part() if callable(part) and not isinstance(part, nn.Module) else part for name, part in parts.items()
        }
        model = Lambda(forward, **built)
        return Problem(model, (torch.randn(N, *shape), labels()), slow=slow)

    return make


def logits(z: Tensor) -> Tensor:
    """[N, ...] -> [N, C] without parameters, not symmetric in anything."""
    z = z.flatten(1)
    mix = torch.sin(torch.arange(z.shape[1] * C, dtype=z.dtype) + 0.3).view(z.shape[1], C)
    return torch.tanh(z) @ mix / z.shape[1] ** 0.5


def layer(shape: tuple[int, ...], make: Callable[[], nn.Module], slow: tuple[str, ...] = ()) -> Callable[[], Problem]:
    return on(shape, lambda m, x: logits(m.layer(x)), slow=slow, layer=make)


LAYERS: dict[str, Callable[[], Problem]] = {
    "linear": layer((4,), lambda: nn.Linear(4, 6)),
    "linear-no-bias": layer((4,), lambda: nn.Linear(4, 6, bias=False)),
    "linear-3d": layer((7, 4), lambda: nn.Linear(4, 6)),
    "linear-N-equals-T": layer((N, 4), lambda: nn.Linear(4, 6)),
    "linear-4d": layer((2, 3, 4), lambda: nn.Linear(4, 6, bias=False)),
    "bilinear": on((4,), lambda m, x: logits(m.layer(x, x)), layer=lambda: nn.Bilinear(4, 4, 2), slow=("weight",)),
    "batch-norm-1d": layer((4,), lambda: randomize_norms(nn.BatchNorm1d(4)).eval()),
    "batch-norm-3d-input": layer((4, 6), lambda: randomize_norms(nn.BatchNorm1d(4)).eval()),
    "batch-norm-2d": layer((4, 3, 2), lambda: randomize_norms(nn.BatchNorm2d(4)).eval()),
    "batch-norm-5d": layer((4, 3, 2, 2), lambda: randomize_norms(nn.BatchNorm3d(4)).eval()),
    "layer-norm": layer((7, 4), lambda: randomize_norms(nn.LayerNorm(4))),
    "layer-norm-2-dims": layer((3, 2, 4), lambda: randomize_norms(nn.LayerNorm((2, 4)))),
    "layer-norm-2d": layer((4,), lambda: nn.LayerNorm(4)),
    "group-norm": layer((6, 3, 2), lambda: randomize_norms(nn.GroupNorm(2, 6))),
    "group-norm-2d": layer((6,), lambda: randomize_norms(nn.GroupNorm(3, 6))),
    "instance-norm-1d": layer((4, 6), lambda: nn.InstanceNorm1d(4, affine=True)),
    "instance-norm-2d": layer((4, 3, 5), lambda: nn.InstanceNorm2d(4, affine=True)),
    "instance-norm-running": layer(
        (4, 3, 5), lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval()
    ),
    "rms-norm": layer((7, 4), lambda: nn.RMSNorm(4)),
    "prelu": layer((4, 3), lambda: nn.PReLU(4)),
    "prelu-one": layer((4, 3), lambda: nn.PReLU()),
    "embedding": lambda: _tokens(nn.Embedding(6, 4)),
    "embedding-padding": lambda: _tokens(nn.Embedding(6, 4, padding_idx=0)),
    "embedding-one-token": lambda: _tokens(nn.Embedding(6, 4), ()),
    "embedding-bag": lambda: _tokens(nn.EmbeddingBag(6, 4, mode="mean"), slow=("weight",)),
    "conv1d-same": layer((3, 9), lambda: nn.Conv1d(3, 4, 3, padding="same")),
    "conv2d": layer((3, 6, 5), lambda: nn.Conv2d(3, 4, 3, padding=1)),
    "conv2d-1x1": layer((3, 4, 5), lambda: nn.Conv2d(3, 4, 1)),
    "conv2d-stride": layer((3, 7, 6), lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(1, 0), bias=False)),
    "conv2d-dilation": layer((3, 7, 6), lambda: nn.Conv2d(3, 4, 2, dilation=(2, 3))),
    "conv2d-even-same": layer((2, 5, 5), lambda: nn.Conv2d(2, 3, 4, padding="same")),
    "conv2d-valid": layer((2, 5, 5), lambda: nn.Conv2d(2, 3, 2, padding="valid")),
    "conv2d-groups": layer((4, 5, 5), lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2)),
    "conv2d-depthwise": layer((4, 5, 5), lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4)),
    "conv2d-multiplier": layer((3, 5, 5), lambda: nn.Conv2d(3, 6, 3, groups=3)),
    "conv3d": layer((2, 3, 4, 3), lambda: nn.Conv3d(2, 3, (2, 3, 2), padding=(1, 0, 1), stride=(1, 2, 1))),
    "conv-transpose1d": layer((3, 5), lambda: nn.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1)),
    "conv-transpose2d": layer(
        (4, 3, 4), lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, dilation=(1, 2))
    ),
    "conv-transpose3d": layer((2, 2, 3, 2), lambda: nn.ConvTranspose3d(2, 2, 2, padding=1)),
    "weight-norm": layer((4,), lambda: parametrizations.weight_norm(nn.Linear(4, 6)), slow=("original",)),
    "spectral-norm": layer((4,), lambda: parametrizations.spectral_norm(nn.Linear(4, 6)).eval(), slow=("original",)),
    "orthogonal": layer((4,), lambda: parametrizations.orthogonal(nn.Linear(4, 4)), slow=("original",)),
    "mha": on(
        (6, 8),
        lambda m, x: logits(m.a(x, x, x, need_weights=False)[0]),
        a=lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    ),
    "mha-weights": on(
        (6, 8), lambda m, x: logits(m.a(x, x, x)[0]), a=lambda: nn.MultiheadAttention(8, 2, batch_first=True)
    ),
    "mha-time-first": on(
        (6, 8),
        lambda m, x: logits(m.a(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1)),
        a=lambda: nn.MultiheadAttention(8, 2),
    ),
    "mha-cross": on(
        (6, 8),
        lambda m, x: logits(m.a(x[:, :2], x, x)[0]),
        a=lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    ),
    "mha-kdim": on(
        (6, 8),
        lambda m, x: logits(m.a(x, x[..., :3], x[..., :5])[0]),
        a=lambda: nn.MultiheadAttention(8, 2, kdim=3, vdim=5, batch_first=True),
    ),
    "mha-bias-kv": on(
        (6, 8),
        lambda m, x: logits(m.a(x, x, x)[0]),
        a=lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True),
        slow=("bias_k", "bias_v"),
    ),
    "transformer-encoder": layer(
        (6, 8),
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), 2, enable_nested_tensor=False
        ).eval(),
    ),
    "transformer-decoder": on(
        (6, 8),
        lambda m, x: logits(m.d(x[:, :3], x)),
        d=lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, 0.0, batch_first=True), 1).eval(),
    ),
    "lstm": on((6, 4), lambda m, x: logits(m.r(x)[0]), r=lambda: nn.LSTM(4, 3, 2, batch_first=True)),
    "lstm-bidirectional-time-first": on(
        (6, 4),
        lambda m, x: logits(m.r(x.transpose(0, 1))[0].transpose(0, 1)),
        r=lambda: nn.LSTM(4, 3, bidirectional=True),
    ),
    "lstm-projected": on(
        (6, 4), lambda m, x: logits(m.r(x)[0]), r=lambda: nn.LSTM(4, 5, proj_size=2, batch_first=True)
    ),
    "gru": on((6, 4), lambda m, x: logits(m.r(x)[0]), r=lambda: nn.GRU(4, 3, batch_first=True)),
    "rnn": on((6, 4), lambda m, x: logits(m.r(x)[0]), r=lambda: nn.RNN(4, 3, batch_first=True)),
    "gru-cell": on((6, 4), lambda m, x: logits(m.r(x[:, 1], m.r(x[:, 0]))), r=lambda: nn.GRUCell(4, 4)),
    "lstm-cell": on((6, 4), lambda m, x: logits(m.r(x[:, 1], m.r(x[:, 0]))[0]), r=lambda: nn.LSTMCell(4, 4)),
    **{
        f"conv2d-{mode}": layer((3, 6, 5), lambda mode=mode: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode=mode))
        for mode in ("reflect", "replicate", "circular")
    },
    "conv1d-circular-same": layer((3, 7), lambda: nn.Conv1d(3, 4, 4, padding="same", padding_mode="circular")),
}


def _tokens(table: nn.Module, shape: tuple[int, ...] = (7,), slow: tuple[str, ...] = ()) -> Problem:
    model = Lambda(lambda m, x: logits(m.table(x)), table=table)
    return Problem(model, (torch.randint(0, 6, (N, *shape)), labels()), slow=slow)


def build(make: Callable[[], Problem], dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
    """Return the problem in float64, its weights and inputs seeded."""
    torch.manual_seed(seed)
    problem = make()
    problem.model.to(dtype)
    x, *rest = problem.batch
    problem.batch = (x.to(dtype) if x.is_floating_point() else x, *rest)
    return problem


#: Have no second derivative in torch.
ONLY_FUSED = {"embedding-bag"}
