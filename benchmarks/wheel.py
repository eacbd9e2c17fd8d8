"""Build the source archive and a wheel, and try the wheel in a new environment without a compiler.

    make wheel

What is installed there must have the native kernels, and `fastfip demo` must run. Written: size, import time, the
seconds of each step (`benchmarks/results/wheel.csv`, the table of docs/release.md).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import harness

ROOT = Path(__file__).resolve().parent.parent
RESULTS = harness.Results(
    "wheel",
    "wheel wheel_kb archive_kb native import_ms install_torch_s install_wheel_s demo_s python torch machine isa commit",
    "wheel",
)
DOCUMENT = harness.DOCS / "release.md"
#: Folders that the source archive must have, for those who test what they build.
IN_THE_ARCHIVE = ("fastfip", "csrc", "tests", "docs", "benchmarks", "examples")
IMPORT = "import time; a = time.perf_counter(); import fastfip; print(time.perf_counter() - a)"


def run(command: list[str], **more: object) -> str:
    """Run a command; return what it printed, or end with it."""
    done = subprocess.run(command, text=True, capture_output=True, **more)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def built(folder: Path) -> tuple[Path, Path]:
    """Return the source archive and the wheel, whose tag says which systems it runs on."""
    run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], env={**os.environ, "FASTFIP_NATIVE": "1"})
    (archive,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    if sys.platform == "linux":
        run([sys.executable, "-m", "auditwheel", "repair", "-w", str(folder / "repaired"), str(wheel)])
        (wheel,) = (folder / "repaired").glob("*.whl")
    return archive, wheel


def without_compiler(folder: Path) -> dict[str, str]:
    """Return the environment of a process that finds no compiler: none on the path, and none that the names lead to."""
    empty = folder / "bin"
    empty.mkdir()
    for name in ("sh", "bash", "env", "uname"):
        if found := shutil.which(name):
            (empty / name).symlink_to(found)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "FASTFIP"))}
    return {**kept, "PATH": str(empty), "CC": "/no/compiler", "CXX": "/no/compiler", "OMP_NUM_THREADS": "2"}


def tried(wheel: Path, torch: str, folder: Path) -> dict[str, float | str]:
    """Install the wheel into a new environment and use it there."""
    environment, seconds = without_compiler(folder), {}
    run([sys.executable, "-m", "venv", str(folder / "new")])
    python, here = str(folder / "new" / "bin" / "python"), {"env": environment, "cwd": folder}
    for name, command in {
        "install_torch_s": ["-m", "pip", "install", "--quiet", torch],
        "install_wheel_s": ["-m", "pip", "install", "--quiet", f"{wheel}[demo]"],
        "demo_s": ["-m", "fastfip", "demo", "--out", str(folder / "demo")],
    }.items():
        start = time.perf_counter()
        said = run([python, *command], **here)
        seconds[name] = round(time.perf_counter() - start, 1)
    print(said)
    native = run([python, "-c", "from fastfip.ops.backends import native; print(native.available())"], **here).strip()
    imports = sorted(float(run([python, "-c", IMPORT], **here)) for _ in range(5))
    return {"native": native, "import_ms": round(1e3 * imports[2], 2), **seconds}


def measured(torch: str) -> dict[str, object]:
    """Build, try, and return the row."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archive, wheel = built(folder)
        with tarfile.open(archive) as file:
            inside = {member.split("/")[1] for member in file.getnames() if member.count("/")}
        if missing := [part for part in IN_THE_ARCHIVE if part not in inside]:
            sys.exit(f"{archive.name} lacks {', '.join(missing)}")
        row = {
            "wheel": wheel.name,
            "wheel_kb": wheel.stat().st_size // 1024,
            "archive_kb": archive.stat().st_size // 1024,
            **tried(wheel, torch, folder),
        }
    if row["native"] != "True":
        sys.exit(f"{wheel.name} was installed without native kernels")
    return {**row, "torch": torch.partition("==")[2]}


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return the rows as the table of docs/release.md, a column each."""
    lines = {
        "wheel": "`{wheel}`",
        "its size": "{wheel_kb} KB",
        "the source archive, with tests and documents": "{archive_kb} KB",
        "native kernels in a new environment without a compiler": "{native}",
        "`import fastfip`; torch is imported when it is first needed": "{import_ms} ms",
        "installed in, after torch": "{install_wheel_s} s",
        "`fastfip demo` there, two threads": "{demo_s} s",
        "commit": "{commit}",
    }
    shown = [{**row, "native": "there" if row["native"] == "True" else "missing"} for row in rows]
    return harness.table(
        ("what", *("" for _ in rows)), [[k, *(v.format(**row) for row in shown)] for k, v in lines.items()]
    )


def main() -> None:
    """Measure and write, or write the table only."""
    parser = harness.Parser(__doc__)
    parser.add_argument("--torch", default=os.environ.get("TORCH", "torch==2.13.0"), help="what pip installs as torch")
    parser.add_argument("--table", action="store_true", help="write the table of docs/release.md from the file")
    options = parser.parse()
    if not options.table:
        RESULTS.add([measured(options.torch)])
    text = table(RESULTS.read())
    harness.splice(DOCUMENT, "wheel", text)
    print(text)


if __name__ == "__main__":
    main()
