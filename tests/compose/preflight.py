"""Whether `make compose-test` can run here: `python3 tests/compose/preflight.py`. Nothing is installed or started.

Exit code 0: yes; 1: one line says what is missing and which Debian packages bring it. Standard library alone, so that it can
be asked before anything is installed.
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
"""Program -> package. The engine wants iptables for the name server inside of each container, not for rules on this machine."""
SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"


def search_path() -> str:
    """PATH with the folders of system programs, which an ordinary PATH may lack."""
    return os.environ.get("PATH", os.defpath) + os.pathsep + SYSTEM_PATH


def missing() -> list[str]:
    """Programs that are not here."""
    return [program for program in PACKAGES if shutil.which(program, path=search_path()) is None]


def packages(programs: list[str]) -> list[str]:
    return sorted({PACKAGES[program] for program in programs})


def trouble() -> str:
    """One line, empty when all is well."""
    if not sys.platform.startswith("linux"):
        return f"a Docker engine of its own needs Linux, this is {sys.platform}"
    absent = missing()
    if absent:
        return f"no {', '.join(absent)} on this machine: apt-get install {' '.join(packages(absent))}"
    if os.geteuid() != 0:
        return "only root can start a Docker engine and make its base image: run it as root"
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
