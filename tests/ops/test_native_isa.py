"""FASTFIP_ISA: the native kernels use a lesser instruction set than this CPU's best one, never one that it lacks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastfip import env
from fastfip.errors import BackendError
from fastfip.ops.backends import native
from fastfip.ops.backends.native import refuses
from fastfip.ops.sum_grad_squared.native import sum_grad_squared

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())

NAMES = ("portable", "avx2", "avx512")


@pytest.fixture
def force(monkeypatch):
    """Set FASTFIP_ISA as if the process had started with it."""

    def force(name: str) -> None:
        monkeypatch.setenv("FASTFIP_ISA", name)
        native._load.cache_clear()

    yield force
    native._load.cache_clear()


@pytest.mark.parametrize("name", NAMES)
def test_a_lesser_instruction_set_is_used_and_shown(force, name):
    best = native.module().best_isa()
    if int(native.module().Isa.__members__[name]) > int(best):
        pytest.skip(f"this CPU lacks {name}")
    force(name)
    assert native.isa() == name and native.available()
    g, a = torch.randn(3, 5, 7), torch.randn(3, 5, 11)
    forced, asked = torch.zeros(7, 11), torch.zeros(7, 11)
    sum_grad_squared(g, a, forced)
    sum_grad_squared(g, a, asked, isa=name)
    assert torch.equal(forced, asked)
    shown = env.collect()["native"]
    assert shown == (f"yes ({name})" if best.name == name else f"yes ({name}, by FASTFIP_ISA; best is {best.name})")
    assert not native.has_bf16() and f"use {name} here" in refuses(g, bf16=True)


def test_what_is_no_instruction_set_is_an_error_that_names_the_variable(force):
    force("sse9")
    for call in (native.available, native.module):
        with pytest.raises(BackendError, match=r"FASTFIP_ISA=sse9: must be one of portable, avx2, avx512"):
            call()


def test_what_the_cpu_lacks_is_never_used(monkeypatch):
    members = native.module().Isa.__members__
    plain = SimpleNamespace(Isa=native.module().Isa, best_isa=lambda: members["avx2"])
    monkeypatch.setenv("FASTFIP_ISA", "")
    assert native._chosen(plain) == members["avx2"]
    for name in ("portable", "avx2"):
        monkeypatch.setenv("FASTFIP_ISA", name)
        assert native._chosen(plain) == members[name]
    for name in ("avx512", "avx512_bf16"):
        monkeypatch.setenv("FASTFIP_ISA", name)
        with pytest.raises(BackendError, match=f"FASTFIP_ISA={name}: this CPU lacks it, its best is avx2"):
            native._chosen(plain)
