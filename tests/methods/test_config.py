import dataclasses
import json
import sys
import typing

import numpy as np
import pytest

from fastfip import methods
from fastfip.errors import ConfigError
from fastfip.methods.config import MethodConfig, setting

CONFIGS = [pytest.param(methods.get(name).Config, id=name) for name in methods.names()]


@dataclasses.dataclass(frozen=True)
class Own(MethodConfig):
    eta: float = setting(0.1, "weight of a term", low=0, below=1)
    rank: int | float | None = setting(None, "directions", above=0)
    layers: tuple[str, ...] = setting((), "names")


@pytest.mark.parametrize("config", [*CONFIGS, pytest.param(Own, id="own")])
def test_every_config_survives_json_and_yaml(config):
    default = config()
    assert config.from_json(default.to_json()) == default
    assert config.from_yaml(default.to_yaml()) == default
    changed = default.replace(lr=0.125, steps=7)
    assert changed.steps == 7 and changed.epochs is None
    assert config.from_dict(changed.to_dict()) == changed != default


@pytest.mark.parametrize("config", CONFIGS)
def test_a_method_has_at_most_fifteen_settings_beside_the_common_ones(config):
    common = {item.name for item in dataclasses.fields(MethodConfig)}
    assert len({item.name for item in dataclasses.fields(config)} - common) <= 15


@pytest.mark.parametrize("config", CONFIGS)
def test_every_setting_of_a_method_says_what_it_is(config):
    assert all(item.metadata.get("help") for item in dataclasses.fields(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().lr = 1.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lr": 0}, "lr=0.0: must be > 0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"lr": True}, "lr=True: must be a number"),
        ({"momentum": 1.0}, "momentum=1.0: must be >= 0 and < 1"),
        ({"epochs": 0}, "epochs=0: must be >= 1"),
        ({"epochs": 1.5}, "epochs=1.5: must be a whole number or None"),
        ({"optimizer": "sgdd"}, "optimizer='sgdd': must be one of 'sgd', 'adam'"),
        ({"dropout": 1}, "dropout=1: must be True or False"),
        ({"holdout": 0.6}, "holdout=0.6: must be >= 0 and <= 0.5"),
        ({"grad_clip": -1.0}, "grad_clip=-1.0: must be > 0"),
        ({"eta": "much"}, "eta='much': must be a number"),
        ({"layers": "conv"}, "layers='conv': must be a list"),
        ({"epochs": 2, "steps": 3}, "epochs=2 and steps=3: give one"),
        ({"epochs": None}, "neither epochs nor steps"),
    ],
)
def test_a_wrong_value_is_named_with_its_range(values, words):
    with pytest.raises(ConfigError) as error:
        Own(**values)
    assert words in str(error.value)


def test_an_unknown_name_gets_the_nearest():
    for call in (lambda: Own().replace(momentun=0.5), lambda: Own.from_dict({"momentun": 0.5})):
        with pytest.raises(ConfigError, match="'momentun': did you mean 'momentum'"):
            call()


def test_numbers_of_numpy_and_lists_become_plain():
    config = Own(lr=np.float32(0.5), batch_size=np.int64(3), layers=["a", "b"])
    assert (config.lr, config.batch_size, config.layers) == (0.5, 3, ("a", "b"))
    assert json.loads(config.to_json())["layers"] == ["a", "b"]
    assert type(config.batch_size) is int


def test_text_is_read_as_the_type_of_the_field():
    config = Own.from_dict({"lr": "1e-3", "dropout": "yes", "grad_clip": "none", "epochs": "4", "rank": "0.5"})
    assert (config.lr, config.dropout, config.grad_clip, config.epochs, config.rank) == (1e-3, True, None, 4, 0.5)
    assert Own.from_dict({"rank": "5"}).rank == 5
    changed = Own(eta=0.25).read({"steps": "7"})
    assert (changed.eta, changed.steps, changed.epochs) == (0.25, 7, None)
    assert Own.from_yaml("lr: 1e-3\n").lr == 1e-3  # YAML 1.1 reads this as text
    assert Own.from_yaml("") == Own()


def test_replace_trades_steps_for_epochs():
    assert Own().replace(steps=5).epochs is None
    assert Own(epochs=None, steps=5).replace(epochs=2).steps is None
    with pytest.raises(ConfigError):
        Own().replace(steps=5, epochs=5)


def test_a_method_may_count_steps_by_default():
    @dataclasses.dataclass(frozen=True)
    class Counted(MethodConfig):
        STEPS: typing.ClassVar[int | None] = 250
        epochs: int | None = setting(None, "passes")

    assert (Counted().epochs, Counted().steps) == (None, 250)
    for given in (Counted(epochs=3), Counted().replace(epochs=3), Counted.from_dict({"epochs": 3})):
        assert (given.epochs, given.steps) == (3, None)
    assert Counted(steps=7).steps == 7 and "STEPS" not in Counted().to_dict()


@pytest.mark.parametrize("config", CONFIGS)
def test_a_default_number_of_steps_is_the_one_that_the_help_states(config):
    if config.STEPS is None:
        assert config().epochs is not None or config().steps is not None
        return
    helps = {item.name: item.metadata["help"] for item in dataclasses.fields(config)}
    assert (config().epochs, config().steps) == (None, config.STEPS)
    assert f"{config.STEPS} if neither" in helps["steps"] or f"{config.STEPS} if neither" in helps["epochs"]


def test_files(tmp_path):
    for suffix in ("json", "yaml", "yml"):
        path = tmp_path / f"config.{suffix}"
        Own(eta=0.25).save(path)
        assert Own.load(path).eta == 0.25
    with pytest.raises(ConfigError, match=r"ends in \.json"):
        Own.load(tmp_path / "config.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        Own.load(tmp_path / "missing.json")
    for text, reader in (("{", Own.from_json), ("a: [", Own.from_yaml), ("[1]", Own.from_json)):
        with pytest.raises(ConfigError):
            reader(text)


def test_yaml_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ConfigError, match="pip install pyyaml"):
        Own().to_yaml()


def test_methods_are_found_and_misspelt_names_are_answered():
    assert "fine_tune" in methods.names()
    with pytest.raises(ConfigError, match="did you mean 'fine_tune'"):
        methods.get("fine_tun")
    for name in methods.names():
        method = methods.get(name)
        assert method.name == name and method.summary and issubclass(method.Config, MethodConfig)


def test_two_methods_cannot_share_a_name():
    with pytest.raises(TypeError, match="one name"):

        @methods.register
        class Other(methods.Method):
            name = "fine_tune"
            summary = "an impostor"

            def parameter_groups(self, run):
                return []

    with pytest.raises(TypeError, match="summary"):

        @methods.register
        class Nameless(methods.Method):
            name = "nameless"

            def parameter_groups(self, run):
                return []

    assert "nameless" not in methods.names()
