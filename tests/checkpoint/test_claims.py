"""Tensors that are not what they claim, and files that are no checkpoints."""

import json
import os
import pickle
import struct

import pytest
import torch

from fastfip.checkpoint import load_checkpoint
from fastfip.checkpoint.read import find_path
from tests.support.checkpoint_files import Name, refused, save, small_state, tensor, write_legacy, write_zip

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
        (b"\0\0\0", "not a checkpoint"),
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
    if suffix == ".safetensors" and match == "not a checkpoint":
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
        (header(b"[1, 2, 3]"), "not a JSON object"),
        (header(b'{"w": ' + b"[" * 50_000), "header"),
        (header({"w": F32}, bytes(16)), "cannot read it|damaged"),
    ],
)
def test_bad_safetensors(tmp_path, content, match):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    refused(path, match)


def test_the_way_to_a_value_is_the_first_one_and_every_container_is_entered_once():
    shared = [1, {"b": 2}]
    root = {"x": shared, "y": (shared, {"z": [3, 2.5]}), "empty": []}
    shared.append(root)
    entered = []
    assert find_path(root, lambda value: entered.append(id(value)) or value == 2.5) == ("y", "1", "z", "1")
    assert entered.count(id(shared)) == 2 and entered.count(id(shared[1])) == 1
    assert find_path(root, lambda value: value == 2) == ("x", "1", "b") and find_path(root, lambda _: False) is None
    assert find_path(7, lambda value: value == 7) == () and find_path(7, lambda value: value == 8) is None
