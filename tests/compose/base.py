"""A base image without a registry: Debian by debootstrap, cached as a tar file in the user's cache folder.

The file name contains a hash of release, packages and recipe, so a change of any of them builds a new image. The file is renamed
when it is complete, so a killed run leaves no partial image. Requires root and a Debian mirror.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.compose.preflight import search_path

RELEASE = "bookworm"
PACKAGES = ("ca-certificates", "python3", "python3-venv")
RECIPE = 2
"""Increment it when the steps below change."""
NOT_NEEDED = (
    *("usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale", "usr/share/perl", "var/cache/apt"),
    *("var/lib/apt/lists", "var/log", "usr/share/zoneinfo/right", "var/cache/debconf"),
)
DEBOOTSTRAP_TIMEOUT_S = 600.0
CACHE_VARIABLE = "COMPOSE_TEST_CACHE"
_PREFIX = "compose-base-"


class BaseError(Exception):
    """The base image could not be built. The text ends with the output of debootstrap."""


def cache_folder() -> Path:
    """Return COMPOSE_TEST_CACHE, or a folder below the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "tablewire")


def base_key() -> str:
    text = repr((RELEASE, PACKAGES, NOT_NEEDED, RECIPE, os.uname().machine))
    return f"{RELEASE}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def mirror() -> list[str]:
    """Return the mirror that apt uses for the release, as an argument of debootstrap; empty for debootstrap's default."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME) $(COMPONENT)", "Created-By: Packages"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except OSError:
        return []
    for line in done.stdout.splitlines():
        uri, codename, component = [*line.split(), "", "", ""][:3]
        if codename == RELEASE and component == "main" and uri.startswith(("http://", "https://")):
            return [uri]
    return []


def base_tar() -> tuple[Path, bool]:
    """Return the tar file and whether it was cached. Raises BaseError."""
    folder = cache_folder()
    path = folder / f"{_PREFIX}{base_key()}.tar"
    if path.exists():
        return path, True
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=folder) as work:
        root, made = Path(work, "root"), Path(work, "base.tar")
        _debootstrap(root)
        for name in NOT_NEEDED:
            shutil.rmtree(root / name, ignore_errors=True)
        for name in ("var/log", "var/lib/apt/lists", "var/cache/apt"):
            (root / name).mkdir(parents=True, exist_ok=True)
        _run("tar", "--create", "--numeric-owner", "--one-file-system", "--file", str(made), "--directory", str(root), ".")
        made.rename(path)
    for old in folder.glob(f"{_PREFIX}*.tar"):
        if old != path:
            old.unlink(missing_ok=True)
    return path, False


def _debootstrap(root: Path) -> None:
    include = f"--include={','.join(PACKAGES)}"
    _run("debootstrap", "--variant=minbase", include, RELEASE, str(root), *mirror())


def _run(*command: str) -> None:
    environment = {**os.environ, "PATH": search_path(), "LC_ALL": "C"}
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=DEBOOTSTRAP_TIMEOUT_S,
        check=False,
        env=environment,
    )
    if done.returncode != 0:
        raise BaseError(f"{command[0]} exited with code {done.returncode}\n{done.stdout[-2000:]}")
