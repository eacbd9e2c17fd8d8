"""Tiny nets and data for the tests of purification."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastfip.methods import get

CLASSES = 3
#: Settings without which a method leaves untrained weights as they are: `clp` prunes outliers.
_SETTINGS = {"clp": {"u": 0.3}}


def settings_of(method, model):
    """Return what a method needs beside its defaults on such small nets."""
    return {**_SETTINGS.get(getattr(method, "name", method), {}), **pretrained_for(method, model)}


def pretrained_for(method, model):
    """Return the state dict of a net that the model may have been fine-tuned from, if the method needs it."""
    recipe = get(method) if isinstance(method, str) else method
    if not recipe.needs_pretrained:
        return {}
    if not isinstance(model, nn.Module) or any(nn.parameter.is_lazy(p) for p in model.parameters()):
        return {"pretrained": {}}
    generator = torch.Generator().manual_seed(4)
    drawn = {name: 0.02 * torch.rand(t.shape, generator=generator) for name, t in model.state_dict().items()}
    return {
        "pretrained": {name: t + drawn[name].to(t) for name, t in model.state_dict().items() if t.is_floating_point()}
    }


def conv_net(classes: int = CLASSES) -> nn.Sequential:
    """Convolution, BatchNorm, dropout, Linear; input [N, 2, 6, 6]."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(36, classes),
    )


def plain_net(classes: int = CLASSES) -> nn.Sequential:
    """No BatchNorm; input [N, 2, 6, 6]."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, classes))


class TiedNet(nn.Module):
    """One weight in two places; input [N, 2, 6, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(72, 72)
        self.second = nn.Linear(72, 72)
        self.second.weight = self.first.weight
        self.head = nn.Linear(72, CLASSES)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x.flatten(1))))))


class OneHot(nn.Module):
    """A classifier of token ids [N, T] that looks no vectors up: nothing that a small change can reach."""

    def __init__(self, tokens: int, classes: int) -> None:
        super().__init__()
        self.tokens, self.head = tokens, nn.Linear(tokens, classes)

    def forward(self, ids):
        return self.head(nn.functional.one_hot(ids, self.tokens).float().mean(1))


class BiasedAttention(nn.Module):
    """LeViT's: biases by position, looked up once for all passes in eval mode."""

    def __init__(self, keeps=True):
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)
        self.attention_biases = nn.Parameter(torch.randn(5))
        self.register_buffer("index", (torch.arange(5)[:, None] - torch.arange(5)).abs(), persistent=False)
        self.attention_bias_cache, self.keeps = {}, keeps

    def train(self, mode=True):
        super().train(mode)
        if mode and self.attention_bias_cache:
            self.attention_bias_cache = {}
        return self

    def biases(self, key):
        if self.training or not self.keeps:
            return self.attention_biases[self.index]
        if key not in self.attention_bias_cache:
            self.attention_bias_cache[key] = self.attention_biases[self.index]
        return self.attention_bias_cache[key]

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = (q @ k.transpose(1, 2) + self.biases(str(x.device))).softmax(-1)
        return self.head((scores @ v).square().mean(1))


def data(n: int = 24, classes: int = CLASSES, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, 2, 6, 6] that show their class as a bright row, and balanced labels [n]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, 6, 6, generator=generator)
    y = torch.arange(n) % classes
    x[torch.arange(n), 0, y] += 1.0
    return x, y


def loader(n: int = 24, batch_size: int = 8, **options) -> DataLoader:
    return DataLoader(TensorDataset(*data(n)), batch_size=batch_size, **options)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
