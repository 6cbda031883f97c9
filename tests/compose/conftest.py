"""The cluster in containers, once a session: engine, images, `up`; and the line of JSON with steps and times at the end.

Tests that need an engine are collected only when they are asked for by name (`make compose-test`), never by a plain `pytest`.
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
    """Leaves the tests with an engine out unless this folder was asked for."""
    if collection_path.parent != HERE or not collection_path.name.startswith("test_"):
        return None
    asked = any(Path(argument.partition("::")[0]).resolve().is_relative_to(HERE) for argument in config.args)
    return None if asked or collection_path.name in WITHOUT_ENGINE else True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What the containers said last stands beside a failure: they are gone when somebody comes to look."""
    report = yield
    cluster = _report_stack
    if report.failed and cluster and item.path.parent == HERE:
        report.sections.append(("containers", cluster[0].describe()))
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line of JSON: what was done, how long each step took in seconds, sizes of the images in bytes."""
    if _report["steps"]:
        _report["seconds"] = round(sum(_report["steps"].values()), 1)
        terminalreporter.write_line(json.dumps({"compose_test": _report}))


@pytest.fixture(scope="session")
def figures() -> dict[str, Any]:
    """What tests measured, for the line of JSON."""
    found: dict[str, Any] = _report["figures"]
    return found


@pytest.fixture(scope="session")
def step() -> Step:
    """`with step("the leader is killed"):` takes the time of a step."""

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        _report["steps"][name] = round(time.monotonic() - started, 1)

    return timed


@pytest.fixture(scope="session")
def engine(step: Step) -> Iterator[Engine]:
    """A Docker engine of our own; at the end nothing of it may be left."""
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
    """The cluster of deploy/compose.yaml, up and healthy: etcd x3, owner x2, processor x3, source and sink."""
    _report["image_bytes"].update(build_all(engine, _report["steps"]))
    cluster = Stack(engine)
    _report_stack.append(cluster)
    with step("up: healthy, an owner leads"):
        cluster.up()
        cluster.wait_healthy(["etcd-1", "etcd-2", "etcd-3", "owner", "processor", "source", "sink"])
        cluster.wait("three processors are registered", lambda: len(cluster.captures()) == 3)
    return cluster
