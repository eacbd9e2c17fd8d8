"""Files made to take memory or time are refused within bounds, whatever they say of themselves."""

import re

import numpy as np
import pytest
import torch

from fastfip.checkpoint import load_checkpoint, opcodes, scan
from fastfip.errors import CheckpointError
from tests.hostile.generators import SLOW
from tests.support.checkpoint_files import write_zip
from tests.support.peak_memory import in_child

MORE = 64 * 2**20


class Counted(opcodes.Budget):
    """A budget that is looked at afterwards."""

    all: list["Counted"] = []

    def __init__(self, window):
        super().__init__(window)
        self.all.append(self)


@pytest.mark.parametrize("hostile", SLOW, ids=lambda hostile: hostile.name)
def test_files_made_to_be_slow_are_refused_within_their_bounds(tmp_path, hostile, monkeypatch):
    path = tmp_path / f"m{hostile.suffix}"
    hostile.write(path)
    size = path.stat().st_size
    monkeypatch.setattr(scan, "Budget", Counted)

    def read():
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            return str(error), [(budget.steps, budget.spent) for budget in Counted.all]

    (said, counted), peak = in_child(read)
    assert re.search(hostile.match, said), said
    assert said.startswith(str(path)) and "\n" not in said and len(said) < 800
    assert peak <= size + MORE
    for steps, spent in counted:
        assert steps <= opcodes.MOST_INSTRUCTIONS + 1 and spent <= opcodes.ROOM + 2 * size + 2**20


def test_a_sound_file_of_many_tensors_is_within_the_bounds(tmp_path):
    state = {f"layers.{i}.weight": torch.full((512,), float(i)) for i in range(12_000)}
    torch.save(state, tmp_path / "m.pth")
    loaded = load_checkpoint(tmp_path / "m.pth")
    assert len(loaded) == 12_000 and loaded["layers.777.weight"][3] == 777


def test_long_lists_beside_the_weights_are_within_the_bounds(tmp_path):
    samples = [(f"data/train/n{i:07d}.png", i % 10) for i in range(50_000)]
    torch.save({"net": {"w": torch.ones(1)}, "samples": samples}, tmp_path / "m.pth")
    assert load_checkpoint(tmp_path / "m.pth").extras["samples"][49_999] == ("data/train/n0049999.png", 9)


def test_the_poisoned_sets_of_a_large_benchmark_run_are_within_the_bounds(tmp_path):
    """BackdoorBench on Tiny-ImageNet with crossed triggers: 40,000 pictures by NumPy's numbers, each with a path."""
    index = np.arange(40_000)
    held = {i: {"path": f"./record/wanet_0_1/bd_test_dataset/{i % 200}/{i}.png", "other_info": [0, 7]} for i in index}
    torch.save({"model": {"w": torch.ones(1)}, "bd_test": {"data_dict": held, "index": index}}, tmp_path / "m.pt")
    loaded = load_checkpoint(tmp_path / "m.pt")
    assert list(loaded) == ["w"] and loaded.left_out == ["bd_test"]


@pytest.mark.parametrize("again", [b"X\x01\0\0\0aK\x02s", b"(K\x01K\x02X\x01\0\0\0aK\x02u"])
def test_a_dict_that_is_given_a_key_twice_is_refused(tmp_path, again):
    """Two readers may take two different weights of it."""
    write_zip(tmp_path / "m.pth", None, data=b"\x80\x02}X\x01\0\0\0aK\x01s" + again + b".")
    with pytest.raises(CheckpointError, match="sets a twice in one dict"):
        load_checkpoint(tmp_path / "m.pth")


@pytest.mark.parametrize("body", [b"{},", b'{"":0},', b"[],"])
def test_an_index_of_shards_is_refused_within_its_memory(tmp_path, body):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(b'{"weight_map": {"a": [' + body * (1_500_000 // len(body)) + b"1]}}")

    def read():
        try:
            load_checkpoint(tmp_path)
        except CheckpointError as error:
            return str(error)

    said, peak = in_child(read)
    assert "names a file for a that does not lie beside it (a list)" in said and peak < MORE
