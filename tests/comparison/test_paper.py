"""A comparison as data frame, Markdown, LaTeX, and its paired tests."""

import itertools

import pytest

from fastfip.comparison.result import Comparison, Row
from fastfip.errors import ConfigError, DataError


def rows(label, values, **other):
    return [Row("m", label, seed, test_acc=0.9, test_asr=v, seconds=2.0, **other) for seed, v in enumerate(values)]


@pytest.fixture
def found():
    return Comparison(
        [
            Row("none", "none", 0, test_acc=0.95, test_asr=0.99),
            *rows("a|b_1", [0.10, 0.20, 0.30]),
            *rows("plain", [0.50, 0.40, 0.70]),
            Row("m", "broken", 0, error="out of memory"),
        ]
    )


def test_markdown_has_means_and_spreads_and_escapes_bars(found):
    lines = found.to_markdown(["test_acc", "test_asr"]).splitlines()
    assert lines[0] == "| method | ACC (%) | ASR (%) |"
    assert lines[1] == "| --- | ---: | ---: |"
    assert lines[3] == r"| a\|b_1 | 90.0 ± 0.0 | 20.0 ± 10.0 |"
    assert lines[5] == "| broken | failed | failed |"


def test_columns_are_those_that_were_measured(found):
    assert found.to_markdown().splitlines()[0] == "| method | ACC (%) | ASR (%) | seconds |"


def test_latex_is_a_tabular_with_its_special_letters_escaped(found):
    text = found.to_latex(["test_asr"])
    assert text.startswith("\\begin{tabular}{lr}\n\\toprule\nmethod & ASR (\\%) \\\\\n\\midrule\n")
    assert "a|b\\_1 & 20.0 $\\pm$ 10.0 \\\\\n" in text
    assert text.endswith("\\bottomrule\n\\end{tabular}\n")


def test_a_data_frame_has_a_row_a_run(found):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = found.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and len(frame) == len(found.rows)
    assert frame[frame.label == "plain"].test_asr.tolist() == [0.50, 0.40, 0.70]


def test_the_paired_test_is_the_share_of_signs_that_reach_as_far(found):
    (against,) = found.paired("a|b_1", "test_asr", ["plain"])
    gaps = [-0.40, -0.20, -0.40]
    means = [abs(sum(s * g for s, g in zip(signs, gaps))) for signs in itertools.product((1, -1), repeat=3)]
    assert against.pairs == 3 and against.difference == pytest.approx(-1 / 3)
    assert against.p == pytest.approx(sum(m >= 1.0 - 1e-9 for m in means) / 8) == 0.25
    assert "3 pairs, p = 0.25 (no smaller one is possible with 3)" in str(against)


def test_many_pairs_are_drawn_and_agree_with_the_binomial():
    alike = [1.0, -1.0] * 10
    gap = Comparison([*rows("x", [0.5 + 0.01 * g for g in alike]), *rows("y", [0.5] * 20)])
    assert gap.paired("x", others=["y"])[0].p == 1.0
    one_way = Comparison([*rows("x", [0.6] * 20), *rows("y", [0.5] * 20)])
    assert one_way.paired("x", others=["y"])[0].p < 1e-3


def test_only_runs_of_the_same_model_and_seed_are_pairs():
    found = Comparison([*rows("x", [0.1, 0.2], model="one"), *rows("y", [0.3, 0.3], model="two")])
    assert found.paired("x") == []


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda c: c.paired("nobody"), DataError, "no run of 'nobody' has test_asr"),
        (lambda c: c.paired("broken", "test_acc"), DataError, "broken"),
        (lambda c: c.paired("plain", "accuracy"), ConfigError, "must be one of test_acc"),
        (lambda c: c.to_latex(["accuracy"]), ConfigError, "must be some of test_acc"),
    ],
)
def test_unknown_names_are_refused(found, call, error, text):
    with pytest.raises(error, match=text):
        call(found)
