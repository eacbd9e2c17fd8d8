"""Every file that load_checkpoint refuses: one clear line, nothing run, nothing loaded."""

import io
import json
import os
import pickle
import random
import struct
import time
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from checkpoint_files import Call, Name, encode, pickled, small_state, tensor, torch_bytes, write_legacy, write_zip
from torch import nn

from fastfip.checkpoint import load_checkpoint
from fastfip.errors import CheckpointError, FastFIPError, ModelError


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.fc = nn.Linear(4, classes)
        self.bn = nn.BatchNorm1d(classes, affine=False)
        del self.bn.running_mean, self.bn.running_var


def bare():
    net = Net()
    assert list(net.state_dict()) == list(small_state())
    return net


def refused(path, match, model=None, **kwargs):
    """The file is refused with one line that names it and matches; a model is left as it was."""
    model = bare() if model is None else model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for net in (None, model):
        if net is None and "model" in match:
            continue
        with pytest.raises(CheckpointError, match=match) as caught:
            load_checkpoint(path, net, **kwargs)
        text = str(caught.value)
        assert text.startswith(str(path)) and "\n" not in text and len(text) < 700
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def save(value, path, **kwargs):
    torch.save(value, path, **kwargs)
    return path


# ---------------------------------------------------------------- code


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_pickled_module(tmp_path, legacy, inside):
    value = {"state_dict": small_state(), "net": nn.Linear(4, 3)} if inside else nn.Linear(4, 3)
    path = save(value, tmp_path / "m.pth", _use_new_zipfile_serialization=not legacy)
    refused(path, r"pickled module \(torch\.nn\.modules\.\w+\.\w+\).*state_dict")


def test_pickled_module_of_the_users_own(tmp_path):
    refused(save(Net(), tmp_path / "m.pth"), r"pickled module \(.*Net\)|pickled module \(torch\.nn")


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_pickled_module_of_another_protocol(tmp_path, protocol):
    refused(save(Net(), tmp_path / "m.pth", pickle_protocol=protocol), "pickled module")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_pickle_that_runs_something(tmp_path, legacy, inside):
    trace = tmp_path / "ran"
    value = {"state_dict": small_state(), "x": Runs(str(trace))} if inside else Runs(str(trace))
    path = save(value, tmp_path / "m.pth", _use_new_zipfile_serialization=not legacy)
    refused(path, r"unsafe pickle: loading it would call (posix|nt)\.mkdir")
    assert not trace.exists()


def test_plain_pickle_that_runs_something(tmp_path):
    path = tmp_path / "m.pkl"
    path.write_bytes(pickle.dumps(Runs(str(tmp_path / "ran"))))
    refused(path, "unsafe pickle")
    assert not (tmp_path / "ran").exists()
    pickle.loads(path.read_bytes())  # what it would have done
    assert (tmp_path / "ran").exists()


