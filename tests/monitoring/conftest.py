"""Fixtures of the monitoring tests: a real Prometheus that has loaded the shipped configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from deploy.monitoring.prometheus_server import Prometheus, missing_programs


@pytest.fixture(scope="session")
def promtool() -> str:
    """Return the name of the program. Skips the test if it is not installed, which CI counts as a failure."""
    if problem := missing_programs():
        pytest.skip(problem)
    return "promtool"


@pytest.fixture(scope="session")
def shipped(promtool: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus with the unchanged shipped configuration, whose DNS names do not resolve here."""
    with Prometheus(tmp_path_factory.mktemp("shipped")) as prometheus:
        yield prometheus


@pytest.fixture(scope="session")
def rules(shipped: Prometheus) -> list[dict[str, Any]]:
    """Return every rule as Prometheus parsed it."""
    return shipped.rules()
