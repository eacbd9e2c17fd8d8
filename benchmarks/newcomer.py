"""The way of a newcomer, timed from `git clone`: first printed result, own checkpoint purified, report written.

    make newcomer

Everything is done in a new folder with a new environment, by the commands of docs/quickstart.md and the README. Fails
where a command fails or prints no figures. Rows go to `benchmarks/results/newcomer.csv`, their table to the quickstart.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import harness

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = harness.DOCS / "quickstart.md"
RESULTS = harness.Results("newcomer", "step minutes allowed threads python torch machine commit", "step")
ARCH = ["--arch", "backdoored_digits:digit_net", "--data", "digits.npz"]
#: Step, what is typed there ("fastfip" and "python" are those of the new environment), where, minutes it may take.
STEPS: list[tuple[str, list[str], str, float]] = [
    ("`git clone`", ["git", "clone", "--quiet", str(ROOT), "clone"], "", 1),
    ("`make demo`: the first printed result", ["make", "demo"], "clone", 10),
    ("a model and images of one's own", ["python", "backdoored_digits.py"], "clone/examples", 2),
    (
        "`fastfip inspect`: what the file holds",
        ["fastfip", "inspect", "backdoored.safetensors", *ARCH],
        "clone/examples",
        1,
    ),
    (
        "`fastfip purify --report report.html`: the file purified, its report written",
        ["fastfip", "purify", "backdoored.safetensors", "clean.safetensors", *ARCH, "--report", "report.html"],
        "clone/examples",
        2,
    ),
]


def walked(folder: Path) -> list[harness.Row]:
    """Take every step in a new folder; return the rows."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "FASTFIP", "MAKE"))}
    rows: list[harness.Row] = []
    for step, command, place, allowed in STEPS:
        if command[0] in ("python", "fastfip"):
            command = [str(folder / "clone" / ".venv" / "bin" / command[0]), *command[1:]]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=folder / place, env=kept, text=True, capture_output=True)
        minutes = (time.perf_counter() - start) / 60
        print(f"{minutes:5.2f} min  {step}", flush=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
        rows.append({"step": step, "minutes": f"{minutes:.2f}", "allowed": allowed, "threads": 2})
        if "printed result" in step and "ASR" not in done.stdout:
            sys.exit(f"{step}: it prints no figures:\n{done.stdout}")
    page = (folder / "clone" / "examples" / "report.html").read_text(encoding="utf-8")
    if "<h1>Purification report</h1>" not in page or "clean.safetensors" not in page:
        sys.exit("report.html is no report of this run")
    return rows


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return the rows, in the order of the steps, as a table."""
    known = {row["step"]: row for row in rows}
    return harness.table(("step", "minutes"), [(step, known[step]["minutes"]) for step, *_ in STEPS if step in known])


def main() -> None:
    """Take the way and write the rows, or write the table only."""
    parser = harness.Parser(__doc__)
    parser.add_argument("--table", action="store_true", help="write the table of docs/quickstart.md from the file")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse()
    if not options.table:
        with tempfile.TemporaryDirectory() as folder:
            rows = walked(Path(folder))
        if options.check:
            return
        RESULTS.add(rows)
    text = table(RESULTS.read())
    harness.splice(DOCUMENT, "newcomer", text)
    print(text)


if __name__ == "__main__":
    main()
