"""Tables of several spans on a real cluster: a source that cuts its tables, and executors that write parts of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deploy.local.admin import Json
from tablewire.model.splitter import HashRanges
from tests.plugins.counter_world import WAIT_S, CounterWorld, install_plugin, now_ms

pytestmark = pytest.mark.integration

TABLES = (1, 2, 3)
PARTS = 4


@pytest.fixture
def world(tmp_path: Path) -> Iterator[CounterWorld]:
    """Three tables of four parts each, on two processors."""
    world = CounterWorld(tmp_path / "world", install_plugin(tmp_path), owners=2, processors=2)
    try:
        world.set_tables(*(f"public.t{number}" for number in TABLES))
        world.cluster.start()
        world.create("one", ("public.*",), None, "--source-option", f"parts={PARTS}")
        world.wait_steady(len(TABLES) * PARTS)
        yield world
    finally:
        world.close()


def rows(world: CounterWorld) -> list[Json]:
    return world.cluster.admin.tables("one")


def logs(parts: int = PARTS) -> list[str]:
    """The names of the parts' logs."""
    spans = HashRanges(parts).split(np.array([1], np.int64))
    starts = [f"-{span.start_key.hex()}" if span.start_key else "" for span in spans]
    return [f"{table}{start}" for table in TABLES for start in starts]


def test_parts_move_and_fail_over(world: CounterWorld) -> None:
    """Parts are spread over the processors, a table moves with all of its parts, and kills lose nothing of any part."""
    captures = world.cluster.captures()
    assert sorted(Counter(row["primary"] for row in rows(world)).values()) == [6, 6]
    target = captures["processor1"]
    done = world.cluster.owner_json("table", "move", "public.t2", "--to", target, "--wait")
    assert done["state"] == "done"
    assert {row["primary"] for row in rows(world) if row["table_id"] == 2} == {target}
    placed = {(row["table_id"], row["start_key"]): row["primary"] for row in rows(world)}

    world.cluster.kill(world.cluster.wait_for_leader())
    world.cluster.wait_for_leader()
    world.wait_steady(len(TABLES) * PARTS)
    assert {(row["table_id"], row["start_key"]): row["primary"] for row in rows(world)} == placed
    before = world.cluster.admin.changefeed("one")["checkpoint_ts"]
    world.cluster.wait_checkpoint(before + 1, "one")

    world.cluster.kill("processor1")
    world.cluster.wait(
        "all parts are at the processor that is left", lambda: _primaries(world) == {captures["processor0"]}, WAIT_S
    )
    world.wait_steady(len(TABLES) * PARTS)
    world.wait_written(*logs())
    world.audit(*logs())


def test_another_cut_of_a_paused_changefeed(world: CounterWorld) -> None:
    """A paused changefeed is set to split in another way: after its start there are the new parts alone, and all are written."""
    world.cluster.owner_json("changefeed", "pause", "one")
    world.cluster.owner_json("changefeed", "update", "one", "--source-option", "parts=2")
    resumed_ms = now_ms()
    world.cluster.owner_json("changefeed", "resume", "one")
    wanted = len(TABLES) * 2
    world.cluster.wait("the new parts are there", lambda: len(rows(world)) == wanted, WAIT_S)
    world.wait_steady(wanted)
    world.wait_written(*logs(2), after_ms=resumed_ms)
    before = world.cluster.admin.changefeed("one")["checkpoint_ts"]
    world.cluster.wait_checkpoint(before + 1, "one")


def _primaries(world: CounterWorld) -> set[str]:
    return {row["primary"] for row in rows(world)}
