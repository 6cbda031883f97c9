"""Check the requirements before anything is installed or started, and print one line for each that
is not met.

Runs on any `python3`, so it uses the syntax of Python 3.6 and the standard library only. Exit code
0: all requirements are met; 1: some are not, and stderr names them. `make demo`, `make cluster` and
`make test` call it first.
"""

# ruff: noqa: UP031

import os
import platform
import sys

OLDEST = (3, 11)
OLDEST_GLIBC = (2, 34)
"""The oldest glibc that the PostgreSQL wheel supports."""
MACHINES = {"Linux": ("x86_64", "aarch64"), "Darwin": ("arm64",)}


def wrong_python(version):  # type: (tuple[int, ...]) -> str
    """Return "" when this version of Python is supported."""
    if version >= OLDEST:
        return ""
    have = "%d.%d" % version[:2]
    return "python %s is too old: Tablewire needs 3.11 or newer (make PYTHON=/path/to/python3.11)" % have


def missing_modules(version, importable):  # type: (tuple[int, ...], object) -> str
    """Return "" when a virtual environment with pip can be created. importable: name -> bool."""
    missing = [name for name in ("venv", "ensurepip") if not importable(name)]  # type: ignore[operator]
    if not missing:
        return ""
    package = "python%d.%d-venv" % version[:2]
    return "this python has no module %s: on Debian and Ubuntu, apt install %s" % (" and ".join(missing), package)


def wrong_platform(system, machine, glibc):  # type: (str, str, tuple[int, ...]) -> str
    """Return "" when the wheels of etcd and PostgreSQL run here. glibc: () for another C library."""
    if machine not in MACHINES.get(system, ()):
        supported = ", ".join("%s on %s" % (name, " or ".join(MACHINES[name])) for name in sorted(MACHINES))
        return "%s on %s is not supported: %s" % (system, machine or "an unknown machine", supported)
    if os.environ.get("TABLEWIRE_POSTGRES_BIN") or not glibc or glibc >= OLDEST_GLIBC:
        return ""
    have = "%d.%d" % glibc[:2]
    return (
        "glibc %s is too old for the PostgreSQL wheel (2.34 or newer): set TABLEWIRE_POSTGRES_BIN to the bin folder of a server"
        % have
    )


def _importable(name):  # type: (str) -> bool
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def _glibc():  # type: () -> tuple[int, ...]
    name, version = platform.libc_ver()
    words = version.split(".")
    if name != "glibc" or not all(word.isdigit() for word in words[:2]):
        return ()
    return tuple(int(word) for word in words[:2])


def main():  # type: () -> int
    version = tuple(sys.version_info[:2])
    problems = [
        wrong_platform(platform.system(), platform.machine(), _glibc()),
        wrong_python(version),
        missing_modules(version, _importable),
    ]
    problems = [problem for problem in problems if problem]
    for problem in problems:
        sys.stderr.write("tablewire: %s\n" % problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
