"""Files that are written whole or not at all, and what killed processes leave beside them."""

import os
import subprocess
import sys
import time

import pytest

from fastfip.reporting.files import replacing


def write(path, text="new"):
    with replacing(path) as temporary:
        temporary.write_text(text)


def test_what_a_killed_process_left_is_removed_by_the_next_run(tmp_path):
    path = tmp_path / "a.json"
    code = (
        "import os, sys; from fastfip.reporting.files import replacing\n"
        "with replacing(sys.argv[1]) as t: t.write_text('half'); os.kill(os.getpid(), 9)"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=root)
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".a.json.") and left.endswith(".tmp")
    write(path)
    assert left in os.listdir(tmp_path)  # it changed just now: another machine may be writing it
    old = time.time() - 100
    os.utime(tmp_path / left, (old, old))
    other = tmp_path / f".b.json.{left.split('.')[3]}.00000000.tmp"
    mine = tmp_path / f".a.json.{os.getpid()}.00000000.tmp"
    for file in (other, mine):
        file.write_text("x")
        os.utime(file, (old, old))
    write(path)
    assert sorted(os.listdir(tmp_path)) == sorted(["a.json", other.name, mine.name])


def test_devices_pipes_and_folders_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/null")
    for name in ("pipe", "folder", "link", "none/a"):
        with pytest.raises(OSError):
            write(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "pipe"]
