"""Fixtures for the cluster in containers, once per session, and a final line of JSON with the duration of each step.

Tests that need a Docker engine are collected only if this folder is named (`make compose-test`), not by a plain `pytest`.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.compose.engine import Engine
from tests.compose.images import build_all
from tests.compose.preflight import trouble
from tests.compose.stack import Stack

HERE = Path(__file__).resolve().parent
WITHOUT_ENGINE = {"test_files.py"}
Step = Callable[[str], AbstractContextManager[None]]

_report: dict[str, Any] = {"steps": {}, "image_bytes": {}, "figures": {}}
_report_stack: list[Stack] = []


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip the tests that need an engine unless this folder was named."""
    if collection_path.parent != HERE or not collection_path.name.startswith("test_"):
        return None
    asked = any(Path(argument.partition("::")[0]).resolve().is_relative_to(HERE) for argument in config.args)
    return None if asked or collection_path.name in WITHOUT_ENGINE else True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the last output of the containers to a failure, because they are removed afterwards."""
    report = yield
    cluster = _report_stack
    if report.failed and cluster and item.path.parent == HERE:
        report.sections.append(("containers", cluster[0].describe()))
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print one line of JSON: the duration of each step in seconds and the image sizes in bytes."""
    if _report["steps"]:
        _report["seconds"] = round(sum(_report["steps"].values()), 1)
        terminalreporter.write_line(json.dumps({"compose_test": _report}))


@pytest.fixture(scope="session")
def figures() -> dict[str, Any]:
    """Return the dict for measurements, which becomes part of the line of JSON."""
    found: dict[str, Any] = _report["figures"]
    return found


@pytest.fixture(scope="session")
def step() -> Step:
    """Return a context manager that measures a step: `with step("the leader is killed"):`."""

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        _report["steps"][name] = round(time.monotonic() - started, 1)

    return timed


@pytest.fixture(scope="session")
def engine(step: Step) -> Iterator[Engine]:
    """Start a separate Docker engine. Fails at the end if it leaves anything behind."""
    found = trouble()
    if found:
        pytest.exit(f"compose-test: {found}", returncode=1)
    running = Engine()
    try:
        with step("engine started"):
            running.start()
        _report["storage_driver"] = running.storage_driver
        yield running
    finally:
        with step("engine ended, nothing left"):
            running.close()


@pytest.fixture(scope="session")
def stack(engine: Engine, step: Step) -> Stack:
    """Start deploy/compose.yaml and wait until everything is healthy: etcd x3, owner x2, processor x3, source and sink."""
    _report["image_bytes"].update(build_all(engine, _report["steps"]))
    cluster = Stack(engine)
    _report_stack.append(cluster)
    with step("up: healthy, an owner leads"):
        cluster.up()
        cluster.wait_healthy(["etcd-1", "etcd-2", "etcd-3", "owner", "processor", "source", "sink"])
        cluster.wait("three processors are registered", lambda: len(cluster.captures()) == 3)
    return cluster
