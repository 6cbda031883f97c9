"""A processor that cannot serve a changefeed: it runs elsewhere, under every owner, and the processor is used when it can."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugins.counter_world import WAIT_S, CounterWorld, install_plugin

pytestmark = pytest.mark.integration

TABLES = 4


@pytest.fixture
def world(tmp_path: Path) -> Iterator[CounterWorld]:
    """Two changefeeds; processor0 answers in one of them and cannot make an executor for the other."""
    world = CounterWorld(tmp_path / "world", install_plugin(tmp_path), owners=2, processors=2)
    other = CounterFolders(tmp_path)
    try:
        world.set_tables(*(f"public.t{number}" for number in range(1, TABLES + 1)))
        (world.source / "no-executor-processor0").touch()
        world.cluster.start()
        other.create(world, "fine")
        world.wait_steady(2, "fine")
        world.create("one")
        yield world
    finally:
        world.close()


class CounterFolders:
    """A second source and sink."""

    def __init__(self, folder: Path) -> None:
        self.source, self.sink = folder / "source2", folder / "sink2"
        self.source.mkdir()
        self.sink.mkdir()
        (self.source / "tables").write_text("public.a\npublic.b")

    def create(self, world: CounterWorld, name: str) -> None:
        uris = ("--source", f"counter://{self.source}", "--sink", f"file://{self.sink}")
        world.cluster.owner_json("changefeed", "create", "--id", name, *uris, "--tables", "public.*")


def test_a_processor_that_cannot_serve_a_changefeed_holds_up_no_other(world: CounterWorld) -> None:
    """All tables go where they can; a move there fails with the reason; a new owner continues, adds
    and moves; then it recovers."""
    captures = world.cluster.captures()
    able, unable = captures["processor1"], captures["processor0"]
    world.wait_steady(TABLES, "one")
    assert set(world.primaries("one").values()) == {able}
    assert set(world.primaries("fine").values()) == {able, unable}

    refused = world.cluster.owner_cli("table", "move", "public.t1", "--to", unable, "--changefeed", "one", "--wait")
    assert refused.returncode == 1
    assert "processor0 lacks what it needs" in refused.stderr

    world.cluster.kill(world.cluster.wait_for_leader())
    world.cluster.wait_for_leader()
    world.wait_steady(TABLES, "one")
    world.set_tables(*(f"public.t{number}" for number in range(1, TABLES + 2)))
    world.wait_steady(TABLES + 1, "one")
    assert set(world.primaries("one").values()) == {able}

    (world.source / "no-executor-processor0").unlink()

    def moved() -> bool:
        done = world.cluster.owner_cli("table", "move", "public.t1", "--to", unable, "--changefeed", "one", "--wait")
        return done.returncode == 0

    world.cluster.wait("it is used once it can be", moved, WAIT_S)
    world.wait_steady(TABLES + 1, "one")
    assert world.primaries("one")[1] == unable
    world.audit(*range(1, TABLES + 2))
