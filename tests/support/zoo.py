"""Small models as their authors write them, with data that fit: what the public functions are given in the field.

The nets are our own, in the style of published code: `.view`, activations in place, functional dropout, frozen parts,
weights that are computed, packed or stored the other way round, tokens, one logit, several labels, maps of labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES, N, SIZE, TOKENS, WIDTH = 3, 24, 12, 6, 16

Data = tuple[Tensor, Tensor]


class LeNet(nn.Module):
    """Two convolutions, flattened with a view, as in many a tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.fc1 = nn.Linear(8 * 3 * 3, 20)
        self.fc2 = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x), inplace=True), 2)
        x = F.max_pool2d(F.relu_(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        x = F.dropout(F.relu(self.fc1(x)), 0.5, training=self.training)
        return self.fc2(x)


class VGG(nn.Module):
    """Convolutions with BatchNorm in a Sequential made from a list of widths."""

    def __init__(self, widths: tuple[int | str, ...] = (8, "M", 12, "M")) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 2
        for width in widths:
            if isinstance(width, str):
                layers += [nn.MaxPool2d(kernel_size=2, stride=2), nn.Dropout(0.3)]
            else:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                before = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(before * (SIZE // 4) ** 2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.features(x)
        out = out.view(out.size(0), -1)
        return self.classifier(out)


class Block(nn.Module):
    """A residual block whose addition is in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class ResNet(nn.Module):
    """Residual blocks, average pooling and a head, all through one ReLU."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, stride=2, padding=1, bias=False)
        self.layer1, self.layer2 = Block(width), Block(width)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.layer2(self.layer1(self.stem(x))))
        return self.fc(torch.flatten(x, 1))


class Attention(nn.Module):
    """Self-attention with one Linear for queries, keys and values."""

    def __init__(self, width: int = WIDTH, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).contiguous().view(n, t, d))


class ViT(nn.Module):
    """Patches, a class token and positions, pre-norm blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, WIDTH, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, (SIZE // 4) ** 2 + 1, WIDTH) * 0.02)
        self.norm1, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.norm2, self.norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x)[:, 0])


class Conv1D(nn.Module):
    """GPT-2's Linear: its weight is stored input first."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.1)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        size = x.size()[:-1] + (self.nf,)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class GPT(nn.Module):
    """Token and position embeddings, a causal block of Conv1D layers, a classifier on the last token."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.ln_1, self.ln_f = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c_attn, self.c_proj = Conv1D(3 * WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)
        self.c_fc, self.c_out = Conv1D(2 * WIDTH, WIDTH), Conv1D(WIDTH, 2 * WIDTH)
        self.score = nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))
        q, k, v = self.c_attn(self.ln_1(x)).split(WIDTH, dim=2)
        x = x + self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        x = x + self.c_out(F.gelu(self.c_fc(x)))
        return self.score(self.ln_f(x))[:, -1]


class LSTM(nn.Module):
    """Two recurrent layers both ways over vectors; the last output classifies."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.lstm(x)
        return self.fc(out[:, -1, :])


class UNet(nn.Module):
    """Down, up again, and a skip between them: one label a pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.middle = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.out = nn.Conv2d(12, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        x = self.up(self.middle(F.max_pool2d(skip, 2)))
        return self.out(torch.cat([x, skip], dim=1))


class Experts(nn.Module):
    """A stack of experts and a gate, on flattened images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2 * SIZE * SIZE, WIDTH)
        self.gate = nn.Linear(WIDTH, 2)
        self.w = nn.Parameter(torch.randn(2, WIDTH, WIDTH) * 0.2)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x.view(x.size(0), -1)))
        share = self.gate(x).softmax(-1)
        return self.head(x + sum(share[:, e : e + 1] * F.linear(x, self.w[e]) for e in range(2)))


