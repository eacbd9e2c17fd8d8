"""The fuzzing program finds what it looks for, and nothing in a second of it."""

import io
import pickletools
import random
import tempfile
import zipfile

import pytest

from fastfip.checkpoint import load_checkpoint
from tests.hostile import fuzz
from tests.hostile.fuzz import Figures, Fuzz, mutated, plain
from tests.hostile.generators import SOUND
from tests.support.checkpoint_files import Net, same, small_state


@pytest.fixture(autouse=True)
def folders(tmp_path_factory, monkeypatch):
    """Files that crash go where pytest cleans up."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("crashes")))


def test_a_second_of_it_finds_no_crash(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "MAKERS", {**fuzz.MAKERS, "checkpoint": lambda: list(fuzz.checkpoints())[:5]})
    work = Fuzz(tmp_path)
    plain(work, 0.0, 0)
    assert not work.figures.crashes and set(work.figures.files) == set(work.readers)
    assert sum(work.figures.read.values()) >= 15  # those that nothing was changed in
    draw = random.Random(0)
    for name, corpus in work.corpus.items():
        for _ in range(30):
            work.one(name, mutated(draw.choice(corpus), corpus, draw))
    assert not work.figures.crashes and len(work.figures.refusals) > 5


@pytest.mark.parametrize("name", SOUND)
def test_sound_files_of_every_protocol_are_read(tmp_path, name):
    (tmp_path / "m.pth").write_bytes(SOUND[name])
    found = load_checkpoint(tmp_path / "m.pth", Net())
    assert same(found, small_state()) and found.extras["acc"] == 0.5 and found.format == name.split(",")[0]


def test_seeds_have_the_instructions_of_every_protocol():
    seen = set()
    for data in fuzz.pickles():
        seen |= {kind.name for kind, *_ in pickletools.genops(data)}
    for name, data in SOUND.items():
        if name.startswith("zip"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                data = archive.read("archive/data.pkl")
        file = io.BytesIO(data)
        for _ in range(1 if name.startswith("zip") else 5):
            seen |= {kind.name for kind, *_ in pickletools.genops(file)}
    later = (
        "SHORT_BINBYTES BINBYTES BYTEARRAY8 SHORT_BINUNICODE MEMOIZE STACK_GLOBAL FRAME EMPTY_SET FROZENSET ADDITEMS"
    )
    assert set(later.split()) <= seen, set(later.split()) - seen


@pytest.mark.parametrize("error", [ValueError("x"), MemoryError(), RecursionError("deep")])
def test_what_is_no_refusal_is_a_crash(tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(fuzz, "MAKERS", {})
    work = Fuzz(tmp_path)

    def broken(data):
        raise error

    work.readers["npz"] = broken
    work.one("npz", b"data")
    (kind,) = work.figures.crashes
    assert type(error).__name__ in kind and "crash:" in capsys.readouterr().out
    assert [path.read_bytes() for path in work.figures.folder.iterdir()] == [b"data"]


def test_too_much_memory_is_a_crash(tmp_path, monkeypatch):
    if not fuzz.LINUX:
        pytest.skip("peaks of memory are read from /proc")
    monkeypatch.setattr(fuzz, "MAKERS", {})
    work = Fuzz(tmp_path)
    work.readers["npz"] = lambda data: bytearray(b"x" * (100 * 2**20))
    work.one("npz", b"data")
    assert "npz: more memory than 64 MB over the size of the file" in work.figures.crashes


def test_kinds_of_refusals_have_no_names_or_numbers():
    figures = Figures()
    figures.refuse("/tmp/m.pth: claims 12 bytes for fc.weight and stores 3")
    figures.refuse("/tmp/n.pth: claims 99 bytes for 'a b' and stores 7")
    assert figures.refusals == {"claims bytes for and stores": 2}
