"""The picture of the attacks: which images stand beside each other, and what is said of their difference."""

from __future__ import annotations

import pytest
import torch

from benchmarks import harness
from benchmarks.suite import networks, pictures
from fastfip import attacks
from fastfip.attacks.badnets import BadNets
from fastfip.data.scaling import Pixels
from fastfip.metrics import Evaluation


def images(n=3):
    return (255 * torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))).round() / 255


@pytest.mark.parametrize("change, factor", [(0.9, 1), (0.3, 1), (0.2, 2), (0.09, 5), (0.03, 10), (0.004, 50)])
def test_a_difference_is_enlarged_as_far_as_it_can_be_told_apart(change, factor):
    x = torch.full((3, 3, 4, 4), 0.05)
    shown = x.clone()
    shown[0, 0, 0, 0] += change
    one = pictures.Drawn("a", x, shown)
    assert one.factor() == factor
    expected = torch.full_like(x, 0.5)
    expected[0, 0, 0, 0] = min(0.5 + factor * change, 1)
    assert torch.allclose(one.difference(), expected, atol=1e-5)


@pytest.mark.parametrize("pixels", [Pixels(), Pixels((0.5,), (0.5,)), Pixels((0.4, 0.5, 0.6), (0.1, 0.2, 0.3))])
def test_inputs_become_images_again(pixels):
    assert torch.allclose(pictures.in_pixels(pixels, pixels.normalise(images())), images(), atol=1e-6)


def cached(network, order):
    """What the cache would have of a network: 60 test images, and those that are not of class 2, with a patch."""
    base = networks.BASES[network.base]
    x, y = images(60), torch.arange(60) % 10
    triggered, wanted, true = BadNets().asr_set(x, y, 2)
    triggered, true = triggered[order(len(true))], true[order(len(true))]
    return networks.Prepared(
        network, base, torch.nn.Flatten(), (base.pixels.normalise(x), y),
        [(base.pixels.normalise(triggered), wanted, true)], [], None, 0.0, Evaluation(), [],
    )  # fmt: skip


def test_kept_images_stand_beside_those_that_they_were_made_of(monkeypatch):
    network = networks.NETWORKS["resnet20-trojannet"]
    monkeypatch.setattr(pictures, "prepare", lambda network: cached(network, torch.arange))
    one = pictures.of_network(network)
    assert one.name == "trojannet" and torch.allclose(one.clean, images(60)[list(pictures.SHOWN)], atol=1e-6)
    assert torch.allclose(one.triggered, BadNets().trigger(one.clean), atol=1e-6)
    monkeypatch.setattr(pictures, "prepare", lambda network: cached(network, lambda n: torch.arange(n).flip(0)))
    with pytest.raises(ValueError, match="not those of its test set"):
        pictures.of_network(network)


def test_every_attack_on_images_is_drawn_or_named(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("FASTFIP_CACHE", str(tmp_path))
    monkeypatch.setattr(pictures, "photographs", images)
    monkeypatch.setattr(pictures.real_data, "require", lambda: None)
    monkeypatch.setattr(pictures, "FILE", tmp_path / "pictures" / "attacks.png")
    monkeypatch.setattr(pictures, "prepare", lambda network: cached(network, torch.arange))
    monkeypatch.setattr("sys.argv", ["pictures"])
    network = networks.NETWORKS["resnet20-trojannet"]
    (harness.cache_dir() / "suite").mkdir()
    (harness.cache_dir() / "suite" / f"{network.key()}.pth").touch()
    found, absent = pictures.rows()
    drawn = [one.name for one in found]
    assert {"badnets", "wanet", "trojannet"} <= set(drawn) and "issba" in absent
    own = [kind for kind in map(attacks.get, attacks.names()) if kind.__module__.startswith("fastfip.")]
    assert sorted([*drawn, *absent]) == sorted(kind.name for kind in own if kind.modality == "images")
    pictures.main()
    assert pictures.FILE.read_bytes().startswith(b"\x89PNG")
    assert "issba" in capsys.readouterr().out.splitlines()[1]