def test_safe_globals_of_the_process_do_not_count(tmp_path):
    with torch.serialization.safe_globals([os.mkdir]):
        refused(save(Runs(str(tmp_path / "ran")), tmp_path / "m.pth"), "unsafe pickle")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (Name("builtins", "eval"), ("1",)),
        (Name("builtins", "bytearray"), (10**12,)),
        (Name("torch", "FloatTensor"), (10**12,)),
        (Name("_codecs", "encode"), ("x", "rot13")),
        (Name("torch", "load"), ("x",)),
        (Name("argparse", "Namespace"), ()),
        (Name("numpy", "dtype"), ("O8", False, True)),
    ],
)
def test_calls_that_no_checkpoint_needs(tmp_path, function, args):
    write_zip(tmp_path / "m.pth", {"state_dict": {"w": tensor()}, "x": Call(function, args)})
    refused(tmp_path / "m.pth", rf"unsafe pickle: loading it would call {function.module}\.{function.name}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(tmp_path):
    path = tmp_path / "m.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(4, 3), torch.zeros(1, 4)), path)
    refused(path, "TorchScript")


def test_attributes_that_replace_what_a_tensor_is_built_of(tmp_path):
    """BUILD on a tensor calls its __setstate__, which may point it at another storage."""
    parameter = Call(
        Name("torch._utils", "_rebuild_parameter"), (tensor(), True, Call(Name("collections", "OrderedDict")))
    )
    parameter.state = (tensor((10**6,)), 0, (10**6,), (1,))
    write_zip(tmp_path / "m.pth", {"w": parameter})
    refused(tmp_path / "m.pth", "claims|takes none")


# ---------------------------------------------------------------- the zip


def test_a_sound_zip_of_the_helper_is_read(tmp_path):
    """The other zips here differ from this one in one thing."""
    write_zip(tmp_path / "m.pth", {"w": tensor((2, 2), (2, 1))})
    assert load_checkpoint(tmp_path / "m.pth")["w"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/data/0"])
def test_compressed_entries(tmp_path, name):
    write_zip(tmp_path / "m.pth", {"w": tensor((2**20,), numel=2**20)}, {"0": bytes(2**22)}, compress=(name,))
    refused(tmp_path / "m.pth", f"entry {name} is compressed")


def test_entries_that_expand_beyond_the_file(tmp_path):
    path = tmp_path / "m.pth"
    write_zip(path, {"w": tensor()})
    data = bytearray(path.read_bytes())
    place = data.rindex(b"archive/data/0") - 46  # in the central directory
    assert data[place : place + 4] == b"PK\x01\x02"
    data[place + 24 : place + 28] = struct.pack("<L", 2**31)
    path.write_bytes(data)
    refused(path, "archive/data/0 claims to expand from 16 to 2147483648")


def test_entries_that_share_their_bytes(tmp_path):
    path = tmp_path / "m.pth"
    write_zip(path, {"w": tensor(), "v": tensor(key="1")}, {"0": bytes(16), "1": bytes(16)})
    data = bytearray(path.read_bytes())
    first, second = (data.rindex(f"archive/data/{i}".encode()) - 46 for i in (0, 1))
    data[second + 42 : second + 46] = data[first + 42 : first + 46]  # where its local header is
    path.write_bytes(data)
    refused(path, "overlaps")


def test_local_header_that_differs_from_the_directory(tmp_path):
    path = tmp_path / "m.pth"
    write_zip(path, {"w": tensor()})
    good = path.read_bytes()
    place = good.index(b"archive/data/0") - 30
    for offset, value in ((8, b"\x08\x00"), (22, struct.pack("<L", 99)), (30, b"b")):
        data = bytearray(good)
        data[place + offset : place + offset + len(value)] = value
        path.write_bytes(data)
        refused(path, "two headers that differ")


@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/DATA/0", "archive/Data.pkl"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_entries_of_one_name(tmp_path, name):
    with open(tmp_path / "m.pth", "wb") as file:
        write_zip(file, {"w": tensor()})
    with zipfile.ZipFile(tmp_path / "m.pth", "a") as archive:
        archive.writestr(name, pickled(3))
    refused(tmp_path / "m.pth", "two entries of one name")


def test_entries_outside_the_folder(tmp_path):
    write_zip(tmp_path / "m.pth", {"w": tensor()}, extra={"other/data/1": b""})
    refused(tmp_path / "m.pth", "entries outside archive/")


def test_bytes_after_the_zip_or_a_comment(tmp_path):
    path = tmp_path / "m.pth"
    write_zip(path, {"w": tensor()})
    good = path.read_bytes()
    path.write_bytes(good + b"x")
    refused(path, "does not end as a zip")
    path.write_bytes(good[:-2] + b"\x01\x00x")
    refused(path, "does not end as a zip")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.8, 0.99])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated(tmp_path, kind, keep):
    from safetensors.torch import save as safetensors_bytes

    state = {f"w{i}": torch.randn(50) for i in range(10)}
    data = safetensors_bytes(state) if kind == "safetensors" else torch_bytes(state, legacy=kind == "legacy")
    path = tmp_path / "m.bin"
    path.write_bytes(data[: int(len(data) * keep)])
    refused(path, "truncated|is empty|claims")


