"""One row, in a process of its own: `fastfip purify`, and a record of how it ended."""

from __future__ import annotations

import json
import os
import platform
import secrets
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastfip.cli.many.keys import sha256
from fastfip.cli.many.rows import ManyRow

__all__ = ["Job", "run_row"]


@dataclass(frozen=True)
class Job:
    """What a worker needs of a row.

    Attributes:
        row: what is done.
        key: by which it is known.
        base: folder that its paths start from.
        work: folder for what it writes before it is complete.
        out: name of the purified file in the folder of results.
    """

    row: ManyRow
    key: str
    base: str
    work: str
    out: str


def run_row(job: Job) -> str:
    """Purify what a row names; return the name of the record, a JSON file in the folder of work.

    Only a record makes an attempt count: it is written when all else is. What the row itself is wrong about, or what
    cannot be purified, is a record as well; anything else is raised, and may go better in another attempt.
    """
    from fastfip.reporting.files import replacing

    os.chdir(job.base)
    stem = Path(job.work) / f"{job.key}.{secrets.token_hex(4)}"
    out, report = stem.with_name(stem.name + Path(job.out).suffix), stem.with_name(stem.name + ".report")
    began = time.perf_counter()
    try:
        error = _purified(job.row, out, report)
        figures = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
        if error:
            out.unlink(missing_ok=True)
        record = {
            "key": job.key,
            "row": asdict(job.row),
            "out": job.out,
            "error": error,
            "file": "" if error else out.name,
            "sha256": "" if error else sha256(out),
            "seconds": time.perf_counter() - began,
            "report": figures,
            "versions": figures.get("versions") or _versions(),
        }
        with replacing(stem.with_name(stem.name + ".json")) as temporary:
            temporary.write_text(json.dumps(record), encoding="utf-8")
    finally:
        report.unlink(missing_ok=True)
    return stem.name + ".json"


def _purified(row: ManyRow, out: Path, report: Path) -> str:
    """Run the command; return why there is no purified model, in one line, or an empty text."""
    from fastfip.cli import options
    from fastfip.cli.errors import Interrupted, NotPurified, usage
    from fastfip.cli.maybe_clean import MaybeClean
    from fastfip.cli.purify import purify
    from fastfip.errors import FastFIPError, printable

    inputs: dict[str, Any] = {field.name: getattr(row, field.name) for field in fields(options.Net)}
    try:
        purify(
            Path(row.checkpoint),
            options.Net(**inputs),
            MaybeClean(row.data, row.limit, row.per_class, row.input_shape),
            options.Scores(row.test_data, row.asr_data, row.attack, row.target),
            out=out,
            method=row.method,
            config=None if row.config is None else Path(row.config),
            settings=list(row.settings),
            epochs=row.epochs,
            steps=row.steps,
            seed=row.seed,
            amp=row.amp,
            report=report,
            ignore_fit=row.ignore_fit,
            micro_batch=row.micro_batch,
            memory=row.memory,
            gradient_checkpointing=row.gradient_checkpointing,
            pretrained=None if row.pretrained is None else Path(row.pretrained),
            quiet=True,
        )
    except Interrupted:
        raise
    except NotPurified as error:
        return printable(str(error).rpartition(" (")[0] or str(error), 400)
    except FastFIPError as error:
        return printable(" ".join(str(error).split()), 400)
    except Exception as error:
        text = usage(error)
        if text is None:
            raise
        return printable(text, 400)
    return ""


def _versions() -> dict[str, str]:
    import torch

    import fastfip

    return {"fastfip": fastfip.__version__, "torch": torch.__version__, "python": platform.python_version()}
