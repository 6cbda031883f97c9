"""A folder of one run of ours below the project: made at the start, removed at the end, also after a run that was killed.

The run holds a lock on it while it lives, so that the next run can tell what was left behind from what is in use.
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
    """`with RunFolder(parent) as run:` makes run.path = parent/<pid>-<random>. The parent goes with its last folder.

    keep: the whole folder stays. `keep_only(name)`: what is called so in it stays (logs of a failure), until the next run.
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
        """What stays after the end, None = nothing."""
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
        with contextlib.suppress(OSError):  # another run's folder is in it
            self._parent.rmdir()

    def _remove(self) -> None:
        """What was just killed may still be writing its last file, so it is tried again a few times."""
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
    """Remove folders whose run is over without having removed them; which."""
    removed = []
    for folder in parent.iterdir():
        try:
            lock = os.open(folder / LOCK_NAME, os.O_RDWR)
        except OSError:
            continue  # just being made, or kept by hand
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