def test_zips_that_are_something_else(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    refused(tmp_path / "a.npz", "NumPy archive")
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
        archive.writestr("model/weights.bin", "x")
    refused(tmp_path / "b.pth", "none of torch.save")


# ---------------------------------------------------------------- what tensors claim


@pytest.mark.parametrize("writer", [write_zip, write_legacy])
@pytest.mark.parametrize(
    ("claim", "match"),
    [
        ({"size": (1000,)}, r"net\.w claims 1000 values \[1000\] and stores 4"),
        ({"size": (4,), "offset": 1}, r"claims 4 values \[4\] and stores 3"),
        ({"size": (2, 2), "stride": (3, 1)}, "claims 4 values"),
        ({"size": (3, 2), "stride": (1, 1)}, "claims 6 values"),
        ({"size": (1000,), "stride": (0,)}, "claims 1000 values .*expanded"),
        ({"size": (2**40,), "stride": (1,)}, "claims 1099511627776 values"),
        ({"size": (2,), "offset": -1}, "has the size"),
        ({"size": (-2,)}, "has the size"),
        ({"size": (2, 2), "stride": (1,)}, "has the size"),
    ],
)
def test_tensors_that_claim_more_than_they_store(tmp_path, writer, claim, match):
    writer(tmp_path / "m.pth", {"net": {"w": tensor(legacy=writer is write_legacy, **claim)}})
    refused(tmp_path / "m.pth", match)


@pytest.mark.parametrize("numel", [5, 2**20, 2**40, 3])
def test_storages_that_claim_more_than_the_file_holds(tmp_path, numel):
    write_zip(tmp_path / "m.pth", {"net": {"w": tensor((3,), numel=numel)}})
    refused(tmp_path / "m.pth", rf"claims {4 * numel} bytes for net\.w and stores 16")
    write_legacy(tmp_path / "m.pth", {"net": {"w": tensor((3,), numel=numel, legacy=True)}})
    refused(tmp_path / "m.pth", rf"claims {numel} values for net\.w and stores 4")
    write_legacy(tmp_path / "m.pth", {"net": {"w": tensor((3,), numel=numel, legacy=True)}}, numel=numel)
    if numel > 4:
        refused(tmp_path / "m.pth", r"truncated: .*net\.w")


def test_storage_that_is_missing(tmp_path):
    write_zip(tmp_path / "m.pth", {"w": tensor()}, storages={})
    refused(tmp_path / "m.pth", "claims 16 bytes for w and stores 0")
    write_legacy(tmp_path / "m.pth", {"w": tensor(legacy=True)}, storages={})
    refused(tmp_path / "m.pth", "not those that its tensors need")


def test_storage_described_twice(tmp_path):
    double = tensor((2,), numel=2, kind=Name("torch", "DoubleStorage"))
    write_zip(tmp_path / "m.pth", {"w": tensor(), "v": double})
    refused(tmp_path / "m.pth", "storage 0 twice")


def test_view_storages_of_old_files(tmp_path):
    def view(start, length):
        ident = ("storage", Name("torch", "FloatStorage"), "0", "cpu", 4, ("1", start, length))
        call = tensor((length,), legacy=True)
        call.args[0].ident = ident
        return call

    write_legacy(tmp_path / "m.pth", {"w": view(1, 2)})
    assert load_checkpoint(tmp_path / "m.pth")["w"].tolist() == [2, 3]
    write_legacy(tmp_path / "m.pth", {"w": view(3, 2)})
    refused(tmp_path / "m.pth", "claims values 3 to 5 of a storage of 4")


def test_tensor_saved_expanded(tmp_path):
    path = save({"net": {"w": torch.ones(1, 3), "big": torch.ones(1).expand(1000)}}, tmp_path / "m.pth")
    refused(path, r"net\.big claims 1000 values.*contiguous")


def test_size_one_with_stride_zero_is_sound(tmp_path):
    value = torch.arange(3.0).as_strided((1, 3), (0, 1))
    assert load_checkpoint(save({"w": value}, tmp_path / "m.pth"))["w"].tolist() == [[0, 1, 2]]


def quantised():
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: torch.eye(3).to_sparse(), r"net\.w is sparse"),
        (lambda: torch.eye(3).to_sparse_csr(), r"net\.w is sparse"),
        (quantised, r"net\.w is quantised"),
        (lambda: torch.empty(3, device="meta"), r"net\.w is a meta tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_kinds(tmp_path, make, match, legacy):
    path = save(
        {"net": {"v": torch.ones(2), "w": make()}}, tmp_path / "m.pth", _use_new_zipfile_serialization=not legacy
    )
    refused(path, match)


def test_meta_by_its_location(tmp_path):
    write_zip(tmp_path / "m.pth", {"w": tensor(location="meta")})
    refused(tmp_path / "m.pth", "w is a meta tensor")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_that_are_not_finite(tmp_path, value, dtype, suffix):
    from safetensors.torch import save_file

    state = small_state()
    state["fc.weight"][1, 2] = value
    state["fc.weight"] = state["fc.weight"].to(dtype)
    path = tmp_path / f"m{suffix}"
    if suffix == ".pth":
        torch.save({"net": state}, path)
    else:
        save_file(state, path)
    refused(path, rf"fc\.weight holds {'NaN' if value != value else 'Inf'} \(1 of 12")


# ---------------------------------------------------------------- what is no checkpoint


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (5, "holds an int, not a state dict"),
        ([torch.ones(2)], "holds a list"),
        (torch.ones(2), "a single tensor"),
        (None, "nothing"),
        ("text", "a str"),
        ({}, "empty"),
        ({"a": 1, "b": "c"}, "no state dict; its entries are a, b"),
        (
            {"state": {0: {"m": torch.ones(2)}}, "param_groups": []},
            "no state dict; its entries are state, param_groups",
        ),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_that_are_no_checkpoints(tmp_path, value, match, legacy):
    refused(save(value, tmp_path / "m.pth", _use_new_zipfile_serialization=not legacy), match)


def test_plain_pickles(tmp_path):
    path = tmp_path / "m.pkl"
    for value, match in ((5, "an int"), ([1], "a list"), (small_state(), "torch.save did not write")):
        path.write_bytes(pickle.dumps(value))
        refused(path, match)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"\0\0\0", "no checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "HTML"),
        (b"\n  <html>", "HTML"),
        (b'{"weight_map": {}}', "JSON"),
        (b"hello\n", "is a text file"),
        (b"\x1f\x8b\x08" + bytes(50), "gzip: unpack"),
        (b"BZh9" + bytes(50), "bzip2"),
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
        (bytes(257) + b"ustar" + bytes(300), "tar archive"),
        (b"PK\x03\x04", "truncated"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_of_other_kinds(tmp_path, content, match, suffix):
    path = tmp_path / f"m{suffix}"
    path.write_bytes(content)
    if suffix == ".safetensors" and match == "no checkpoint":
        match = "safetensors"
    refused(path, match)


def test_paths(tmp_path):
    refused(tmp_path / "none.pth", "does not exist")
    refused(tmp_path, "is a folder")
    (tmp_path / "m.safetensors").touch()
    refused(tmp_path, r"is a folder: give the file itself, e\.g\. m\.safetensors")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a plain file")


def header(entries, data=b"", length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (header({"w": F32}, bytes(8), length=10**6), "header claims 1000000 bytes"),
        (header({"w": F32}, bytes(8), length=2**63), "header claims"),
        (header({"w": F32}, bytes(4)), "truncated or damaged: w lies at bytes 0 to 8 of 4"),
        (header({"w": {**F32, "shape": [1000]}}, bytes(8)), r"w claims F32 \[1000\] and stores 8 bytes"),
        (header({"w": {**F32, "shape": [-2]}}, bytes(8)), "damaged"),
        (header({"w": {**F32, "data_offsets": [8, 0]}}, bytes(8)), "damaged"),
        (header({"w": F32, "v": F32}, bytes(8)), "overlaps"),
        (header({"w": {**F32, "dtype": "Q4"}}, bytes(8)), "unknown dtype"),
        (header({"w": {"dtype": "F32"}}, bytes(8)), "damaged entry for w"),
        (header({"w": [1]}, bytes(8)), "damaged entry for w"),
        (header(b'{"w": 1, "w": 2}'), "a name occurs twice"),
        (header(b"[1, 2, 3]"), "no JSON object"),
        (header(b'{"w": ' + b"[" * 50_000), "header"),
        (header({"w": F32}, bytes(16)), "cannot read it|damaged"),
    ],
)
def test_bad_safetensors(tmp_path, content, match):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    refused(path, match)


# ---------------------------------------------------------------- what does not fit


def test_missing_and_unknown_names_are_named_on_both_sides(tmp_path):
    state = small_state()
    state["fc.wieght"] = state.pop("fc.weight")
    path = save(state, tmp_path / "m.pth")
    missing = r"1 missing in the file: fc\.weight \(there: fc\.wieght\)"
    refused(path, rf"does not fit the model; {missing}; 1 unknown to the model: fc\.wieght")
    net = bare()
    loaded = load_checkpoint(path, net, strict=False)
    assert set(loaded) == {"fc.bias", "bn.num_batches_tracked"}
    assert torch.equal(net.fc.bias, state["fc.bias"])


def test_nothing_in_common_is_refused_also_when_not_strict(tmp_path):
    refused(save({"other": torch.ones(2)}, tmp_path / "m.pth"), "does not fit the model", strict=False)


@pytest.mark.parametrize("strict", [True, False])
def test_wrong_shapes(tmp_path, strict):
    path = save({"state_dict": small_state()}, tmp_path / "m.pth")
    refused(path, r"fc\.weight is \[3, 4\] in the file and \[5, 4\] in the model", Net(5), strict=strict)


def test_wrong_kinds_of_numbers(tmp_path):
    state = small_state()
    state["fc.weight"] = torch.ones(3, 4, dtype=torch.int8)
    refused(save(state, tmp_path / "m.pth"), r"fc\.weight is int8 in the file and float32 in the model")


def test_names_in_the_file_do_nothing_to_the_terminal(tmp_path):
    state = {"a\n\x1b[2J\x07b": torch.tensor([float("nan")])}
    refused(save(state, tmp_path / "m.pth"), r"a\?\?\[2J\?b holds NaN")
    refused(save({"x" * 10**5: torch.tensor([float("nan")])}, tmp_path / "m.pth"), r"xxx\.\.\.$")


def test_entries_that_are_no_tensors(tmp_path):
    refused(save({"net": {**small_state(), "lr": 0.1}}, tmp_path / "m.pth"), "entry lr among its weights .*float")
    refused(save({**small_state(), "epoch": 3}, tmp_path / "m.pth"), "entry epoch among its weights .*int")
    refused(save({"net": {**small_state(), 3: torch.ones(1)}}, tmp_path / "m.pth"), "no text")


def test_several_state_dicts_without_a_usual_name(tmp_path):
    path = save({"a": small_state(), "b": {"w": torch.ones(2)}, "epoch": 1}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="several state dicts, a, b: say which by key="):
        load_checkpoint(path)
    assert load_checkpoint(path, bare()).nesting == ("a",)
    assert list(load_checkpoint(path, key="b")) == ["w"]
    refused(path, "no entry 'c', only a, b, epoch", key="c")
    refused(path, "'epoch' that is no state dict", key="epoch")


def test_tied_weights_that_differ(tmp_path):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    state = {k: v.clone() for k, v in net.state_dict().items()}
    state["1.weight"] += 1
    refused(save(state, tmp_path / "m.pth"), "different values for 0.weight and 1.weight.*model", net)


def test_a_model_whose_own_hook_fails_half_way_is_put_back(tmp_path):
    net = bare()

    class Picky(nn.Module):
        def _load_from_state_dict(self, *args):
            raise RuntimeError("no, thanks")

    net.last = Picky()
    refused(save(small_state(), tmp_path / "m.pth"), "could not be loaded into the model: .*no, thanks", net)


def test_models_that_cannot_take_weights(tmp_path):
    path = save(small_state(), tmp_path / "m.pth")
    for model, match in (("net", "nn.Module"), (nn.LazyLinear(3), "lazy"), (Net().to("meta"), "meta device")):
        with pytest.raises(ModelError, match=match):
            load_checkpoint(path, model)


# ---------------------------------------------------------------- damage at random, and files made to be slow


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.filterwarnings("ignore")
def test_damage_at_random_is_refused_or_harmless(tmp_path, kind):
    from safetensors.torch import save as safetensors_bytes

    good = safetensors_bytes(small_state()) if kind == "safetensors" else torch_bytes(small_state(), kind == "legacy")
    path, rng = tmp_path / "m.bin", random.Random(0)
    refusals = 0
    for _ in range(150):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            loaded = load_checkpoint(path)
        except FastFIPError as error:
            assert "\n" not in str(error)
            refusals += 1
        else:
            assert all(torch.isfinite(v.double()).all() for v in loaded.values())
    assert refusals > 30


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore")
def test_damaged_pickles_are_refused_or_harmless(tmp_path, seed):
    """The same inside a sound zip, where no checksum helps."""
    with zipfile.ZipFile(io.BytesIO(torch_bytes({"net": small_state(), "acc": 0.5}))) as archive:
        entries = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    storages = {name[5:]: value for name, value in entries.items() if name.startswith("data/")}
    path, rng = tmp_path / "m.pth", random.Random(seed)
    refusals = 0
    for _ in range(60):
        data = bytearray(entries["data.pkl"])
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        write_zip(path, None, storages, data=bytes(data))
        try:
            loaded = load_checkpoint(path)
        except FastFIPError as error:
            assert "\n" not in str(error)
            refusals += 1
        else:
            assert all(torch.isfinite(v.double()).all() for v in loaded.values())
    assert refusals > 20


def nested(op: bytes, depth: int = 60) -> bytes:
    """A tuple of two of a tuple of two ...: 2^depth parts in a few bytes."""
    return encode("x") + b"".join(b"r" + struct.pack("<I", i) + b"j" + struct.pack("<I", i) + op for i in range(depth))


@pytest.mark.parametrize(
    "body",
    [
        b"}" + nested(b"\x86") + b"Ns.",  # as a key: hashing it takes 2^60 steps
        b"}X\1\0\0\0a" + nested(b"\x86") + b"s.",  # as a value: plain data that may not be written out
        b"ctorch\nFloatStorage\n" + nested(b"\x86") + b"R.",
        nested(b"\x86") + b"Q.",  # as a persistent id
        b"}X\1\0\0\0wc torch._utils\n_rebuild_tensor_v3\n" + nested(b"\x86") + b"Rs.",
    ],
)
def test_nested_sharing_takes_no_exponential_time(tmp_path, body):
    write_zip(tmp_path / "m.pth", None, data=b"\x80\x02" + body)
    start = time.process_time()
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "m.pth")
    assert time.process_time() - start < 20  # not a measurement: 2^60 steps never end


def test_plain_data_that_holds_itself(tmp_path):
    loop: dict = {"net": small_state(), "epoch": 3}
    loop["self"] = loop
    shared = ("x",)
    for _ in range(60):
        shared = (shared, shared)
    loop["shared"] = shared
    loaded = load_checkpoint(save(loop, tmp_path / "m.pth"))
    assert loaded.extras["epoch"] == 3 and loaded.left_out == ["self"] and len(loaded) == 3
    assert isinstance(loaded, OrderedDict | dict)
