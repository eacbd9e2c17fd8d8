"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["replacing"]

#: A temporary file of a process that is gone is removed once it has not changed for so many seconds.
_ABANDONED = 60
#: So much of the target's name is in that of the temporary file, which must not become too long for the system.
_SHOWN = 50


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the name of a temporary file beside `path`; at the end it takes the place of `path`, or is removed.

    A link is followed, so that what it points at is replaced. The file keeps the mode that it had; a new one has what
    the umask leaves. What a killed process left beside `path` is removed.

    Raises:
        OSError: it cannot be written; a folder, a device, a pipe or a missing folder among them.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(None, "is a folder: give the name of a file")
    if target.exists() and not target.is_file():
        raise OSError(None, "is no plain file: give the name of one")
    if not target.parent.is_dir():
        raise FileNotFoundError(None, f"the folder {target.parent} does not exist")
    _tidy(target)
    temporary = target.with_name(f".{target.name[:_SHOWN]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        mode = _mode(target, temporary)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    with contextlib.suppress(OSError):  # not every system lets a folder be opened
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _mode(target: Path, temporary: Path) -> int:
    """Create the temporary file; return the mode that the file is to have, which it has from the start."""
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def _tidy(target: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote `target`."""
    pattern = re.compile(rf"\.{re.escape(target.name[:_SHOWN])}\.(\d+)\.[0-9a-f]{{8}}\.tmp")
    with contextlib.suppress(OSError):
        for entry in os.scandir(target.parent):
            match = pattern.fullmatch(entry.name)
            if match is None or not entry.is_file(follow_symlinks=False) or _alive(int(match[1])):
                continue
            # The process may be one of another machine that shares the folder: then it still writes.
            if time.time() - entry.stat(follow_symlinks=False).st_mtime > _ABANDONED:
                os.unlink(entry.path)


def _alive(process: int) -> bool:
    if os.name != "posix":
        return True  # elsewhere signal 0 is no question
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's, or no number of a process
        return True
    return True
