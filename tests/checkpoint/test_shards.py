"""Checkpoints in several files, as Hugging Face writes them."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from fastfip.checkpoint import load_checkpoint, save_checkpoint
from fastfip.errors import CheckpointError
from tests.support.checkpoint_files import make_net, refused, same

INDEX = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}


def sharded(folder, net, kind="safetensors", **changes):
    """A folder with the weights of a net in two files, and its index."""
    state = net.state_dict()
    places = {}
    for i, part in enumerate((list(state)[:1], list(state)[1:])):
        name = f"model-0000{i + 1}-of-00002.{kind}"
        held = {key: state[key] for key in part}
        save_file(held, folder / name) if kind == "safetensors" else torch.save(held, folder / name)
        places |= dict.fromkeys(part, name)
    places |= changes
    content = {"metadata": {"total_size": 1}, "weight_map": {k: v for k, v in places.items() if v is not None}}
    (folder / INDEX[kind]).write_text(json.dumps(content))
    return folder / INDEX[kind]


@pytest.mark.parametrize("kind", INDEX)
@pytest.mark.parametrize("by", ["folder", "index"])
def test_shards_are_read_as_one(tmp_path, kind, by):
    net, other = make_net(), make_net()
    index = sharded(tmp_path, net, kind)
    loaded = load_checkpoint(tmp_path if by == "folder" else index, other)
    assert same(other.state_dict(), net.state_dict()) and list(loaded) == list(net.state_dict())
    save_checkpoint(other, tmp_path / "one.safetensors", like=loaded)
    again = make_net()
    load_checkpoint(tmp_path / "one.safetensors", again)
    assert same(again.state_dict(), net.state_dict())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_with_one_file_is_read(tmp_path, name):
    net = make_net()
    write = save_file if name.endswith("safetensors") else torch.save
    write(net.state_dict(), tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    assert set(load_checkpoint(tmp_path, make_net())) == set(net.state_dict())


def test_links_within_a_cache_are_followed(tmp_path):
    """The cache of Hugging Face keeps a folder of links for each version."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    sharded(tmp_path / "blobs", make_net())
    for path in (tmp_path / "blobs").iterdir():
        os.symlink(os.path.join("..", "blobs", path.name), tmp_path / "snapshot" / path.name)
    assert len(load_checkpoint(tmp_path / "snapshot")) == len(make_net().state_dict())


@pytest.mark.parametrize(
    "place", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", "\0", 3, None, ["x"]]
)
def test_files_elsewhere_are_refused(tmp_path, place):
    (tmp_path / "in").mkdir()
    save_file({"fc.bias": torch.ones(3)}, tmp_path / "secret.safetensors")
    index = sharded(tmp_path / "in", make_net())
    content = json.loads(index.read_text())
    content["weight_map"]["fc.bias"] = place
    index.write_text(json.dumps(content))
    refused(index, r"names a file for fc\.bias that does not lie beside it")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"fc.bias": "missing.safetensors"}, r"(missing|00002).*(does not exist|which holds fc\.bias)"),
        ({"fc.bias": "model-00001-of-00002.safetensors"}, r"00001-of-00002\.safetensors, which lacks fc\.bias"),
        ({"fc.bias": None}, r"00002-of-00002\.safetensors, which holds fc\.bias"),
        ({"more": "model-00001-of-00002.safetensors"}, r"00001-of-00002\.safetensors, which lacks more"),
        ({"more": "model.safetensors.index.json"}, "names another index"),
    ],
)
def test_shards_that_do_not_agree_with_their_index_are_refused(tmp_path, change, match):
    refused(sharded(tmp_path, make_net(), **change), match)


def test_a_shard_is_checked_like_any_other_file(tmp_path):
    index = sharded(tmp_path, make_net())
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"<html>")
    refused(index, r"its file model-00002-of-00002\.safetensors is an HTML")
    os.remove(tmp_path / "model-00002-of-00002.safetensors")
    os.mkfifo(tmp_path / "model-00002-of-00002.safetensors")
    refused(index, "not a plain file")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ("[1]", "not a JSON object"),
        ("{", "cannot be read"),
        ("[" * 100_000, "nested too deep"),
        (" " * 2**22, "far too long"),
    ],
)
def test_what_is_no_index_is_refused(tmp_path, text, match):
    (tmp_path / INDEX["bin"]).write_text(text)
    refused(tmp_path / INDEX["bin"], match)
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(tmp_path)


def test_a_pipe_as_index_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / INDEX["bin"])
    refused(tmp_path / INDEX["bin"], "not a plain file")
