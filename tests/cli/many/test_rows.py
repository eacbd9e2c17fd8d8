"""Manifests: every column is an option of the command, and what is wrong is named with its line."""

import dataclasses
import inspect

import pytest

from fastfip.cli.many.keys import Digests
from fastfip.cli.many.rows import ManyRow, as_rows, read_manifest
from fastfip.cli.options import Net, Scores
from fastfip.cli.purify import purify
from fastfip.errors import ConfigError


def manifest(tmp_path, text):
    path = tmp_path / "m.csv"
    path.write_text(text)
    return path


def test_columns_are_the_options_of_purify():
    plain = set(inspect.signature(purify).parameters) - {"source", "net", "clean", "scores"}
    options = plain | {f.name for group in (Net, Scores) for f in dataclasses.fields(group)}
    options |= {"checkpoint", "data", "limit", "per_class", "input_shape"}
    own = {field.name for field in dataclasses.fields(ManyRow)}
    run = {"report", "leaderboard", "force", "quiet", "as_json", "debug", "fisher_trace", "resume", "resume_every"}
    assert own == options - run
    assert "sharpness" not in own  # the sets are not all there is


def test_cells_become_what_the_options_are(tmp_path):
    path = manifest(
        tmp_path,
        "checkpoint,test-data,seed,ignore_fit,settings,arch_args\n"
        'a.pth,t.npz, 3 ,yes,lr=0.1;steps=4,"{""classes"": 2}"\n'
        "b.pth,,,,,\n",
    )
    first, second = read_manifest(path)
    assert first == ManyRow(
        checkpoint="a.pth", test_data="t.npz", seed=3, ignore_fit=True, settings=("lr=0.1", "steps=4"),
        arch_args='{"classes": 2}',
    )  # fmt: skip
    assert second == ManyRow(checkpoint="b.pth")
    same = {"checkpoint": "a.pth", "test-data": "t.npz", "seed": "3", "ignore_fit": True, "arch_args": {"classes": 2}}
    assert as_rows([{**same, "settings": {"lr": 0.1, "steps": 4}}])[0] == [first]


@pytest.mark.parametrize(
    "text, words",
    [
        ("checkpoint,test_dta\na,b\n", "line 2: no column 'test_dta': did you mean 'test_data'"),
        ("checkpoint,seed\na,0\nb,x\n", "line 3: seed=x: must be a whole number"),
        ("checkpoint,ignore_fit\na,maybe\n", "line 2: ignore_fit=maybe: must be yes or no"),
        ("checkpoint,seed\na\n", "line 2: has not 2 cells"),
        ("checkpoint,seed\na,1,2\n", "line 2: has not 2 cells"),
        ("checkpoint,seed\n,1\n", "line 2: checkpoint is empty"),
        ("seed\n1\n", "checkpoint is empty"),
        ("checkpoint,seed,seed\na,1,2\n", "the column 'seed' twice"),
        ("checkpoint\n", "has no rows"),
        ("checkpoint,out\na,../b.pth\n", "must be a name in the folder of results"),
        ("checkpoint,out\na,work/b.pth\n", "reserved for the run"),
        ("checkpoint,out\na,b.exe\n", "must end in .safetensors"),
    ],
)
def test_a_wrong_manifest_is_refused_in_one_line(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words) as caught:
        read_manifest(manifest(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_manifest_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read as a manifest: No such file"):
        read_manifest(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"checkpoint\n\xff\xfe\n")
    with pytest.raises(ConfigError, match="cannot be read as a manifest"):
        read_manifest(tmp_path / "b.csv")


def test_a_key_is_of_what_files_hold_and_of_every_setting(tmp_path):
    for name, content in (("a.pth", "1"), ("b.pth", "1"), ("c.pth", "2"), ("x.npz", "3"), ("y.npz", "3")):
        (tmp_path / name).write_text(content)
    (tmp_path / "images" / "0").mkdir(parents=True)
    (tmp_path / "images" / "0" / "i.png").write_text("4")

    def key(**values):
        return Digests(tmp_path).key(ManyRow(**{"checkpoint": "a.pth", "data": "x.npz", **values}))

    plain = key()
    assert key(checkpoint="b.pth") == key(data="y.npz") == key(out="else.pth") == plain
    others = [
        {"checkpoint": "c.pth"}, {"data": "x.npz:a,b"}, {"seed": 1}, {"settings": ("lr=1",)}, {"arch": "a:b"},
        {"test_data": "x.npz"}, {"data": "images"}, {"method": "clp"}, {"mean": "0.5"},
    ]  # fmt: skip
    keys = [key(**values) for values in others]
    assert len({plain, *keys}) == len(others) + 1
    (tmp_path / "images" / "0" / "i.png").write_text("5")
    assert key(data="images") not in keys
    with pytest.raises(ConfigError, match="test_data: .*none.npz: there is no such file"):
        key(test_data="none.npz")
