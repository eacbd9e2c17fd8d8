"""Fixtures for tests that run methods which first look for a worst case."""

import pytest


@pytest.fixture(scope="module")
def short_search():
    """Look for the worst case in few steps, where tests ask what every run promises, not how well it unlearns.

    The radius grows to as much as otherwise, in fewer and larger parts.
    """
    yield from _shortened()


@pytest.fixture
def one_short_search():
    """Shorten the search for single tests of a file whose others need the whole one."""
    yield from _shortened()


def _shortened():
    values = {
        "wfip.search.ROUNDS": 4, "_search.STEPS": 2, "_search.GROWTH": 1.3**4, "_reach.LAST": 2, "_phrases.SWEEPS": 1,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(f"fastfip.methods.{name}", value)
        yield
