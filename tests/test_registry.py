"""Methods and attacks of other packages: by entry points, and by `module:Class`."""

import subprocess
import sys
import textwrap

import pytest

from fastfip import attacks, methods
from fastfip.errors import ConfigError
from fastfip.registry import Registry, working_folder_importable

METHOD = """
    from dataclasses import dataclass

    from fastfip.methods import Method, MethodConfig, setting


    @dataclass(frozen=True)
    class NudgeConfig(MethodConfig):
        '''Settings of the toy.'''

        share: float = setting(0.5, "share of the loss that counts", low=0, high=1)


    class Nudge(Method):
        '''Fine-tune with a part of the loss.'''

        name = "nudge"
        summary = "a toy: fine-tuning with a part of the loss"
        Config = NudgeConfig

        def parameter_groups(self, run):
            return [{"params": list(run.model.parameters())}]

        def loss(self, run, batch):
            return run.config.share * super().loss(run, batch)
"""
ATTACK = """
    from dataclasses import dataclass
    from typing import ClassVar

    from fastfip.attacks import Attack


    @dataclass(frozen=True)
    class Dim(Attack):
        '''Darken the picture.'''

        name: ClassVar[str] = "dim"
        summary: ClassVar[str] = "a toy: half the light"
        by: float = 0.5

        def trigger(self, x):
            return self.by * x
"""


@pytest.fixture
def installed(tmp_path):
    """A package outside of fastfip with a method, an attack and a broken entry, as pip would install it."""
    (tmp_path / "toybox.py").write_text(textwrap.dedent(METHOD) + textwrap.dedent(ATTACK))
    info = tmp_path / "toybox-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toybox\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[fastfip.methods]\nnudge = toybox:Nudge\nbroken = toybox:Nothing\n[fastfip.attacks]\ndim = toybox:Dim\n"
    )
    return tmp_path


def python(folder, code, cwd=None):
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", textwrap.dedent(code).format(folder=str(folder))],
        capture_output=True, text=True, cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_what_another_package_offers_is_in_the_tables(installed):
    out, err = python(
        installed,
        """
        import sys
        sys.path.insert(0, {folder!r})
        import torch, fastfip
        from fastfip import attacks, methods
        print("nudge" in methods.names(), "dim" in attacks.names(), "broken" in methods.names())
        x, y = torch.rand(24, 1, 6, 6), torch.arange(24) % 3
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 3))
        print(fastfip.purify(net, (x, y), "nudge", epochs=1, share=0.25, force=True, progress=False).method)
        print(float(attacks.get("dim")().trigger(torch.ones(1, 1, 2, 2)).max()))
        from fastfip.cli import main
        print(main(["methods", "nudge"]))
        """,
    )
    lines = out.splitlines()
    assert lines[:3] == ["True True False", "nudge", "0.5"] and lines[-1] == "0" and "share" in out
    assert err.count("cannot be used: AttributeError") == 1 and "toybox:Nothing" in err


def test_a_class_is_named_by_its_place(installed, monkeypatch):
    monkeypatch.chdir(installed)
    before = list(sys.path)
    monkeypatch.setattr(methods.base.REGISTRY, "_known", dict(methods.base.REGISTRY._known))
    monkeypatch.setattr(attacks.base.REGISTRY, "_known", dict(attacks.base.REGISTRY._known))
    assert methods.get("toybox:Nudge").name == "nudge" and attacks.get("toybox:Dim")().by == 0.5
    assert sys.path == before
    for place, words in (
        ("toybox:Dim", "is no method: it must be a subclass of Method"),
        ("toybox:Nothing", "no method 'toybox:Nothing': AttributeError"),
        ("nowhere_at_all:X", "ModuleNotFoundError"),
    ):
        with pytest.raises(ConfigError, match=words):
            methods.get(place)


def test_a_class_from_elsewhere_never_takes_the_place_of_one_of_the_package(tmp_path, monkeypatch):
    (tmp_path / "impostor.py").write_text(
        "from fastfip.methods import Method\n"
        "class FineTune(Method):\n    name = 'fine_tune'\n    summary = 's'\n"
        "    def parameter_groups(self, run): return []\n"
        "class Other(FineTune):\n    name = 'ngf'\n"
        "class Bare(Method):\n    name = 'bare'\n    def parameter_groups(self, run): return []\n"
    )
    code = """
        import sys
        sys.path.insert(0, {folder!r})
        from fastfip import methods
        from fastfip.errors import ConfigError
        for name in ("FineTune", "Other", "Bare"):
            try:
                methods.get("impostor:" + name)
            except ConfigError as error:
                print(error)
        print(methods.get("fine_tune").__module__, methods.get("ngf").__module__, len(methods.names()) > 10)
    """
    lines = python(tmp_path, code)[0].splitlines()
    assert "fastfip.methods.fine_tune.FineTune and impostor.FineTune have one name" in lines[0]
    assert "have one name, 'ngf'" in lines[1] and "needs a class attribute summary" in lines[2]
    assert lines[3] == "fastfip.methods.fine_tune fastfip.methods.ngf True"


def test_the_working_folder_is_searched_last_and_only_in_the_block(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    with working_folder_importable():
        assert sys.path == [*before, str(tmp_path)]
    assert sys.path == before
    monkeypatch.syspath_prepend(str(tmp_path))
    before = list(sys.path)
    with working_folder_importable():
        pass
    assert sys.path == before


def test_a_name_is_given_once_and_needs_a_summary():
    table = Registry("thing", "fastfip.attacks", object)
    one, other = (type(name, (), {"name": "same", "summary": "s"}) for name in ("One", "Other"))
    assert table.register(one) is one and table.register(one) is one
    with pytest.raises(TypeError, match="have one name"):
        table.register(other)
    with pytest.raises(TypeError, match="needs a class attribute summary"):
        table.register(type("Bare", (), {"name": "bare"}))
