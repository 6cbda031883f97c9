"""What tests of real services share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugins.counter_world import CounterWorld, NewWorld, install_plugin


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The counting plug-in, installed as a user would; the folder to put on a service's path."""
    return install_plugin(tmp_path_factory.mktemp("plugin"))


@pytest.fixture
def new_world(tmp_path: Path, plugin: Path) -> Iterator[NewWorld]:
    """Starts a cluster; six tables, no changefeed yet."""
    worlds: list[CounterWorld] = []

    def start(**options: object) -> CounterWorld:
        world = CounterWorld(tmp_path / f"world{len(worlds)}", plugin, **options)
        worlds.append(world)
        world.set_tables(*(f"public.t{number}" for number in range(1, 7)))
        world.cluster.start()
        return world

    yield start
    for world in worlds:
        world.close()
