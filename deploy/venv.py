"""Create or update the virtual environment in `.venv`: `python3 deploy/venv.py run|dev`.

run: what `make demo` and `make cluster` need. dev: also the development tools. All packages come from the lock files in
requirements/ and are verified by hash. Uses only the standard library; the Makefile calls it after deploy/local/preflight.py.

The stamp `.venv/<level>.stamp` is written last and identifies what was installed and where. An interrupted or outdated
installation is continued, and an environment that was moved is created again. Concurrent calls in one clone wait for each other.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
LOG = VENV / "install.log"
LEVELS = ("run", "dev")
PIP_RETRIES = 2
"""Fewer than pip's default, so that an unreachable package index is reported within seconds."""

CLEAR_LINE = "\r\x1b[K"
PRINT_VERSION = "import importlib.util, sys; assert importlib.util.find_spec('pip'); print('%d.%d' % sys.version_info[:2])"

NETWORK_ERRORS = re.compile(
    "(NewConnection|NameResolution|ConnectTimeout|ConnectionRefused|Proxy)Error|Network is unreachable"
    "|Temporary failure in name resolution|Failed to establish a new connection"
)


class InstallError(Exception):
    """The installation failed. The text is one line."""


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1] not in LEVELS:
        print(f"usage: python3 deploy/venv.py {'|'.join(LEVELS)}", file=sys.stderr)
        return 2
    try:
        ensure(sys.argv[1])
    except InstallError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted; run it again to continue the installation")
        return 130
    return 0


def say(text: str, end: str = "\n") -> None:
    """Print a line to stderr. On a terminal it replaces an unfinished line."""
    print(CLEAR_LINE if sys.stderr.isatty() else "", f"tablewire: {text}", sep="", end=end, file=sys.stderr, flush=True)


def ensure(level: str) -> None:
    """Install what the lock file of this level contains, unless it is installed already."""
    folder = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if is_fresh(level):
            return
        started = time.monotonic()
        say(f"installing into .venv (python {sys.version.split()[0]}, {level}) ...")
        # Read before the installation: a lock file that changes meanwhile leaves an outdated stamp.
        stamps = {done: expected_stamp(done) for done in LEVELS[: LEVELS.index(level) + 1]}
        create_environment()
        install(level)
        for done, text in stamps.items():
            stamp(done).write_text(text)
        say(f"installed in {time.monotonic() - started:.0f} s")
    finally:
        os.close(folder)


def stamp(level: str) -> Path:
    return VENV / f"{level}.stamp"


def expected_stamp(level: str) -> str:
    digest = hashlib.sha256()
    for name in (f"requirements/{level}.txt", "pyproject.toml"):
        digest.update((ROOT / name).read_bytes())
    return f"{digest.hexdigest()}\n{ROOT}\n"


def is_fresh(level: str) -> bool:
    if not stamp(level).exists() or stamp(level).read_text() != expected_stamp(level):
        return False
    installed, current = venv_version(), "{}.{}".format(*sys.version_info[:2])
    if installed not in (None, current):
        say(f".venv uses python {installed}; remove it to use {current}")
    return installed is not None


def venv_version() -> str | None:
    """Return the Python version of `.venv`, such as "3.11", or None if the environment is missing or broken."""
    try:
        done = subprocess.run([VENV_PYTHON, "-c", PRINT_VERSION], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def create_environment() -> None:
    """Create the environment, or replace one that is broken or was moved. Keep one that works."""
    moved = any(stamp(level).exists() and stamp(level).read_text().splitlines()[1:] != [str(ROOT)] for level in LEVELS)
    if venv_version() is not None and not moved:
        return
    done = subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InstallError(f"cannot create the virtual environment: {error_line(done.stdout + done.stderr)}")


def install(level: str) -> None:
    for old in LEVELS:
        stamp(old).unlink(missing_ok=True)
    LOG.write_text("")
    lock_file = f"requirements/{level}.txt"
    packages = len(re.findall(r"^\w.*==", (ROOT / lock_file).read_text(), re.MULTILINE))
    pip("--only-binary", ":all:", "--require-hashes", "-r", lock_file, packages=packages)
    pip("--no-build-isolation", "--no-deps", "--no-index", "-e", ".")


def pip(*arguments: str, packages: int = 0) -> None:
    """Run `pip install`. packages: how many the lock file lists, for the progress on a terminal."""
    command = [str(VENV_PYTHON), "-m", "pip", "install", "--no-input", "--retries", str(PIP_RETRIES), *arguments]
    # `pip config set global.user true` would fail in a virtual environment.
    environment = {**os.environ, "PIP_USER": "0"}
    collected = 0
    with (
        LOG.open("a") as log,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        for line in process.stdout or ():
            log.write(line)
            packages -= line.startswith("Ignoring ")  # not for this platform
            collected += line.startswith("Collecting ")
            if collected and packages > 0 and sys.stderr.isatty():
                unpacking = line.startswith("Installing collected")
                say("unpacking ..." if unpacking else f"fetching package {collected} of {packages} ...", end="")
    if process.returncode == 0:
        return
    output = LOG.read_text(errors="replace")
    if NETWORK_ERRORS.search(output):
        raise InstallError("no network: pip cannot reach the package index, which the first installation needs")
    raise InstallError(f"pip failed: {error_line(output)} (full log: .venv/install.log)")


def error_line(output: str) -> str:
    """Return the last line that names an error, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error:") or "Error: " in line]
    return (errors or lines or ["no output"])[-1]


if __name__ == "__main__":
    sys.exit(main())
