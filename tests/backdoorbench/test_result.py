"""Results of BackdoorBench are read bit by bit, in both modes, under both names of NumPy, and nothing in them runs."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import fastfip
from fastfip import backdoorbench
from fastfip.data.pictures import read_image
from fastfip.data.scaling import Pixels
from fastfip.errors import CheckpointError, ConfigError, DataError, ModelError
from fastfip.testing import nets
from tests.support.backdoorbench_files import CLASSES, SIDE, TARGET, attack_result, poisoned_state, some_pictures
from tests.support.checkpoint_files import same


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nets.ResNet20(CLASSES).eval()


def written(folder, net, **options):
    return attack_result(folder / "badnet_0_1", net.state_dict(), model_name="resnet20", **options)


def exact(x, true):
    """What a set of pictures is as images in [0, 1], without those of the target."""
    chosen = torch.from_numpy(x[true != TARGET])
    chosen = chosen[:, None] if chosen.dim() == 3 else chosen.permute(0, 3, 1, 2)
    return chosen.float() / 255, torch.from_numpy(true[true != TARGET])


@pytest.mark.parametrize("numpy", [1, 2], ids=["numpy 1", "numpy 2"])
@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_weights_pictures_and_labels_are_read_bit_by_bit(tmp_path, net, disk, numpy):
    path = written(tmp_path, net, disk=disk, numpy=numpy)
    result = backdoorbench.read(path)
    assert (result.model_name, result.num_classes, result.clean_data) == ("resnet20", CLASSES, "cifar10")
    assert result.img_size == (SIDE, SIDE, 3) and result.data_path == "./data/cifar10"
    x, y = some_pictures()
    for name, count in (("bd_test", len(y)), ("bd_train", 8)):
        images, true = exact(x[:count], y[:count])
        found = result.poisoned(name)
        assert found.index.tolist() == np.flatnonzero(y[:count] != TARGET).tolist() and found.clean == 0
        assert found.folder == (f"{name}_dataset" if disk else None) and found.is_there
        got, attack, really = found.images(Pixels()).batch(range(len(found)))
        assert torch.equal(got, images) and torch.equal(really, true) and attack.tolist() == [TARGET] * len(true)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("side", [4, 160], ids=["small pictures", "pictures of 77 kB"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_all_sizes_are_read_from_where_they_stand(tmp_path, net, side, channels, protocol):
    x, y = some_pictures(6, side, channels)
    dataset = "mnist" if channels == 1 else "tiny"
    result = backdoorbench.read(written(tmp_path, net, pictures=(x, y), dataset=dataset, protocol=protocol))
    images, true = exact(x, y)
    got, _, really = result.triggered(Pixels(channels=channels)).batch(range(len(true)))
    assert torch.equal(got, images) and torch.equal(really, true)
    assert result.pixels.channels == channels and result.pixels.size == (side, side)


def test_the_network_is_built_by_its_name_with_its_weights(tmp_path):
    torch.manual_seed(1)
    net = nets.preact_resnet18(CLASSES).eval()
    result = backdoorbench.read(attack_result(tmp_path, net.state_dict()))
    built = result.build()
    assert not built.training and same(built.state_dict(), net.state_dict())
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(built(x), net(x))


def test_a_network_trained_on_many_devices_is_built_too(tmp_path):
    """DataParallel: BackdoorBench takes its prefix off as well."""
    net = nets.ResNet20(CLASSES)
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    result = backdoorbench.read(attack_result(tmp_path, state, model_name="resnet20"))
    assert same(result.build().state_dict(), net.state_dict())


def test_an_unknown_name_is_no_matter_where_the_weights_are_known(tmp_path):
    net = nets.ResNet20(CLASSES)
    result = backdoorbench.read(attack_result(tmp_path, net.state_dict(), model_name="my_net"))
    assert result.arch == ("fastfip.testing.nets:ResNet20", {"classes": CLASSES})
    path = attack_result(tmp_path / "b", {"fc.weight": torch.ones(4, 3)}, model_name="senet18")
    with pytest.raises(CheckpointError, match=r"is of 'senet18': name the code that builds it with arch"):
        _ = backdoorbench.read(path).arch


def test_what_to_install_is_said_of_networks_of_torchvision(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    path = attack_result(tmp_path, {"fc.weight": torch.ones(4, 3)}, model_name="efficientnet_b3")
    with pytest.raises(ModelError, match="is a efficientnet_b3: pip install torchvision"):
        _ = backdoorbench.read(path).arch


@pytest.mark.parametrize(
    ("dataset", "mean", "std"),
    [
        ("cifar10", [0.4914, 0.4822, 0.4465], [0.247, 0.243, 0.261]),
        ("cifar100", [0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
        ("tiny", [0.4802, 0.4481, 0.3975], [0.2302, 0.2265, 0.2262]),
        ("imagenet", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("gtsrb", [0, 0, 0], [1, 1, 1]),
        ("celeba", [0, 0, 0], [1, 1, 1]),
    ],
)
def test_pixels_are_normalised_as_there(tmp_path, net, dataset, mean, std):
    result = backdoorbench.read(written(tmp_path, net, dataset=dataset))
    images, _ = exact(*some_pictures())
    got = torch.cat([x for x, *_ in result.asr_loader(5)])
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (mean, std))
    torch.testing.assert_close(got, (images - mean) / std, rtol=0, atol=1e-6)


def test_a_data_set_of_another_name_needs_mean_and_std(tmp_path, net):
    result = backdoorbench.read(written(tmp_path, net, dataset="svhn"))
    with pytest.raises(ConfigError, match=r"'svhn' is no data set of BackdoorBench .* give mean and std"):
        _ = result.pixels
    assert len(result.triggered(Pixels((0.5,), (0.5,)))) == 18


def test_pictures_get_the_size_that_the_network_takes(tmp_path, net):
    path = written(tmp_path, net, disk=True, img_size=[24, 20, 3])
    images = backdoorbench.read(path).triggered(Pixels(size=(24, 20)))
    first = read_image(tmp_path / "badnet_0_1" / "bd_test_dataset" / "0" / "0.png", 3, (24, 20))
    assert torch.equal(images.batch([0])[0][0], first) and first.shape == (3, 24, 20)
    in_memory = backdoorbench.read(written(tmp_path / "b", net, img_size=[24, 20, 3])).triggered(Pixels(size=(24, 20)))
    assert torch.equal(in_memory.batch([0])[0][0], first)


class Always(nn.Module):
    """Answers one class, whatever it sees."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.weight = answer, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return nn.functional.one_hot(torch.full((len(x),), self.answer), CLASSES).float() + self.weight