class Headed(LeNet):
    """A LeNet with another last layer."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.fc2 = nn.Linear(20, outputs)


def _images(classes: int = CLASSES) -> Data:
    generator = torch.Generator().manual_seed(7)
    x, y = torch.rand(N, 2, SIZE, SIZE, generator=generator), torch.arange(N) % classes
    x[torch.arange(N), 0, 3 * y] += 1.0
    return x, y


def _sequences() -> Data:
    x, y = torch.randn(N, TOKENS, 4, generator=torch.Generator().manual_seed(7)), torch.arange(N) % CLASSES
    x[torch.arange(N), -1, y] += 2.0
    return x, y


def _tokens() -> Data:
    y = torch.arange(N) % CLASSES
    x = torch.randint(0, 11, (N, TOKENS), generator=torch.Generator().manual_seed(7))
    x[:, -1] = y
    return x, y


def _labels() -> Data:
    x, y = _images()
    return x, F.one_hot(y, CLASSES).float()


def _maps() -> Data:
    x, y = _images()
    return x, (x[:, 0] > 0.5).long() + (x[:, 1] > 0.9).long()


def _frozen_backbone() -> nn.Module:
    model = VGG()
    model.features.requires_grad_(False)
    return model


def _weight_norm(norm: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = LeNet()
        for layer in (model.conv2, model.fc1):
            norm(layer)
        return model

    return make


def lora() -> nn.Module:
    """A ViT with LoRA of peft at its qkv layer, no longer at its start, at which one of the two matrices is zero.

    Raises:
        ImportError: peft is not installed.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"], init_lora_weights=False)
    return get_peft_model(ViT(), config)


def binary_cross_entropy(out: Tensor, batch: Data) -> Tensor:
    """Return the loss of each sample with one logit."""
    return F.binary_cross_entropy_with_logits(out.view(-1), batch[1].float(), reduction="none")


def each_label(out: Tensor, batch: Data) -> Tensor:
    """Return the loss of each sample with several labels."""
    return F.binary_cross_entropy_with_logits(out, batch[1], reduction="none").mean(1)


def each_pixel(out: Tensor, batch: Data) -> Tensor:
    """Return the loss of each sample with a map of labels."""
    return F.cross_entropy(out, batch[1], reduction="none").mean((1, 2))


@dataclass(frozen=True)
class Animal:
    """A model, data that fit it, and what is asked of it.

    Attributes:
        make, data: the model and `(x, y)`. hooks: `loss=` and `forward=`, where the task needs them.
        unsearched: whether an audit looks for no changes: of token ids, or without classes.
        still: beginnings of names of parameters that must not move. classes: whether there is an accuracy of classes.
    """

    name: str
    make: Callable[[], nn.Module]
    data: Callable[[], Data] = _images
    hooks: dict[str, Any] = field(default_factory=dict)
    unsearched: bool = False
    still: tuple[str, ...] = ()
    classes: bool = True

    def __str__(self) -> str:
        return self.name


ZOO = (
    Animal("lenet", LeNet),
    Animal("vgg", VGG),
    Animal("resnet", ResNet),
    Animal("vit", ViT),
    Animal("experts", Experts),
    Animal("lstm", LSTM, _sequences),
    Animal("gpt", GPT, _tokens, unsearched=True),
    Animal("frozen backbone", _frozen_backbone, still=("features",)),
    Animal("weight_norm", _weight_norm(nn.utils.parametrizations.weight_norm)),
    Animal("old weight_norm", _weight_norm(nn.utils.weight_norm)),
    Animal("old spectral_norm", _weight_norm(nn.utils.spectral_norm)),
    Animal("one logit", lambda: Headed(1), lambda: _images(2), {"loss": binary_cross_entropy}),
    Animal("one logit without a loss", lambda: Headed(1), lambda: _images(2)),
    Animal("several labels", LeNet, _labels, {"loss": each_label}, unsearched=True, classes=False),
    Animal("u-net", UNet, _maps, {"loss": each_pixel}, unsearched=True, classes=False),
    Animal("lora", lora, still=("base_model.model.patch", "base_model.model.attn.qkv.base_layer")),
)
