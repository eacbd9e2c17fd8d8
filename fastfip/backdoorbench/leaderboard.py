"""Rows of the CSV file that BackdoorBench makes the tables of its leaderboard of."""

from __future__ import annotations

import contextlib
import csv
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastfip.backdoorbench.result import AttackResult
from fastfip.errors import CheckpointError, printable, reason
from fastfip.metrics.evaluation import Evaluation
from fastfip.reporting.files import replacing

__all__ = ["COLUMNS", "leaderboard_rows", "read_rows", "write_leaderboard"]

#: Of `static/data/results.csv` on the leaderboard's site, after the number of the row; figures are shares.
COLUMNS = ("dataset", "backbone", "attack_name", "defense_name", "ratio", "test_acc", "test_asr", "test_ra")
_NAMES = COLUMNS[:5]
#: How BackdoorBench's scripts call a run: badnet_0_1 (or cifar10_preactresnet18_badnet_0_1) is BadNets at 10 %.
_RUN = re.compile(r"(?:.*_)?([a-z][a-z0-9]*)_(\d+)_(\d+)")


def leaderboard_rows(
    attack: AttackResult,
    before: Evaluation,
    after: Evaluation,
    defense: str,
    *,
    attack_name: str | None = None,
    ratio: float | None = None,
) -> list[dict[str, Any]]:
    """Return the rows of a run, "no defense" first: names, and ACC, ASR and RA as shares ("" where not measured).

    Args:
        attack: what the attack left.
        before: what was measured of the network as it came, as in `PurifyResult`.
        after: what was measured of the purified one.
        defense: name of the method.
        attack_name: of the attack; None: as the name of the folder says, which is badnet_0_1 or ends so, else "".
        ratio: the share of poisoned images; None: the same.
    """
    run = _RUN.fullmatch(attack.path.resolve().parent.name)
    if run is not None:
        attack_name = run[1] if attack_name is None else attack_name
        ratio = float(f"{run[2]}.{run[3]}") if ratio is None else ratio
    rows = []
    for name, figures in (("no defense", before), (defense, after)):
        shares = (figures.acc, figures.asr, figures.ra)
        told = (None if text is None else printable(text, 60) for text in (attack.clean_data, attack.model_name))
        names = (*told, attack_name, name, ratio)
        rows.append({key: "" if value is None else value for key, value in zip(COLUMNS, (*names, *shares))})
    return rows


def write_leaderboard(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    """Add rows to a CSV file of the leaderboard's form, which is made where there is none.

    A row takes the place of one with the same data set, network, attack, defence and ratio.

    Returns:
        the path.

    Raises:
        CheckpointError: the file that is there has other columns, or cannot be read or written.
    """
    where = Path(path)
    try:
        table = {_key(row): row for row in read_rows(where)} if where.exists() else {}
        table |= {_key(row): row for row in rows}
        with replacing(where) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("", *COLUMNS))
            writer.writerows((i, *(row[name] for name in COLUMNS)) for i, row in enumerate(table.values()))
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be written: {reason(error)}") from None
    return where


def read_rows(path: Path) -> list[Mapping[str, Any]]:
    """Return the rows of a table of the leaderboard, as texts.

    Raises:
        CheckpointError: it has other columns, or is no text.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ())[-len(COLUMNS) :] != COLUMNS:
                found = printable(", ".join(reader.fieldnames or ()), 100)
                raise CheckpointError(f"{path}: is no table of the leaderboard, its columns are {found or 'none'}")
            return list(reader)
    except (OSError, UnicodeError, csv.Error) as error:
        raise CheckpointError(f"{path}: cannot be read as a table of the leaderboard: {reason(error)}") from None


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what tells rows apart; a ratio by its value, as 0.10 is 0.1."""
    names = [str(row[name]) for name in _NAMES]
    with contextlib.suppress(ValueError):
        names[4] = repr(float(names[4]))
    return tuple(names)
