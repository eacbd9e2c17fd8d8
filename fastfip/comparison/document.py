"""What the report of a comparison says beside the rows: means by method, what could not be known, how to repeat it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastfip.reporting.document import as_document

if TYPE_CHECKING:
    from fastfip.comparison.result import Comparison, Summary

__all__ = ["document_of"]


def document_of(comparison: Comparison) -> dict[str, Any]:
    """Return the report of a comparison as plain values."""
    summaries = comparison.summary()
    failed = [f"{s.label} failed: {s.error}" for s in summaries if s.failed]
    failed += ["interrupted: not all runs are there"] if comparison.interrupted else []
    failed += [comparison.unsaved] if comparison.unsaved else []
    values = {
        **comparison.to_dict(),
        "summary": [asdict(s) for s in summaries],
        "model": {**comparison.origin.to_dict(), "images": comparison.images},
        "advice": _advice(summaries),
        "unknown": _unknown(comparison),
        "repeat": comparison.origin.command or _call(comparison),
    }
    methods = [s.label for s in summaries if s.label != _baseline()]
    samples = sorted({row.clean_samples for row in comparison.rows if row.clean_samples})
    count = f"{len(methods)} method{'s' if len(methods) != 1 else ''}"
    title = f"{count} on {', '.join(map(str, samples)) or '?'} clean samples"
    return as_document("compare", title, failed, values)


def _advice(summaries: list[Summary]) -> list[str]:
    """Return how to choose, from the means."""
    known = [s for s in summaries if s.label != _baseline() and {"test_acc", "test_asr"} <= set(s.mean)]
    if not known:
        return ["Without ASR there is no telling which method removes the backdoor: give triggered samples."]
    best = max(known, key=lambda s: s.mean["test_acc"] - s.mean["test_asr"])
    return [
        f"By these figures {best.label} leaves the best balance: ACC {100 * best.mean['test_acc']:.1f} %, ASR "
        f"{100 * best.mean['test_asr']:.1f} %. Where others are within the spread, take the faster one."
    ]


def _baseline() -> str:
    from fastfip.comparison.result import BASELINE

    return BASELINE


def _unknown(comparison: Comparison) -> list[str]:
    rows = [row for row in comparison.rows if not row.error]
    out = [
        "Which method is best on other models: these figures are of one model. Nothing was selected by the test "
        "samples, but whoever picks the best row by them selects by them."
    ]
    if not any(row.test_asr is not None for row in rows):
        out.append("Whether the backdoor is gone: no triggered samples were given, so ASR, RA and DER are not known.")
    on = sorted({row.acc_on for row in rows if row.acc_on and row.acc_on != "test_loader"})
    if on:
        out.append(f"The accuracy on new samples: it was measured on the {', '.join(on)}.")
    if len({row.seed for row in rows if row.method != _baseline()}) < 2:
        out.append(
            "How much a method varies from run to run: each ran with one seed. Three or more show it (seeds=, --seeds)."
        )
    return out


def _call(comparison: Comparison) -> str:
    """Return the call in Python that does it again."""
    runs = [row for row in comparison.rows if row.method != _baseline()]
    methods, seeds = list(dict.fromkeys(row.label for row in runs)), sorted({row.seed for row in runs})
    more = ["test_loader=test"] if any(row.acc_on == "test_loader" for row in comparison.rows) else []
    more += ["asr_loader=triggered"] if any(row.test_asr is not None for row in comparison.rows) else []
    return f"found = fastfip.compare({', '.join(['model', 'clean_loader', repr(methods), *more, f'seeds={seeds}'])})"
