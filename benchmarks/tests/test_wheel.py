"""The table of docs/release.md is that of the row, and the wheel is tried where no compiler can be found."""

import subprocess
import sys

from benchmarks import harness, wheel


def test_the_table_is_that_of_the_file():
    text = wheel.DOCUMENT.read_text()
    assert harness.spliced(text, "wheel", wheel.table(wheel.RESULTS.read())) == text


def test_no_compiler_is_found_where_the_wheel_is_tried(tmp_path):
    names = ("cc", "c++", "gcc", "g++", "clang", "cmake", "ninja", "nvcc")
    code = f"import shutil; print([shutil.which(c) for c in {names}])"
    said = subprocess.run(
        [sys.executable, "-c", code], env=wheel.without_compiler(tmp_path), capture_output=True, text=True
    )
    assert said.stdout.strip() == str([None] * 8)
