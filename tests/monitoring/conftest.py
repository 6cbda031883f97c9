"""Fixtures of the monitoring tests: a real Prometheus that has loaded what is shipped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from deploy.monitoring.server import Prometheus, missing_program


@pytest.fixture(scope="session")
def promtool() -> str:
    """The program; where it is not installed the test is skipped, which CI counts as a failure."""
    if problem := missing_program():
        pytest.skip(problem)
    return "promtool"


@pytest.fixture(scope="session")
def shipped(promtool: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus with the shipped configuration as it is; the names in it lead nowhere here."""
    with Prometheus(tmp_path_factory.mktemp("shipped")) as prometheus:
        yield prometheus


@pytest.fixture(scope="session")
def rules(shipped: Prometheus) -> list[dict[str, Any]]:
    """Every rule as Prometheus has read it."""
    return shipped.rules()
