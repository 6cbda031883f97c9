"""Check whether `make compose-test` can run here: `python3 tests/compose/preflight.py`. Installs and starts nothing.

Exit code 0 if it can, else 1 with one line that names what is missing and the Debian packages that provide it. Uses only the
standard library, so that it works before anything is installed.
"""

from __future__ import annotations

import os
import shutil
import sys

PACKAGES = {
    "dockerd": "docker.io",
    "containerd": "containerd",
    "runc": "runc",
    "docker": "docker.io",
    "docker-compose": "docker-compose",
    "iptables": "iptables",
    "debootstrap": "debootstrap",
}
"""Program -> package. The engine needs iptables for the DNS inside each container, not for rules on the host."""
SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"


def search_path() -> str:
    """Return PATH with the folders of system programs, which the PATH of a user may lack."""
    return os.environ.get("PATH", os.defpath) + os.pathsep + SYSTEM_PATH


def missing() -> list[str]:
    """Return the programs that are not installed."""
    return [program for program in PACKAGES if shutil.which(program, path=search_path()) is None]


def packages(programs: list[str]) -> list[str]:
    return sorted({PACKAGES[program] for program in programs})


def trouble() -> str:
    """Return the problem in one line; empty if there is none."""
    if not sys.platform.startswith("linux"):
        return f"a separate Docker engine needs Linux, this is {sys.platform}"
    absent = missing()
    if absent:
        return f"no {', '.join(absent)} on this machine: apt-get install {' '.join(packages(absent))}"
    if os.geteuid() != 0:
        return "only root can start a Docker engine and build its base image: run it as root"
    return ""


def main() -> int:
    if sys.argv[1:] == ["--packages"]:
        print(" ".join(packages(missing())))
        return 0
    found = trouble()
    if found:
        print(f"compose-test: {found}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
