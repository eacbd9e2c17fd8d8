"""What `inspect_file` says of files, those that are refused among them."""

import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from fastfip.checkpoint.inspection import StoredTensor, fitting, inspect_file
from fastfip.errors import CheckpointError
from tests.support.checkpoint_files import Call, Name, make_net, save, small_state, tensor, write, write_zip


class Pretender:
    """Would run code if it were loaded."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code was run')",)


@pytest.mark.parametrize("how", ["zip", "legacy", "safetensors"])
def test_what_a_file_of_each_format_holds(tmp_path, how):
    path = write(dict(small_state()), tmp_path / "a.pth", how)
    found = inspect_file(path)
    assert found.refused is None and found.key == "" and found.bytes == path.stat().st_size
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(found.tensors, key=lambda t: t.name) == [
        StoredTensor("bn.num_batches_tracked", (), "int64"),
        StoredTensor("fc.bias", (3,), "float32"),
        StoredTensor("fc.weight", (3, 4), "float32"),
    ]
    assert {"zip": "torch.save, zip", "legacy": "before torch 1.6", "safetensors": "safetensors"}[how] in found.format
    assert found.guesses == {"classes": 3}
    assert "fc.weight" in str(found) and json.loads(found.to_json())["sha256"] == found.sha256


def test_nesting_prefix_what_is_beside_and_what_is_left_out_with_the_reason(tmp_path):
    state = {f"module.{name}": value for name, value in small_state().items()}
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    path = save({"net": state, "acc": 97.5, "optimizer": optimizer, "ema": dict(small_state())}, tmp_path / "a.pth")
    found = inspect_file(path)
    assert (found.key, found.prefix, found.beside) == ("net", "module.", {"acc": 97.5})
    assert found.weights == list(small_state())
    assert found.state_dicts == {"net": 3, "ema": 3}
    assert found.left_out["optimizer"].startswith("state of an optimiser")
    assert found.left_out["ema"] == "3 other tensors, which would bring the old weights back"
    assert "net.module.fc.weight" in {t.name for t in found.tensors}
    assert inspect_file(path, key="ema").key == "ema"
    with pytest.raises(CheckpointError, match="fit"):
        fitting(path, nn.Linear(9, 9), found)


def test_the_state_dict_that_fits_is_found(tmp_path):
    net = make_net()
    path = save({"generator": {"a": torch.ones(2)}, "judge": net.state_dict()}, tmp_path / "a.pth")
    found = inspect_file(path)
    assert set(found.state_dicts) == {"generator", "judge"}
    assert fitting(path, make_net(), found) == "judge"
    assert fitting(path, make_net(), found, "judge") == "judge"


def test_a_file_that_would_run_code_is_described_and_nothing_is_run(tmp_path):
    bad = save({"state_dict": dict(small_state()), "extra": Pretender()}, tmp_path / "bad.pth")
    found = inspect_file(bad)
    assert "unsafe pickle" in found.refused and any("exec" in name for name in found.code)
    assert {t.name for t in found.tensors} == {f"state_dict.{name}" for name in small_state()}
    module = save(make_net(), tmp_path / "module.pth")
    found = inspect_file(module)
    assert "pickled module" in found.refused and "torch.nn.modules.linear.Linear" in found.code
    assert StoredTensor("fc.weight", (3, 4), "float32") in found.tensors  # as its state dict would call it
    assert "no: it holds a pickled module" in str(found)
    (tmp_path / "p.pkl").write_bytes(pickle.dumps({"a": Pretender()}))
    assert any("exec" in name for name in inspect_file(tmp_path / "p.pkl").code)


def test_files_that_are_no_checkpoints_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    (tmp_path / "page.pth").write_text("<html>")
    whole = write({"a.weight": torch.ones(3, 4)}, tmp_path / "s.safetensors", "safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[:-8])
    (tmp_path / "short.pth").write_bytes(save({"a": torch.ones(4)}, tmp_path / "b.pth").read_bytes()[:-9])
    for name, words in (
        ("a.npz", "NumPy archive"),
        ("page.pth", "HTML"),
        ("short.safetensors", "truncated"),
        ("short.pth", "truncated"),
    ):
        found = inspect_file(tmp_path / name)
        assert words in found.refused and len(found.sha256) == 64 and words in str(found)
    assert inspect_file(tmp_path / "short.safetensors").tensors == [StoredTensor("a.weight", (3, 4), "float32")]
    for name in ("none", "."):
        with pytest.raises(CheckpointError, match=r"does not exist|is a folder"):
            inspect_file(tmp_path / name)


def test_claims_that_cannot_be_true_are_shown_not_allocated(tmp_path):
    write_zip(tmp_path / "a.pth", {"w": tensor(size=(2**40, 2**20), stride=(2**20, 1)), "x": tensor()})
    found = inspect_file(tmp_path / "a.pth")
    assert "claims" in found.refused and found.tensors[0].shape == (2**40, 2**20)
    header = json.dumps({"w": {"dtype": "F32", "shape": [10**300] * 3, "data_offsets": [0, 4]}}).encode()
    (tmp_path / "b.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    assert inspect_file(tmp_path / "b.safetensors").tensors == []


def test_names_of_a_file_do_nothing_to_a_terminal(tmp_path):
    name = "\x1b]0;gone\x07\u202e"
    path = save(
        {"net": {f"{name}.weight": torch.ones(2)}, name: 3, "opt": {name: torch.ones(2, 2)}}, tmp_path / "a.pth"
    )
    text = str(inspect_file(path))
    assert not {"\x1b", "\x07", "\u202e"} & set(text) and "?]0;gone??" in text
    write_zip(tmp_path / "b.pth", {"a": Call(Name("os", "x\x1b[2J"), ()), "w": tensor()})
    assert "\x1b" not in str(inspect_file(tmp_path / "b.pth"))


def test_containers_that_hold_each_other_come_to_an_end(tmp_path):
    inner: dict = {"w": torch.ones(2)}
    tower: list = [inner]
    for _ in range(60):
        tower = [tower, tower]
    inner["self"] = tower
    found = inspect_file(save({"net": {"w": torch.ones(2)}, "other": tower}, tmp_path / "a.pth"))
    assert next(t.name for t in found.tensors) == "net.w"
