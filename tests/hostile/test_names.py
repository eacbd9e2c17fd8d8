"""Names that come from files do nothing to a terminal, wherever they are printed."""

import io
import time

import numpy as np
import pytest
import torch
from rich.console import Console

from fastfip.checkpoint import load_checkpoint
from fastfip.cli import main
from fastfip.cli.errors import say
from fastfip.data.images import load, same_classes
from fastfip.errors import CheckpointError, DataError, printable, reason
from fastfip.reporting.table import Sheet
from tests.support.checkpoint_files import Call, Name, make_net, save, small_state, tensor, write_zip

EVIL = "\x1b]0;owned\x07\x1b[2J\r\n\u202e\u2028\x9b31m"


def harmless(text):
    return all(c.isprintable() or c == "\n" for c in text) and "\x1b" not in text


@pytest.mark.parametrize("most", [3, 10, 600])
def test_one_filter_makes_text_printable(most):
    text = printable(EVIL + "x" * 1000, most)
    assert text.isprintable() and len(text) == most and text.endswith("...")
    assert printable("plain [bold]text[/] ä 漢", 100) == "plain [bold]text[/] ä 漢"
    assert reason(ValueError(EVIL)).isprintable()


@pytest.mark.parametrize(
    "value",
    [
        {EVIL: torch.tensor([float("nan")])},
        {"net": small_state(), EVIL: small_state(), "state_dict": {EVIL: 3}},
        {EVIL: {"a": torch.ones(1)}, "b" + EVIL: {"c": torch.ones(1)}},
        {EVIL: 3},
        {"fc.weight": torch.ones(1), EVIL: torch.ones(2)},
        {"student." + EVIL: torch.ones(1), EVIL + ".fc.weight": torch.ones(3, 4)},
    ],
)
@pytest.mark.parametrize("arguments", [{}, {"key": "none"}, {"prefix": "none"}])
def test_errors_about_checkpoints(tmp_path, value, arguments):
    path = save(value, tmp_path / "m.pth")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, make_net(), **arguments)
    assert str(caught.value).isprintable()


def test_what_is_left_out(tmp_path):
    value = {"net": {"w": torch.ones(1)}, EVIL: {"x": torch.ones(2)}, ("a", (1, EVIL)): {1, 2}}
    left = load_checkpoint(save(value, tmp_path / "m.pth")).left_out
    assert all(name.isprintable() for name in left) and left[1] == "a tuple" and len(left) == 2


def test_names_of_calls_and_storages(tmp_path):
    write_zip(tmp_path / "m.pth", {"w": tensor(), "x": Call(Name("os" + EVIL.replace("\n", ""), "system"), ())})
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "m.pth")
    assert str(caught.value).isprintable()
    write_zip(tmp_path / "m.pth", {"w": tensor(key=EVIL)}, {"0": b""})
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "m.pth")
    assert str(caught.value).isprintable()


def test_names_of_arrays_and_class_folders(tmp_path):
    np.savez(tmp_path / "a.npz", **{EVIL.replace("\n", ""): np.zeros(3)})
    for spec in ("a.npz", "a.npz:x,y"):
        with pytest.raises(DataError) as caught:
            load(tmp_path / spec)
        assert str(caught.value).isprintable()
    for root, name in (("one", "a" + EVIL), ("two", "b" + EVIL)):
        (tmp_path / root / name).mkdir(parents=True)
        (tmp_path / root / name / f"x{EVIL}.png").write_bytes(b"no image")
    first, second = load(tmp_path / "one"), load(tmp_path / "two")
    with pytest.raises(DataError) as caught:
        same_classes(first, second)
    assert str(caught.value).isprintable()
    with pytest.raises(DataError) as caught:
        first.batch([0])
    assert str(caught.value).isprintable()


def test_tables_and_the_command_line(tmp_path, capsys):
    sheet = Sheet(EVIL, (EVIL, "b"), [(EVIL, EVIL)], [EVIL])
    stream = io.StringIO()
    Console(file=stream, force_terminal=True, color_system=None).print(sheet)
    assert harmless(str(sheet).replace("\n", "")) and harmless(stream.getvalue())
    say(EVIL)
    assert harmless(capsys.readouterr().err)
    np.savez(tmp_path / "a.npz", **{EVIL.replace("\n", ""): np.zeros(3)})
    save({EVIL: 3}, tmp_path / "m.pth")
    arguments = ["--arch", "tests.support.checkpoint_files:make_net", "--test-data", str(tmp_path / "a.npz")]
    assert main(["evaluate", str(tmp_path / "m.pth"), *arguments]) == 4
    assert harmless(capsys.readouterr().err)


def test_long_names_that_nearly_meet_take_no_time_that_grows_with_their_square(tmp_path):
    text = "".join(chr(97 + i * i % 26) for i in range(30_000))
    path = save(
        {f"{text}{i}.fc.w{'.x' * 1000}": torch.ones(1) for i in range(30)} | {"fc.weight": torch.ones(3, 4)},
        tmp_path / "m.pth",
    )
    start = time.process_time()
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_checkpoint(path, make_net())
    assert time.process_time() - start < 10  # not a measurement: the square would take minutes
