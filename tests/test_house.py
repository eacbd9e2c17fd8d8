"""The rules of the house hold, and every one of them is noticed where it is broken (made-up trees in tmp_path)."""

import importlib

import pytest

from tests.support import house, trips
from tests.support.house import ROOT, RULES


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.count.__name__)
def test_rule(rule):
    counted = rule.count(ROOT)
    assert len(counted) <= rule.limit, f"{len(counted)} {rule.what}, at most {rule.limit}: {counted[:50]}"


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_loose_files_are_those_at_the_top(tmp_path):
    write(tmp_path, {"fastfip/__init__.py": "", "fastfip/a.py": "", "fastfip/py.typed": "", "fastfip/b/c.py": ""})
    assert house.loose_files(tmp_path) == ["__init__.py", "a.py"]


def test_names_in_two_files_are_those_of_classes_and_types(tmp_path):
    write(
        tmp_path,
        {
            "fastfip/a.py": "class Use: ...\nclass _Forward: ...\nclass Mine: ...\nLIMIT = 3\nOptions = tuple[int]\n",
            "fastfip/b/c.py": "if True:\n    x = 1\nclass _Forward: ...\ndef f():\n    class Mine: ...\n",
            "fastfip/b/d.py": "class Use: ...\nclass Options: ...\nLIMIT = 4\n",
        },
    )
    assert house.names_in_two_files(tmp_path) == [
        "Options: fastfip/a.py, fastfip/b/d.py",
        "Use: fastfip/a.py, fastfip/b/d.py",
        "_Forward: fastfip/a.py, fastfip/b/c.py",
    ]


def test_words_of_the_readme_are_those_that_are_read(tmp_path):
    text = (
        "# Name\n\nTwo words - and [a link](https://x.y/z w).\n\n```python\nno word here\n```\n\n~~~\nnor here\n~~~\n"
        "<!-- not\n\nthis --> last\n\n| no | cell |\n|---|---|\n<img src='a b'>\n1 < 2\n"
    )
    write(tmp_path, {"README.md": text})
    assert house.readme_words(tmp_path) == ["Name", "Two", "words", "and", "[a", "link", "last", "1", "2"]


def test_rows_of_the_table_of_imports(tmp_path):
    write(tmp_path, {"tests/test_imports.py": "import ast\nOTHER = {'x': 1}\nLAYER = {'a': 0, 'b': 1}\n"})
    assert house.layer_rows(tmp_path) == ["a", "b"]
    write(tmp_path, {"tests/test_imports.py": "LAYERS = {}\n"})
    with pytest.raises(LookupError):
        house.layer_rows(tmp_path)


def test_relative_imports_are_seen_inside_functions(tmp_path):
    write(
        tmp_path,
        {
            "fastfip/a.py": "from fastfip import b\nimport torch\n",
            "fastfip/b.py": "def f():\n    from . import a\n",
            "tests/t.py": "from ..x import y\n",
        },
    )
    assert house.relative_imports(tmp_path) == ["fastfip/b.py:2", "tests/t.py:1"]


@pytest.mark.parametrize(
    "text, empty",
    [
        ("See :meth:`Form.norms`.", True),
        ("See `Form.norms`", True),
        ("See\n    :class:`~a.b.Form`.", True),
        ("See Form.", True),
        ("See torch.overrides; None means that it does not apply.", False),
        ("See the entry of the history.", False),
        ("Return what `Form` says.", False),
    ],
)
def test_docstrings_that_only_refer(tmp_path, text, empty):
    write(tmp_path, {"fastfip/a.py": f'class A:\n    def f(self):\n        """{text}"""\n\n    def g(self): ...\n'})
    assert house.empty_docstrings(tmp_path) == (["fastfip/a.py: f"] if empty else [])


def test_a_trip_is_followed_through_the_package_and_no_further(tmp_path, monkeypatch):
    write(
        tmp_path,
        {
            "made_up_house/__init__.py": "",
            "made_up_house/one.py": (
                "from made_up_house import two\n"
                "def start(model):\n    two.listed([model])\n    two.twice(1)\n    two.twice(2)\n"
                "    outside(lambda: two.keyword(net=model))\n    return [two.nothing() for _ in range(1)]\n"
                "def outside(f):\n    return f()\n"
                "def unused(model): ...\n"
            ),
            "made_up_house/two.py": (
                "from made_up_house import three\n"
                "def listed(models): return three.Held(*models)\n"
                "def twice(n): ...\n"
                "def keyword(*, net): ...\n"
                "def nothing(): ...\n"
            ),
            "made_up_house/three.py": "class Held:\n    def __init__(self, net, *more, **others): ...\n",
            "made_up_house/four.py": "def unused(): ...\n",
        },
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    one = importlib.import_module("made_up_house.one")

    class Model: ...

    seen = trips.watch(lambda: one.start(Model()), tmp_path / "made_up_house", Model)
    assert seen.modules == ["one.py", "two.py", "three.py"]
    # listed, Held, twice two times, keyword from the lambda, nothing
    assert seen.hand_overs == 6
    assert [station.rpartition(" ")[2].rpartition(".")[2] for station in seen.stations] == [
        "start", "listed", "__init__", "keyword",
    ]  # fmt: skip
    assert trips.watch(lambda: one.start(None), tmp_path / "made_up_house", Model).stations == []


def test_a_long_file_is_seen(tmp_path):
    write(tmp_path, {"fastfip/short.py": "x = 1\n" * 400, "fastfip/deep/long.py": "x = 1\n" * 401})
    assert house.long_files(tmp_path) == ["fastfip/deep/long.py: 401"]


def test_the_table_says_what_is_broken(tmp_path, monkeypatch, capsys):
    rules = (
        house.Rule("kept", lambda root: ["a"], 1),
        house.Rule("broken", lambda root: ["a", "b"], 1),
    )
    monkeypatch.setattr(house, "RULES", rules)
    monkeypatch.setattr(house, "trip", lambda root, scene: {"hand_overs": 7})
    assert house.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["kept", "1", "1", "yes"] and lines[2].split() == ["broken", "1", "2", "no"]
    monkeypatch.setattr(house, "RULES", rules[:1])
    assert house.main() == 0
