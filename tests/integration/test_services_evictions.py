"""An evicted processor whose sink refuses no writer, and which does not notice: every leader waits for its lease."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.local.process import wait_until
from tablewire.runtime.sections import default_margin_s
from tests.plugins.counter_world import WAIT_S, CounterWorld, install_plugin, now_ms

pytestmark = pytest.mark.integration

TTL_S = 5.0
HOLD_MS = int((TTL_S + default_margin_s(TTL_S)) * 1_000)
TABLES = (1, 2, 3, 4)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[CounterWorld]:
    """Two owners, two processors, four tables, and a sink that refuses no writer."""
    world = CounterWorld(
        tmp_path / "world",
        install_plugin(tmp_path / "plugin"),
        owners=2,
        processors=2,
        links=True,
        lease_ttl_ms=int(TTL_S * 1_000),
        owner_config={"scheduler": {"capture_silent_ms": 1_000, "capture_evict_ms": 500, "bootstrap_timeout_ms": 1_000}},
    )
    try:
        world.set_tables(*(f"public.t{number}" for number in TABLES))
        world.cluster.start()
        world.create("one", ("public.*",), None, "--source-option", "fenced=no")
        world.wait_steady(len(TABLES))
        world.wait_written(*TABLES)
        yield world
    finally:
        world.close()


def _kill(world: CounterWorld, owner: str) -> None:
    world.cluster.kill(owner)


def _terminate(world: CounterWorld, owner: str) -> None:
    world.cluster.node(owner).process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize("end", [_kill, _terminate], ids=["killed", "resigned"])
def test_the_next_owner_waits_for_an_evicted_processor(world: CounterWorld, end: Callable[[CounterWorld, str], None]) -> None:
    """The owner that evicted it is gone at once, and it is cut off from etcd, so that it writes on
    until its own clock stops it. No table of it is written by another before the next owner has
    waited for a whole lease; then everything continues, and it returns."""
    evicted, leader = world.capture_of("processor0"), world.cluster.wait_for_leader()
    mine = [table for table, capture in world.primaries().items() if capture == evicted]
    assert mine
    for owner in world.cluster.owners:
        world.cluster.link(owner, "processor0").cut()
    world.cluster.wait("it counts as silent", lambda: _state(world, evicted) == "silent", WAIT_S)
    world.cluster.link("processor0", "etcd0").cut()
    wait_until("it is evicted", lambda: '"capture_evicted"' in world.log(leader), WAIT_S)
    ended_ms = now_ms()
    end(world, leader)
    key = f"/tablewire/local/evicted/{evicted}"
    assert key in _keys(world)
    assert max(world.writes(table)[-1].at_ms for table in mine) > ended_ms - 300, "it has stopped too early for this test"
    world.cluster.wait_for_leader(other_than=leader)
    wait_until(
        "its tables are written by another", lambda: all(world.writes(table)[-1].capture != evicted for table in mine), WAIT_S
    )
    for table in mine:
        writes = world.writes(table)
        others = [write for write in writes if write.capture != evicted]
        assert others[0].at_ms >= ended_ms + HOLD_MS
        assert max(write.at_ms for write in writes if write.capture == evicted) > ended_ms
    _assert_one_writer_after_the_other(world)
    wait_until("the eviction is over", lambda: key not in _keys(world), WAIT_S)
    world.cluster.heal()
    world.cluster.wait("it is back", lambda: world.cluster.captures().get("processor0") not in (None, evicted), WAIT_S)
    world.wait_steady(len(TABLES))
    world.wait_written(*TABLES)
    _assert_one_writer_after_the_other(world)


def _assert_one_writer_after_the_other(world: CounterWorld) -> None:
    """Each write continues where the one before it ended, and a writer that was followed by another never writes again."""
    for table in TABLES:
        writes = world.writes(table)
        for before, after in itertools.pairwise(writes):
            assert after.start == before.end, f"table {table}: a gap or an overlap: {before} {after}"
        writers = [capture for capture, _ in itertools.groupby(write.capture for write in writes)]
        assert len(writers) == len(set(writers)), f"table {table}: {writers}"


def _keys(world: CounterWorld) -> set[str]:
    return set(world.cluster.etcd.members[0].dump() or ())


def _state(world: CounterWorld, capture: str) -> str:
    return next((str(row["state"]) for row in world.cluster.admin.captures() if row["id"] == capture), "gone")
