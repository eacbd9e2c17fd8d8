"""The models: their authors' own code, from a configuration, with random weights and small inputs.

Where the original is too large for a CPU it has fewer blocks or narrower ones; nothing else of it is changed. Every
model is trained for a few steps on samples whose class is easy to see, so that it is no stranger to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.library import load

CLASSES, SAMPLES, TOKENS, WORDS, END = 4, 16, 12, 40, 1

Given = tuple[Tensor, Tensor] | dict[str, Tensor]


@dataclass(frozen=True)
class Net:
    """A model and how it is made.

    Attributes:
        name: of the model. library: where its code is from. kind: "image", "text" or "sound".
        what: what in it is not in every other model.
        make: a new one. size: of the images.
        adapters: whether most of its parameters are frozen on purpose.
    """

    name: str
    library: str
    what: str
    make: Callable[[], nn.Module]
    kind: str = "image"
    size: int = 32
    adapters: bool = False

    def __str__(self) -> str:
        return self.name

    def data(self) -> Given:
        """Return one batch: what shows the class is a brighter square, a word, or a tone."""
        generator = torch.Generator().manual_seed(7)
        y = torch.arange(SAMPLES) % CLASSES
        if self.kind == "text":
            words = torch.randint(4 + CLASSES, WORDS, (SAMPLES, TOKENS), generator=generator)
            words[:, 1], words[:, 6], words[:, -1] = 4 + y, 4 + y, END
            words[1::2, -4:] = torch.tensor([END, 0, 0, 0])  # every second one is shorter
            return {"input_ids": words, "attention_mask": (words != 0).long(), "labels": y}
        if self.kind == "sound":
            t = torch.arange(400) / 400
            x = torch.sin(2 * math.pi * 8 * (1 + y[:, None]) * t) + 0.3 * torch.randn(SAMPLES, 400, generator=generator)
            return {"input_values": x, "labels": y}
        x = 0.3 * torch.randn(SAMPLES, 3, self.size, self.size, generator=generator)
        half = self.size // 2
        for n in range(SAMPLES):
            row, column = divmod(int(y[n]), 2)
            x[n, :, row * half : (row + 1) * half, column * half : (column + 1) * half] += 1.0
        return (x, y) if self.library == "timm" else {"pixel_values": x, "labels": y}


def trained(net: Net, steps: int = 12) -> nn.Module:
    """Return a new model after a few steps of Adam on its samples, in eval mode."""
    torch.manual_seed(0)
    model, batch = net.make().train(), net.data()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, 2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(outputs(model, batch), labels(batch)).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    for _ in range(60):  # running statistics follow the weights
        with torch.no_grad():
            model(**batch) if isinstance(batch, dict) else model(batch[0])
    with torch.no_grad():  # layers that begin as zeros or ones do something
        for p in weights:
            p.add_(torch.randn_like(p), alpha=0.01)
    return model.eval()


def outputs(model: nn.Module, batch: Given) -> Tensor:
    """Return the logits of a batch, [N, C], by hand."""
    if not model.training:  # some keep what an earlier pass computed until then
        model.train().eval()
    if isinstance(batch, dict):
        return model(**batch).logits
    out = model(batch[0])
    return (out[0] + out[1]) / 2 if isinstance(out, tuple) else out  # a distilled model in train mode


def labels(batch: Given) -> Tensor:
    """Return the labels of a batch, [N]."""
    return batch["labels"] if isinstance(batch, dict) else batch[1]


# --------------------------------------------------------------------------------------------------------------- timm


def _timm(name: str, what: str, size: int = 32, **options: Any) -> Net:
    def make() -> nn.Module:
        return load("timm").create_model(name, pretrained=False, num_classes=CLASSES, **options)

    return Net(name, "timm", what, make, size=size)


def _bit() -> nn.Module:
    module, layers = load("timm").models.resnetv2, load("timm").layers
    sizes = {"channels": (64, 128, 256, 256), "num_classes": CLASSES, "stem_chs": 32, "stem_type": "fixed"}
    norm = partial(layers.GroupNormAct, num_groups=8)
    return module.ResNetV2((1, 1, 1, 1), conv_layer=layers.StdConv2d, norm_layer=norm, **sizes)


def _norm_free() -> nn.Module:
    module = load("timm").models.nfnet
    config = replace(module.model_cfgs["nf_resnet26"], depths=(1, 1, 1, 1), channels=(64, 128, 128, 256), stem_chs=32)
    return module.NormFreeNet(config, num_classes=CLASSES)


def _coat(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = load("timm").models.maxxvit
        config = replace(module.model_cfgs[name], embed_dim=(32, 32, 64, 64), depths=(1, 1, 1, 1), stem_width=16)
        return module.MaxxVit(config, img_size=64, num_classes=CLASSES)

    return make


def _poolformer() -> nn.Module:
    module = load("timm").models.metaformer
    sizes = {"depths": (1, 1, 1, 1), "dims": (32, 48, 64, 96), "num_classes": CLASSES}
    given = {"downsample_norm": None, "mlp_act": nn.GELU, "mlp_bias": True, "norm_layers": module.GroupNorm1}
    scales = {"layer_scale_init_values": 1e-5, "res_scale_init_values": None, "use_mlp_head": False}
    return module.MetaFormer(**sizes, **given, **scales)


def _mixer(**options: Any) -> nn.Module:
    of = {"num_classes": CLASSES, "img_size": 64, "patch_size": 16, "num_blocks": 2, "embed_dim": 64, **options}
    return load("timm").models.mlp_mixer.MlpMixer(**of)


def _resmlp() -> nn.Module:
    module = load("timm").models.mlp_mixer
    return _mixer(mlp_ratio=4, block_layer=partial(module.ResBlock, init_values=0.1), norm_layer=module.Affine)


_WINDOWS = {"img_size": 64, "window_size": 4}

TIMM = (
    _timm("seresnet18", "squeeze and excitation", layers=(1, 1, 1, 1), channels=(32, 48, 64, 96)),
    _timm("regnety_002", "grouped convolutions"),
    _timm("densenet121", "concatenated features", growth_rate=8, block_config=(2, 2, 2, 2)),
    _timm("mobilenetv3_small_050", "hard-swish, depthwise"),
    _timm("efficientnet_lite0", "ReLU6, depthwise"),
    _timm("ghostnet_050", "cheap half of the features"),
    _timm("repvgg_a0", "three branches a block", 32),
    Net("nf_resnet", "timm", "weight-standardised, no norm", _norm_free),
    Net("resnetv2_bit", "timm", "weight-standardised, GroupNorm", _bit),
    _timm("convnext_atto", "layer scale, LayerNorm over channels", depths=(1, 1, 2, 1), dims=(16, 32, 48, 64)),
    _timm("convnextv2_atto", "GRN", depths=(1, 1, 2, 1), dims=(16, 32, 48, 64)),
    _timm("edgenext_xx_small", "attention over channels", 64, depths=(1, 2, 2, 2), dims=(16, 32, 48, 64)),
    _timm("vit_tiny_patch16_224", "class token", 64, img_size=64, depth=3, embed_dim=96),
    _timm("deit_tiny_distilled_patch16_224", "distillation token", 64, img_size=64, depth=3, embed_dim=96),
    _timm("cait_xxs24_224", "class attention, talking heads", 64, img_size=64, depth=2, embed_dim=96),
    _timm("xcit_nano_12_p16_224", "cross-covariance attention", 64, img_size=64, depth=2, embed_dim=64),
    _timm(
        "beit_base_patch16_224",
        "relative positions, no bias of keys",
        64,
        img_size=64,
        depth=2,
        embed_dim=96,
        num_heads=4,
    ),
    _timm(
        "swin_tiny_patch4_window7_224",
        "shifted windows",
        64,
        **_WINDOWS,
        depths=(1, 2, 1),
        embed_dim=32,
        num_heads=(1, 2, 4),
    ),
    Net("mixer", "timm", "products along the tokens", _mixer, size=64),
    Net("resmlp", "timm", "affine in place of norms", _resmlp, size=64),
    Net("poolformer", "timm", "pooling in place of attention", _poolformer, size=64),
    _timm(
        "levit_128s",
        "biases kept between passes, BatchNorm of tokens",
        64,
        img_size=64,
        embed_dim=(64, 96, 128),
        depth=(1, 2, 1),
        num_heads=(2, 3, 4),
    ),
    _timm("mobilevit_xxs", "tokens folded out of maps", 64),
    Net("coatnet", "timm", "convolution, then attention", _coat("coatnet_pico_rw"), size=64),
    Net("maxvit", "timm", "attention over blocks and grids", _coat("maxvit_rmlp_pico_rw"), size=64),
    _timm(
        "tiny_vit_5m_224",
        "windows between convolutions",
        64,
        embed_dims=(16, 32, 48, 64),
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 3, 4),
    ),
    _timm("pvt_v2_b0", "attention to fewer tokens", 64, depths=(1, 1, 1, 1), embed_dims=(16, 32, 40, 64)),
)


# ------------------------------------------------------------------------------------------------------- Hugging Face

_TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 2 * TOKENS,
    "num_labels": CLASSES,
    "pad_token_id": 0,
}


def _hf(name: str, model: str, config: str, what: str, kind: str = "image", size: int = 32, **options: Any) -> Net:
    def make() -> nn.Module:
        library = load("transformers")
        return getattr(library, model)(getattr(library, config)(**options))

    return Net(name, "transformers", what, make, kind, size)


def _text(name: str, family: str, what: str, **options: Any) -> Net:
    model = f"{family}ForSequenceClassification"
    return _hf(name, model, f"{family}Config", what, "text", **{**_TEXT, **options})


def _lora() -> nn.Module:
    peft = load("peft")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    return peft.get_peft_model(_BERT.make(), config)


_BERT = _text("bert", "Bert", "post-norm, pooler")
_SOUND = {
    "conv_dim": (16, 16),
    "conv_kernel": (8, 4),
    "conv_stride": (4, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
    "mask_time_prob": 0.0,
}
_PICTURE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}

HF = (
    _BERT,
    _text("distilbert", "DistilBert", "no token types", dim=32, hidden_dim=64, n_layers=2, n_heads=4),
    _text("roberta", "Roberta", "positions from the padding"),
    _text("albert", "Albert", "one block used several times", embedding_size=16),
    _text("electra", "Electra", "narrow embeddings", embedding_size=16),
    _text(
        "deberta", "Deberta", "attention to relative positions", relative_attention=True, pos_att_type=["p2c", "c2p"]
    ),
    _text("gpt2", "GPT2", "weights stored input first", n_embd=32, n_layer=2, n_head=4, n_positions=24),
    _text("llama", "Llama", "rotary positions, gated, RMSNorm", num_key_value_heads=2),
    _text("mixtral", "Mixtral", "experts", num_key_value_heads=2, num_local_experts=3),
    _text(
        "t5",
        "T5",
        "encoder and decoder",
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        eos_token_id=END,
        decoder_start_token_id=0,
    ),
    _hf(
        "vit",
        "ViTForImageClassification",
        "ViTConfig",
        "class token",
        image_size=32,
        patch_size=8,
        num_labels=CLASSES,
        **_PICTURE,
    ),
    _hf(
        "swin",
        "SwinForImageClassification",
        "SwinConfig",
        "shifted windows",
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[1, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=CLASSES,
    ),
    _hf(
        "convnext",
        "ConvNextForImageClassification",
        "ConvNextConfig",
        "layer scale",
        hidden_sizes=[16, 32],
        depths=[1, 2],
        num_stages=2,
        num_labels=CLASSES,
    ),
    _hf(
        "clip",
        "CLIPForImageClassification",
        "CLIPConfig",
        "CLIP's vision tower",
        vision_config={
            "image_size": 32,
            "patch_size": 8,
            **_PICTURE,
        },
        num_labels=CLASSES,
    ),
    _hf(
        "wav2vec2",
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        "sound; weight norm",
        "sound",
        num_labels=CLASSES,
        **_PICTURE,
        **_SOUND,
    ),
    Net("bert with LoRA", "peft", "adapters on a frozen base", _lora, "text", adapters=True),
)

NETS = (*TIMM, *HF)
