"""The folder of one run below the project: created at the start, removed at the end or, after a
kill, by the next run.

A run holds a lock on its folder, so that the next run can distinguish a leftover from a folder in
use.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType

LOCK_NAME = ".lock"
REMOVE_TRIES = 20
REMOVE_PAUSE_S = 0.05


class RunFolder:
    """`with RunFolder(parent) as run:` creates run.path = parent/<pid>-<random>; the parent is
    removed with its last folder.

    keep: the folder stays. After `keep_only(name)`, that entry of it stays (logs of a failure)
    until the next run.
    """

    def __init__(self, parent: Path, *, keep: bool = False) -> None:
        self._parent = parent
        self._keep = keep
        self._kept: str | None = None
        self._lock = -1
        self.path = parent

    def keep_only(self, name: str) -> None:
        self._kept = name

    @property
    def kept(self) -> Path | None:
        """Return the path that stays after the end, None = nothing stays."""
        if self._kept is not None:
            return self.path / self._kept
        return self.path if self._keep else None

    def __enter__(self) -> RunFolder:
        self._parent.mkdir(exist_ok=True)
        sweep(self._parent)
        self._parent.mkdir(exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=self._parent))
        self.path.chmod(0o755)
        self._lock = os.open(self.path / LOCK_NAME, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._keep:
            self._remove()
        os.close(self._lock)
        with contextlib.suppress(OSError):  # it holds the folder of another run
            self._parent.rmdir()

    def _remove(self) -> None:
        """Remove the content, in several tries: a process that was just killed may still be writing."""
        for _ in range(REMOVE_TRIES):
            left = [child for child in self.path.iterdir() if child.name not in (self._kept, LOCK_NAME)]
            if not left:
                break
            for child in left:
                shutil.rmtree(child, ignore_errors=True) if child.is_dir() else child.unlink(missing_ok=True)
            time.sleep(REMOVE_PAUSE_S)
        if self._kept is None:
            shutil.rmtree(self.path, ignore_errors=True)


def sweep(parent: Path) -> list[Path]:
    """Remove the folders of runs that ended without removing them, and return their paths."""
    removed = []
    for folder in parent.iterdir():
        try:
            lock = os.open(folder / LOCK_NAME, os.O_RDWR)
        except OSError:
            continue  # just being created, or kept on purpose
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
        finally:
            os.close(lock)
    return removed
