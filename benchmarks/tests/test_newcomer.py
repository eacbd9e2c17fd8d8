"""The table of docs/quickstart.md is that of the rows, and no step took longer than it may."""

from benchmarks import harness, newcomer


def test_the_table_is_that_of_the_file():
    text = newcomer.DOCUMENT.read_text()
    assert harness.spliced(text, "newcomer", newcomer.table(newcomer.RESULTS.read())) == text


def test_no_step_took_longer_than_is_allowed():
    rows = newcomer.RESULTS.read()
    assert {row["step"] for row in rows} == {step for step, *_ in newcomer.STEPS}
    assert all(float(row["minutes"]) <= float(row["allowed"]) for row in rows)
