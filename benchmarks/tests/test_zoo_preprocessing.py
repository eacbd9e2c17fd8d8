"""What timm, torchvision and transformers make of a picture themselves: `make zoo` runs it where they are installed."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.zoo.library import load
from fastfip.checkpoint import load_arch
from fastfip.checkpoint.preprocessing import own_pixels
from fastfip.cli import main
from fastfip.data.images import load as load_images

pytestmark = pytest.mark.filterwarnings("ignore")


def library(*names):
    """The libraries, imported as the zoo imports them; the test is passed over where one is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: make zoo installs it")
    return [load(name) for name in names][-1]


@pytest.fixture
def picture(tmp_path):
    """A folder with one picture that is neither square nor smooth, and the picture."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:300, :400]
    x = 127 + 80 * np.sin(rows / 9 + columns / 17)[..., None] + rng.normal(0, 20, (300, 400, 3))
    (tmp_path / "images" / "0").mkdir(parents=True)
    Image.fromarray(x.clip(0, 255).astype(np.uint8)).save(tmp_path / "images" / "0" / "a.png")
    return tmp_path / "images", Image.open(tmp_path / "images" / "0" / "a.png").convert("RGB")


def ours(spec, folder, model=None):
    model = load_arch(spec) if model is None else model
    return load_images(folder, pixels=own_pixels(spec, model)).batch([0])[0][0]


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_224", "convnext_atto", "efficientnet_lite0", "resnet18", "efficientnet_b1_pruned"]
)
def test_images_are_those_of_timms_own_transforms(picture, name):
    timm = library("torchvision", "timm")
    folder, image = picture
    model = timm.create_model(name, pretrained=False)
    config = timm.data.resolve_data_config({}, model=model)
    torch.testing.assert_close(ours(f"timm:{name}", folder, model), timm.data.create_transform(**config)(image))


def test_every_model_of_timm_says_something_that_is_understood_or_is_one_line():
    timm = library("torchvision", "timm")
    from fastfip.errors import ConfigError

    refused = {}
    for name in timm.list_models():
        model = torch.nn.Identity()
        config = timm.get_pretrained_cfg(name)
        model.pretrained_cfg = None if config is None else config.to_dict()
        try:
            own_pixels(f"timm:{name}", model)
        except ConfigError as error:
            refused[name] = str(error)
    assert len(refused) < 10 and all("give --size" in text for text in refused.values()), refused


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "swin_t", "efficientnet_b0", "regnet_y_400mf"])
def test_images_are_those_of_the_transforms_of_torchvisions_weights(picture, name):
    library("torchvision")
    models = load("torchvision.models")
    folder, image = picture
    want = models.get_model_weights(name).DEFAULT.transforms()(image)
    torch.testing.assert_close(ours(f"torchvision:{name}", folder, torch.nn.Identity()), want)


def test_every_classifier_of_torchvision_says_something_that_is_understood():
    library("torchvision")
    models = load("torchvision.models")
    names = models.list_models(module=models)
    assert len(names) > 50
    unknown = [name for name in names if own_pixels(f"torchvision:{name}", torch.nn.Identity()) is None]
    assert unknown == []


@pytest.mark.parametrize("kind", ["ViT", "CLIP", "ConvNext", "DeiT"])
def test_images_are_those_of_the_processors_of_transformers(picture, kind, tmp_path):
    transformers = library("torchvision", "transformers")
    folder, image = picture
    processor = getattr(transformers, f"{kind}ImageProcessor")()
    processor.save_pretrained(tmp_path / "model")
    want = torch.as_tensor(np.asarray(processor(image, return_tensors="pt")["pixel_values"]))[0]
    got = ours(f"hf:{tmp_path / 'model'}", folder, torch.nn.Identity())
    assert got.shape == want.shape
    # Theirs may resize tensors where ours has pillow do it: a few grey levels at edges, and much less on average.
    assert float((got - want).abs().mean()) < 0.01 and float((got - want).abs().max()) < 0.15


def test_a_command_with_a_model_of_each_library_needs_no_options_for_images(picture, tmp_path, capsys, monkeypatch):
    timm, transformers = library("torchvision", "timm"), library("transformers")
    monkeypatch.chdir(tmp_path)
    folder, _ = picture
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32, patch_size=8
    ))  # fmt: skip
    vit.save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    models = {"timm:efficientnet_lite0": timm.create_model("efficientnet_lite0"), "hf:vit": vit}
    models["torchvision:mobilenet_v3_small"] = load("torchvision.models").mobilenet_v3_small()
    for spec, model in models.items():
        torch.save(model.state_dict(), "in.pth")
        assert main(["evaluate", "in.pth", "--arch", spec, "--test-data", str(folder), "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["images"]["of"] == spec and figures["images"]["size"] == (
            [32, 32] if "hf" in spec else [224, 224]
        )
