"""Small models for what fools libraries of per-sample gradients: shared, sliced, folded, unknown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastfip.data import Task
from fastfip.testing.nets import randomize_norms
from tests.support.fisher_problems import Lambda, N, P, Problem, labels, logits, on


class Square(torch.autograd.Function):
    """An operation that no rule knows."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x.square() * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return 2 * g * x * w, (g * x.square()).sum(0)


def _gpt2_linear(m: nn.Module, x: Tensor) -> Tensor:
    return torch.addmm(m.bias, x.reshape(-1, 4), m.weight).view(*x.shape[:-1], 6)


def _windows(m: nn.Module, x: Tensor) -> Tensor:
    """Swin: windows folded into the batch, a relative position bias from a table, and back."""
    n, h, w, c = x.shape
    x = x.view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
    x = m.norm(x)
    q, k, v = m.qkv(x).chunk(3, -1)
    index = torch.tensor([[0, 1, 2, 3], [3, 0, 1, 2], [2, 3, 0, 1], [1, 2, 3, 0]])
    bias = m.table[index.view(-1)].view(4, 4)
    x = torch.softmax(q @ k.transpose(1, 2) / 2 + bias, -1) @ v
    x = x.view(n, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
    return logits(x)


def _response_norm(m: nn.Module, x: Tensor) -> Tensor:
    """ConvNeXt V2: channels weighed by their norms, the affine map in one operation."""
    x = m.a(x)
    norm = x.norm(p=2, dim=(2, 3), keepdim=True)
    share = norm / (norm.mean(1, keepdim=True) + 1e-6)
    return logits(x + torch.addcmul(m.b.view(1, -1, 1, 1), m.w.view(1, -1, 1, 1), x * share))


def _positions(m: nn.Module, x: Tensor) -> Tensor:
    """BERT: position embeddings looked up once for the whole batch."""
    where = torch.arange(x.shape[1])[None]
    return logits(m.norm(m.words(x) + m.places(where)))


def _position_bias(m: nn.Module, x: Tensor) -> Tensor:
    """T5: an embedding of distances, the same for every sample, added to the scores."""
    h = m.words(x)
    t = torch.arange(x.shape[1])
    bias = m.bias((t[:, None] - t[None]).clamp(-2, 2) + 2).permute(2, 0, 1)
    return logits(torch.softmax(h @ h.transpose(1, 2) + bias, -1) @ h)


def _language_model(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.tanh(m.mix(m.words(x)))
    return F.linear(h, m.words.weight, m.bias)


def _tokens_loss(z: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(z.transpose(1, 2), batch[1], reduction="none").sum(1)


def words(forward: Callable[..., Tensor], slow: tuple[str, ...] = (), **parts: Any) -> Callable[[], Problem]:
    def make() -> Problem:
        model = Lambda(forward, **{name: part() for name, part in parts.items()})
        return Problem(model, (torch.randint(0, 6, (N, 7)), labels()), slow=slow)

    return make


def language_model() -> Problem:
    model = Lambda(_language_model, words=nn.Embedding(6, 4), mix=nn.Linear(4, 4), bias=P(6))
    batch = (torch.randint(0, 6, (N, 7)), torch.randint(0, 6, (N, 7)))
    return Problem(model, batch, Task.of(loss=_tokens_loss), slow=("words",))


USES: dict[str, Callable[[], Problem]] = {
    "linear-twice": on((4,), lambda m, x: logits(m.a(torch.tanh(m.a(x)))), a=lambda: nn.Linear(4, 4)),
    "linear-twice-and-functional": on(
        (7, 4), lambda m, x: logits(F.linear(torch.tanh(m.a(x)), m.a.weight) + m.a(x)), a=lambda: nn.Linear(4, 4)
    ),
    "linear-and-transposed": on(
        (4,),
        lambda m, x: logits(F.linear(torch.tanh(m.a(x)), m.a.weight.t())),
        a=lambda: nn.Linear(4, 4),
        slow=("a.weight",),
    ),
    "conv-twice": on(
        (3, 5, 5),
        lambda m, x: logits(m.a(torch.tanh(m.a(x)))),
        a=lambda: nn.Conv2d(3, 3, 3, padding=1),
        slow=("a.weight",),
    ),
    "norm-twice": on((7, 4), lambda m, x: logits(m.a(torch.tanh(m.a(x)))), a=lambda: nn.LayerNorm(4)),
    "embedding-twice": words(
        lambda m, x: logits(m.words(x) + m.words(x.flip(1) * 2 % 6)), words=lambda: nn.Embedding(6, 4)
    ),
    "tied-language-model": language_model,
    "class-token-and-positions": on(
        (6, 4),
        lambda m, x: logits(m.norm(torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.places)),
        token=lambda: P(1, 1, 4),
        places=lambda: P(1, 7, 4),
        norm=lambda: nn.LayerNorm(4),
    ),
    "layer-scale": on((7, 4), lambda m, x: logits(x + m.gamma * m.a(x)), gamma=lambda: P(4), a=lambda: nn.Linear(4, 4)),
    "layer-scale-2d": on(
        (4, 3, 3),
        lambda m, x: logits(x + m.gamma[:, None, None] * m.a(x)),
        gamma=lambda: P(4),
        a=lambda: nn.Conv2d(4, 4, 1),
    ),
    "scalars": on(
        (4,),
        lambda m, x: logits(m.a(x) * m.scale.exp() - m.shift + x / m.div),
        a=lambda: nn.Linear(4, 4),
        scale=lambda: P(),
        shift=lambda: P(1),
        div=lambda: nn.Parameter(torch.rand(4) + 1),
        slow=("scale",),
    ),
    "logits-of-the-data-alone": on((4,), lambda m, x: logits(x * m.w), w=lambda: P(4)),
    "gpt2-conv1d": on((7, 4), lambda m, x: logits(_gpt2_linear(m, x)), weight=lambda: P(4, 6), bias=lambda: P(6)),
    "matrix-on-the-left": on((4,), lambda m, x: logits((m.w @ x.t()).t()), w=lambda: P(6, 4)),
    "mixing-positions": on(
        (7, 4), lambda m, x: logits(m.a(x.transpose(1, 2)).transpose(1, 2)), a=lambda: nn.Linear(7, 5)
    ),
    "einsum": on((7, 4), lambda m, x: logits(torch.einsum("nti,oi->nto", x, m.w)), w=lambda: P(6, 4), slow=("w",)),
    "einsum-heads": on(
        (7, 8),
        lambda m, x: logits(torch.einsum("nthd,hde->nthe", x.view(-1, 7, 2, 4), m.w)),
        w=lambda: P(2, 4, 3),
        slow=("w",),
    ),
    "scaled-weight": on((4,), lambda m, x: logits(F.linear(x, m.w * 0.3)), w=lambda: P(6, 4), slow=("w",)),
    "masked-weight": on((4,), lambda m, x: logits(F.linear(x, m.w * torch.eye(4))), w=lambda: P(4, 4), slow=("w",)),
    "low-rank-weight": on(
        (4,),
        lambda m, x: logits(F.linear(x, m.a @ torch.relu(m.s + 1).diag() @ m.b)),
        a=lambda: P(6, 2),
        s=lambda: P(2),
        b=lambda: P(2, 4),
        slow=("a", "s", "b"),
    ),
    "low-rank-adapter": on(
        (7, 4),
        lambda m, x: logits(m.w(x) + (x @ m.a) @ m.b),
        w=lambda: nn.Linear(4, 6),
        a=lambda: P(4, 2),
        b=lambda: P(2, 6),
    ),
    "slices-of-one": on(
        (4,),
        lambda m, x: logits(torch.cat([F.linear(x, m.w[:3]), torch.tanh(F.linear(x, m.w[3:]))], 1)),
        w=lambda: P(6, 4),
    ),
    "overlapping-slices": on(
        (4,),
        lambda m, x: logits(torch.cat([F.linear(x, m.w[:4]), torch.tanh(F.linear(x, m.w[2:]))], 1)),
        w=lambda: P(6, 4),
        slow=("w",),
    ),
    "bert-positions": words(
        _positions,
        words=lambda: nn.Embedding(6, 4),
        places=lambda: nn.Embedding(9, 4),
        norm=lambda: nn.LayerNorm(4),
        slow=("places",),
    ),
    "t5-bias": words(_position_bias, words=lambda: nn.Embedding(6, 4), bias=lambda: nn.Embedding(5, 1), slow=("bias",)),
    "indexed": words(lambda m, x: logits(torch.tanh(m.table[x])), table=lambda: P(6, 4)),
    "index-select": on(
        (4,), lambda m, x: logits(x * m.w.index_select(0, torch.tensor([3, 0, 0, 2]))), w=lambda: P(5), slow=("w",)
    ),
    "swin-windows": on(
        (4, 4, 4),
        _windows,
        norm=lambda: nn.LayerNorm(4),
        qkv=lambda: nn.Linear(4, 12),
        table=lambda: P(6),
        slow=("table",),
    ),
    "frames-in-the-batch": on(
        (3, 2, 4, 4),
        lambda m, x: logits(m.head(m.bn(m.conv(x.flatten(0, 1))).mean((2, 3)).view(-1, 3, 4))),
        conv=lambda: nn.Conv2d(2, 4, 3),
        bn=lambda: randomize_norms(nn.BatchNorm2d(4)).eval(),
        head=lambda: nn.Linear(4, 5),
    ),
    "frames-before-samples": on(
        (3, 2, 4, 4),
        lambda m, x: logits(m.conv(x.transpose(0, 1).flatten(0, 1)).view(3, -1, 4, 2, 2).transpose(0, 1)),
        conv=lambda: nn.Conv2d(2, 4, 3),
    ),
    "samples-in-the-last-dimension": on(
        (4, 6), lambda m, x: logits((x.permute(1, 2, 0) * m.s).permute(2, 0, 1)), s=lambda: P(4, 1, 1)
    ),
    "in-place": on(
        (3, 5, 5),
        lambda m, x: logits(F.relu(m.a(x).mul_(m.s), inplace=True) + m.b(x).add_(m.s)),
        a=lambda: nn.Conv2d(3, 4, 1),
        b=lambda: nn.Conv2d(3, 4, 1),
        s=lambda: P(1),
    ),
    "checkpoint": on(
        (4,),
        lambda m, x: logits(checkpoint(lambda h: m.b(torch.tanh(m.a(h))), x, use_reentrant=False)),
        slow=("a.", "b."),
        a=lambda: nn.Linear(4, 5),
        b=lambda: nn.Linear(5, 4),
    ),
    "no-grad-part": on(
        (4,), lambda m, x: logits(m.b(_without_grad(m.a, x))), a=lambda: nn.Linear(4, 4), b=lambda: nn.Linear(4, 4)
    ),
    "unused-part": on((4,), lambda m, x: logits(m.a(x)), a=lambda: nn.Linear(4, 4), b=lambda: nn.Linear(4, 4)),
    "unknown-operation": on(
        (4,), lambda m, x: logits(Square.apply(m.a(x), m.w)), a=lambda: nn.Linear(4, 4), w=lambda: P(4), slow=("w",)
    ),
    "unknown-operation-first": on(
        (4,), lambda m, x: logits(m.a(Square.apply(x, m.w))), a=lambda: nn.Linear(4, 4), w=lambda: P(4), slow=("w",)
    ),
    "broadcast-by-an-unknown-operation": on(
        (4, 3, 3),
        lambda m, x: logits(torch.lerp(m.a(x), m.w.view(-1, 1, 1), 0.3).lerp(m.v, 0.1)),
        a=lambda: nn.Conv2d(4, 4, 1),
        w=lambda: P(4),
        v=lambda: P(3),
        slow=("w", "v"),
    ),
    "response-norm": on((4, 3, 3), _response_norm, a=lambda: nn.Conv2d(4, 4, 1), w=lambda: P(4), b=lambda: P(4)),
    "unfold-and-product": on((3, 5, 5), lambda m, x: logits(m.w @ F.unfold(x, 3)), w=lambda: P(4, 27)),
}


def _without_grad(part: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return part(x)
