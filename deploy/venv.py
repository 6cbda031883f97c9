"""Makes or refreshes the virtual environment in `.venv`: `python3 deploy/venv.py run|dev`.

run: what `make demo` and `make cluster` need. dev: that and the development tools. Everything comes from the lock files in
requirements/, checked by hash. Standard library alone; called by the Makefile, after deploy/local/preflight.py.

The stamp `.venv/<level>.stamp` is written last and holds what was installed, so an interrupted or outdated installation is
taken up again, and a clone that was moved is installed anew. Two calls in one clone wait for each other.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
LOG = VENV / "install.log"
LEVELS = ("run", "dev")
PIP_RETRIES = 2
"""A registry that cannot be reached is reported within seconds, not after pip's own patience."""

SAY_VERSION = "import importlib.util, sys; assert importlib.util.find_spec('pip'); print('%d.%d' % sys.version_info[:2])"

NO_NETWORK = (
    "NewConnectionError",
    "NameResolutionError",
    "ConnectTimeoutError",
    "ConnectionRefusedError",
    "ProxyError",
    "Network is unreachable",
    "Temporary failure in name resolution",
    "Failed to establish a new connection",
)


class InstallError(Exception):
    """One line for the person at the terminal."""


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1] not in LEVELS:
        print(f"usage: python3 deploy/venv.py {'|'.join(LEVELS)}", file=sys.stderr)
        return 2
    try:
        ensure(sys.argv[1])
    except InstallError as error:
        print(f"tablewire: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tablewire: interrupted; the next call takes the installation up again", file=sys.stderr)
        return 130
    return 0


def ensure(level: str) -> None:
    """Returns when `.venv` holds what the lock file of this level says; does nothing when it does already."""
    folder = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if is_fresh(level):
            return
        started = time.monotonic()
        print(f"tablewire: installing into .venv (python {sys.version.split()[0]}, {level}) ...", file=sys.stderr, flush=True)
        # What a lock file says now is what is installed; one that changes meanwhile is not fresh afterwards.
        installed = {done: wanted(done) for done in LEVELS[: LEVELS.index(level) + 1]}
        make_environment()
        install(level)
        for done, digest in installed.items():
            stamp(done).write_text(digest)
        print(f"tablewire: installed in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    finally:
        os.close(folder)


def stamp(level: str) -> Path:
    return VENV / f"{level}.stamp"


def wanted(level: str) -> str:
    """What the stamp of this level says when nothing has to be done."""
    digest = hashlib.sha256()
    for name in (f"requirements/{level}.txt", "pyproject.toml"):
        digest.update((ROOT / name).read_bytes())
    return f"{digest.hexdigest()}\n{ROOT}\n"


def is_fresh(level: str) -> bool:
    try:
        if stamp(level).read_text() != wanted(level):
            return False
    except OSError:
        return False
    theirs, mine = venv_version(), "{}.{}".format(*sys.version_info[:2])
    if theirs is not None and theirs != mine:
        print(f"tablewire: .venv is of python {theirs}; remove it to use {mine}", file=sys.stderr)
    return theirs is not None


def venv_version() -> str | None:
    """`3.11` of a virtual environment that works, None where there is none."""
    try:
        answer = subprocess.run([VENV_PYTHON, "-c", SAY_VERSION], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def make_environment() -> None:
    """A virtual environment that works is kept; one that is broken or was moved here is replaced."""
    moved = any(stamp(level).exists() and stamp(level).read_text().splitlines()[1:] != [str(ROOT)] for level in LEVELS)
    if venv_version() is not None and not moved:
        return
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        raise InstallError(f"the virtual environment could not be made: {last_line(made.stdout + made.stderr)}")


def install(level: str) -> None:
    for old in LEVELS:
        stamp(old).unlink(missing_ok=True)
    with LOG.open("w") as log:
        pip(log, "--only-binary", ":all:", "--require-hashes", "-r", f"requirements/{level}.txt")
        pip(log, "--no-build-isolation", "--no-deps", "--no-index", "-e", ".")


def pip(log: TextIO, *arguments: str) -> None:
    command = [str(VENV_PYTHON), "-m", "pip", "install", "--no-input", "--retries", str(PIP_RETRIES)]
    # A user's `pip config set global.user true` cannot work in a virtual environment.
    environment = {**os.environ, "PIP_USER": "0"}
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, stdout=log, stderr=log, check=False)
    if done.returncode == 0:
        return
    said = LOG.read_text(errors="replace")
    if any(sign in said for sign in NO_NETWORK):
        raise InstallError("no network: pip cannot reach the package registry, which the first installation needs")
    raise InstallError(f"pip failed: {last_line(said)} (all of it: .venv/install.log)")


def last_line(text: str) -> str:
    """The last line that says something; lines that name an error first."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error:") or "Error: " in line]
    return (errors or lines or ["it said nothing"])[-1]


if __name__ == "__main__":
    sys.exit(main())