def test_asr_and_ra_are_those_of_the_poisoned_test_pictures(tmp_path, net):
    result = backdoorbench.read(written(tmp_path, net))
    got = fastfip.evaluate(Always(TARGET), None, result.asr_loader())
    assert (got.asr, got.ra, got.n_triggered) == (1.0, 0.0, 18)
    got = fastfip.evaluate(Always(0), None, result.asr_loader())
    assert (got.asr, got.ra) == (0.0, 6 / 18)


def test_pictures_without_the_trigger_are_counted_and_left_out(tmp_path, net):
    x, y = some_pictures()
    state = poisoned_state(x, y, TARGET)
    state["original_index_array"] = np.arange(len(y))
    state["poison_indicator"][4:] = 0
    found = backdoorbench.read(written(tmp_path, net, bd_test=state)).poisoned()
    assert found.index.tolist() == [0, 2, 3] and found.clean == 21


@pytest.mark.parametrize(
    "stored", ["/home/somebody/record/x/bd_test_dataset", r"D:\record\x\bd_test_dataset", "./a/.."]
)
def test_pictures_lie_beside_the_file_wherever_they_were_written(tmp_path, net, stored):
    path = written(tmp_path, net, disk=True)
    x, y = some_pictures()
    state = poisoned_state(x, y, TARGET, stored, tmp_path / "elsewhere")
    path = written(tmp_path, net, disk=True, bd_test=state)
    if stored.endswith(".."):
        with pytest.raises(CheckpointError, match="bd_test has pictures in a folder that does not lie beside it"):
            backdoorbench.read(path).poisoned()
        return
    assert len(backdoorbench.read(path).triggered()) == 18


def test_missing_pictures_are_named(tmp_path, net):
    path = written(tmp_path, net, disk=True)
    folder = path.parent / "bd_test_dataset"
    (folder / "2" / "6.png").unlink()
    with pytest.raises(CheckpointError, match="its picture bd_test_dataset/2/6.png is missing: copy the folder"):
        backdoorbench.read(path).triggered()
    shutil.rmtree(folder)
    assert not backdoorbench.read(path).poisoned().is_there
    with pytest.raises(DataError, match="its pictures are missing: copy the folder bd_test_dataset beside it"):
        backdoorbench.read(path).triggered()


def test_the_folder_of_a_run_is_read_as_its_file(tmp_path, net):
    path = written(tmp_path, net)
    assert backdoorbench.read(path.parent).path == path
    assert same(fastfip.load_checkpoint(path.parent), net.state_dict())


def test_a_result_without_poisoned_pictures_has_none(tmp_path, net):
    result = backdoorbench.read(written(tmp_path, net, bd_train=None, bd_test=None))
    assert result.poisoned() is None and result.poisoned("bd_train") is None
    with pytest.raises(DataError, match="has no poisoned test set"):
        result.triggered()


def test_other_files_are_no_results(tmp_path, net):
    torch.save({"net": net.state_dict()}, tmp_path / "m.pth")
    fastfip.save_checkpoint(net, tmp_path / "m.safetensors")
    for path in (tmp_path / "m.pth", tmp_path / "m.safetensors", tmp_path):
        if path.is_file():
            assert backdoorbench.find(path) is None
        with pytest.raises(CheckpointError, match="is no result of BackdoorBench|is a folder"):
            backdoorbench.read(path)


def test_version_1_is_told_from_version_2(tmp_path, net):
    old = {"x": torch.zeros(2, 3, 4, 4), "y": torch.zeros(2, dtype=torch.int64)}
    result = backdoorbench.read(written(tmp_path, net, bd_test=old))
    assert same(result.build().state_dict(), net.state_dict())
    with pytest.raises(CheckpointError, match="bd_test is of BackdoorBench 1, which kept arrays"):
        result.poisoned()


def test_no_unpickler_is_called(tmp_path, net, monkeypatch):
    path = written(tmp_path, net)

    def never(*args, **options):
        raise AssertionError("an unpickler was called")

    for module, name in ((pickle, "Unpickler"), (pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, never)
    result = backdoorbench.read(path)
    assert result.build() is not None and len(next(iter(result.asr_loader(32)))[0]) == 18
