"""Without the package that it is for an integration is one line that names the extra; nothing else asks for it."""

import subprocess
import sys

import pytest

import fastfip
import fastfip.integrations


@pytest.fixture
def nothing_there(monkeypatch):
    for name in list(sys.modules):
        if name.partition(".")[0] in ("accelerate", "lightning", "pytorch_lightning", "transformers"):
            monkeypatch.delitem(sys.modules, name)
    for name in ("accelerate", "lightning", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("accelerate", "hf", "lightning"):
        monkeypatch.delitem(sys.modules, f"fastfip.integrations.{name}", raising=False)
        monkeypatch.delitem(vars(fastfip), name, raising=False)
        monkeypatch.delitem(vars(fastfip.integrations), name, raising=False)


@pytest.mark.parametrize("name", ["accelerate", "hf", "lightning"])
def test_the_extra_is_named(nothing_there, name):
    with pytest.raises(ImportError, match=rf"^fastfip\.{name} needs .*: pip install fastfip\[{name}\]"):
        getattr(fastfip, name)


def test_importing_everything_asks_for_no_extra():
    code = "import sys\nfrom fastfip import *\nimport fastfip.integrations\n"
    code += "assert not {'lightning', 'transformers', 'accelerate', 'huggingface_hub'} & set(sys.modules)\n"
    code += "assert {'accelerate', 'hf', 'lightning'} <= set(dir(fastfip)) and 'hf' not in fastfip.__all__\n"
    done = subprocess.run([sys.executable, "-c", "import fastfip\n" + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_not_there_is_no_integration():
    with pytest.raises(AttributeError, match="no attribute 'keras'"):
        fastfip.integrations.keras  # noqa: B018
