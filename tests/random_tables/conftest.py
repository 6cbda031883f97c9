"""The server of the random cases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deploy.local.postgres import PostgresServer
from tests.random_tables.world import SETTINGS, World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Yield a server of this module's own, without fsync: a case takes about a second."""
    with PostgresServer(tmp_path_factory.mktemp("random"), settings=SETTINGS) as server:
        yield World(server)
