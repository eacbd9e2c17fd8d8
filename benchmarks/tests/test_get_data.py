"""What is fetched is checked before it is put in place, and what is there is never written over."""

import hashlib
import io
from dataclasses import replace
from urllib.error import URLError

import pytest

from benchmarks import get_data
from benchmarks.get_data import SOURCES, Source, fetch, state

RIGHT = Source("a/b.pth", hashlib.sha256(b"right").hexdigest(), "o/r", ("o/r/c/one.pth", "o/r/c/two.pth"))


def test_a_file_is_there_missing_or_another(tmp_path):
    assert state(RIGHT, tmp_path) == "missing"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.pth").write_bytes(b"wrong")
    assert state(RIGHT, tmp_path) == "another"
    (tmp_path / "a" / "b.pth").write_bytes(b"right")
    assert state(RIGHT, tmp_path) == "there"


def test_the_first_place_that_has_the_measured_file_is_taken(tmp_path):
    asked = []

    def opened(address):
        asked.append(address)
        return io.BytesIO(b"wrong" if "one" in address else b"right")

    assert fetch(RIGHT, tmp_path, opened) == "fetched" and (tmp_path / "a" / "b.pth").read_bytes() == b"right"
    assert asked == [f"https://raw.githubusercontent.com/o/r/c/{name}.pth" for name in ("one", "two")]


def test_nothing_is_put_in_place_that_is_not_the_measured_file(tmp_path):
    assert "one.pth is another file" in fetch(RIGHT, tmp_path, lambda address: io.BytesIO(b"wrong"))

    def broken(address):
        raise URLError("no network")

    assert "no network" in fetch(RIGHT, tmp_path, broken)
    assert fetch(replace(RIGHT, published=()), tmp_path) == "has to be made from o/r"
    assert not list(tmp_path.iterdir())


def test_the_exit_code_says_whether_all_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(get_data, "data_dir", lambda: tmp_path)
    monkeypatch.setattr(get_data, "SOURCES", (RIGHT,))
    assert get_data.main([]) == 1 and "missing (o/r)" in capsys.readouterr().out
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.pth").write_bytes(b"right")
    assert get_data.main([]) == 0


def test_the_sums_are_those_of_the_data_that_is_here():
    folder = get_data.data_dir()
    if not (folder / "checkpoints").is_dir():
        pytest.skip("the networks and images of other people are not here (FASTFIP_DATA)")
    assert {source.path: state(source, folder) for source in SOURCES} == {source.path: "there" for source in SOURCES}
