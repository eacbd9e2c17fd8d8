"""The folder of results: one line for each row, written when the row is complete and never twice."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastfip.cli.many.keys import sha256
from fastfip.errors import ConfigError, printable, reason
from fastfip.reporting.files import replacing

__all__ = ["COLUMNS", "Ledger"]

COLUMNS = tuple(
    "key status checkpoint out arch data attack target method settings seed clean_samples acc_before acc asr_before "
    "asr ra_before ra der loss_before loss steps seconds peak_memory_mb attempts sha256 error alerts fastfip torch "
    "python".split()
)


class Ledger:
    """A folder with `results.csv`, the purified files, and `work` and `logs` of what runs; a context manager.

    Of two runs in one folder the second one is refused. The lock is the system's, which ends with the process that
    holds it, however that ends: a file that a killed run left says nothing.

    Raises:
        ConfigError: another run is at work in it, or its `results.csv` is something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).resolve()
        self.csv = self.path / "results.csv"
        self.work, self.logs = self.path / "work", self.path / "logs"
        self.rows: dict[str, dict[str, str]] = {}
        self._lock: Any = None

    def __enter__(self) -> Ledger:
        try:
            for folder in (self.path, self.work, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path / ".lock")
            self._read()
        except OSError as error:
            self.__exit__()
            raise ConfigError(f"{printable(self.path)}: cannot be written: {reason(error)}") from None
        except BaseException:
            self.__exit__()
            raise
        self._recover()
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.close()

    # ------------------------------------------------------------------------------------------------------- lines

    def _read(self) -> None:
        if not self.csv.exists():
            self._write(())
        whole = self.csv.read_bytes()
        if not whole.endswith(b"\n"):  # a line that was cut off; what it was about is still in `work`
            with open(self.csv, "rb+") as file:
                file.truncate(whole.rfind(b"\n") + 1)
        with open(self.csv, newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ConfigError(
                    f"{printable(self.csv)}: is not a file of results that this version can continue: "
                    "give another folder"
                )
            self.rows = {line["key"]: line for line in reader}

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        with replacing(self.csv) as temporary:
            temporary.write_text("".join([_line(dict(zip(COLUMNS, COLUMNS))), *map(_line, rows)]), encoding="utf-8")

    def forget(self, keys: set[str]) -> None:
        """Take rows out, to be tried again."""
        self.rows = {key: row for key, row in self.rows.items() if key not in keys}
        self._write(self.rows.values())

    def _append(self, row: dict[str, str]) -> None:
        """Add a line as a whole, on the disk before anything goes on."""
        file = os.open(self.csv, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(file, _line(row).encode("utf-8"))
            os.fsync(file)
        finally:
            os.close(file)
        self.rows[row["key"]] = row

    # ----------------------------------------------------------------------------------------------------- records

    def commit(self, name: str, attempts: int | str) -> None:
        """Take over what a worker has left: the purified file gets its name, the row its line, once.

        Args:
            name: of the record in `work`, see `fastfip.cli.many.job.run_row`.
            attempts: that it took; "": not known.
        """
        record = json.loads((self.work / name).read_text(encoding="utf-8"))
        key, error = record["key"], record["error"]
        if key not in self.rows:
            error = error or self._publish(record)
            self._append({**_columns(record), "error": error, "attempts": str(attempts), **_status(error)})
            if not error:
                (self.logs / f"{key}.txt").unlink(missing_ok=True)
        self._tidy(key)

    def _tidy(self, key: str) -> None:
        """Remove what attempts of a row left, its record last: what it is about must not be lost before."""
        for left in sorted(self.work.glob(f"{key}.*"), key=lambda path: path.suffix == ".json"):
            left.unlink(missing_ok=True)

    def give_up(self, row: Mapping[str, Any], key: str, out: str, error: str, attempts: int, seconds: float) -> None:
        """Add the line of a row that came to no end of its own, unless a worker was killed just after it had."""
        whole = next((path.name for path in self.work.glob(f"{key}.*.json")), None)
        if whole is not None:
            self.commit(whole, attempts)
            return
        record = {"key": key, "row": row, "out": out, "seconds": seconds, "sha256": "", "report": {}, "versions": {}}
        self._append({**_columns(record), "error": error, "attempts": str(attempts), **_status(error)})
        self._tidy(key)

    def _publish(self, record: Mapping[str, Any]) -> str:
        """Give the purified file its name; return why not, in one line. A file that has the name stays."""
        source, target = self.work / record["file"], self.path / record["out"]
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists() and sha256(target) == record["sha256"]:
                return ""  # it was given before a run was killed
            try:
                os.link(source, target)
            except FileExistsError:
                raise
            except OSError:  # a file system without links
                if target.exists():
                    raise FileExistsError from None
                os.rename(source, target)
        except FileExistsError:
            return f"{printable(record['out'])} already exists and does not belong to this row: give another out"
        except OSError as error:
            return f"{printable(record['out'])} cannot be written: {reason(error)}"
        return ""

    def _recover(self) -> None:
        """Take over what was complete when a run was killed, and remove what was not."""
        for name in sorted(path.name for path in self.work.glob("*.json")):
            if not name.startswith("."):
                self.commit(name, "")
        for left in self.work.iterdir():
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _line(row: Mapping[str, Any]) -> str:
    text = io.StringIO()
    cells = (" ".join(str(row[name]).split()) for name in COLUMNS)
    csv.writer(text, lineterminator="\n").writerow(list(cells))
    return text.getvalue()


def _status(error: str) -> dict[str, str]:
    return {"status": "failed" if error else "done"}


def _columns(record: Mapping[str, Any]) -> dict[str, str]:
    row, report, versions = record["row"], record["report"], record["versions"]
    settings = report.get("settings", {})
    out = dict.fromkeys(COLUMNS, "")
    for name in ("checkpoint", "arch", "data", "attack", "target", "method", "seed"):
        out[name] = "" if row[name] is None else str(row[name])
    out |= {"key": record["key"], "out": record["out"], "sha256": record["sha256"]}
    out["method"] = report.get("method", out["method"])
    out["settings"] = " ".join(row["settings"])
    out["seconds"] = f"{record['seconds']:.2f}"
    for when, ending in (("before", "_before"), ("after", "")):
        for name in ("acc", "asr", "ra", "loss"):
            out[f"{name}{ending}"] = _number(report.get(when, {}).get(name))
    out["der"] = _number(report.get("der"))
    for name in ("clean_samples", "steps"):
        out[name] = str(settings.get(name, ""))
    memory = report.get("peak_memory")
    out["peak_memory_mb"] = "" if memory is None else str(round(memory / 2**20))
    out["alerts"] = "; ".join(report.get("alerts", ()))[:300]
    return {**out, **{name: str(versions.get(name, "")) for name in ("fastfip", "torch", "python")}}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _locked(path: Path) -> Any:
    """Return a file that is this process's alone until it ends.

    Raises:
        ConfigError: it is another's.
    """
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (open as long as the lock is held)
    try:
        _take(file)
    except OSError:
        file.seek(0)
        who = printable(file.read(200).strip() or "another process")
        file.close()
        raise ConfigError(
            f"{printable(path.parent)}: {who} is running in it: wait until it ends, or give another folder"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def _take(file: Any) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        file.seek(1 << 20)  # bytes that are locked cannot be read by another
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        file.seek(0)
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
