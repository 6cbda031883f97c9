"""One bad peer affects no other, and a planned change of the leader costs nothing: real services, real etcd."""

from __future__ import annotations

import itertools
import os
import statistics
import urllib.request
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.plugins.counter_world import WAIT_S, CounterWorld, NewWorld, now_ms

pytestmark = pytest.mark.integration

TABLES = tuple(range(1, 7))
GAP_MS_MAX = 2_500
LOOKED_AT_MS = 6_000


@pytest.fixture
def new_world(new_world: NewWorld) -> NewWorld:
    """Starts a cluster that replicates six tables as `one`."""

    def start(**options: object) -> CounterWorld:
        world = new_world(**options)
        world.replicate(*TABLES)
        return world

    return start


class Second:
    """A second changefeed of the same cluster, `two`, with a source and a sink of its own."""

    def __init__(self, world: CounterWorld) -> None:
        self.world = world
        self.source, self.sink = world.folder / "source2", world.folder / "sink2"
        for folder in (self.source, self.sink):
            folder.mkdir()
        (self.source / "tables").write_text("public.a\npublic.b")
        uris = ("--source", f"counter://{self.source}", "--sink", f"file://{self.sink}")
        world.cluster.owner_json("changefeed", "create", "--id", "two", *uris, "--tables", "public.*")
        world.wait_steady(2, "two")

    def hang(self, path: Path) -> None:
        """Make reads and writes of this file wait for ever: it becomes a pipe without another end."""
        beside = path.with_suffix(".new")
        os.mkfifo(beside)
        beside.rename(path)


def others_go_on(world: CounterWorld) -> None:
    """For some seconds: `one` is written without a long gap, its checkpoint moves, the admin API answers, the owner is well."""
    since = now_ms()
    reached = world.cluster.admin.changefeed("one")["checkpoint_ts"]
    world.wait_written(*TABLES, after_ms=since + LOOKED_AT_MS)
    for table in TABLES:
        at = [write.at_ms for write in world.writes(table) if write.at_ms >= since]
        assert max(after - before for before, after in itertools.pairwise(at)) < GAP_MS_MAX
    assert world.cluster.admin.changefeed("one")["checkpoint_ts"] > reached + LOOKED_AT_MS // 2
    assert world.cluster.admin.changefeed("one")["state"] == "normal"
    with urllib.request.urlopen(f"http://{world.cluster.node('owner0').http_address}/healthz", timeout=5) as answer:
        assert answer.status == 200


def test_scenario_19_a_source_that_hangs_delays_no_other_changefeed(new_world: NewWorld) -> None:
    """Its calls never return; the other is ticked, moved and listed as before, and the hung one can still be paused."""
    world = new_world(processors=2)
    second = Second(world)
    second.hang(second.source / "tables")
    others_go_on(world)
    before = world.primaries()[1]
    target = next(capture for capture in world.cluster.captures().values() if capture != before)
    world.cluster.owner_json("table", "move", "public.t1", "--to", target, "--changefeed", "one", "--wait")
    world.cluster.owner_json("changefeed", "pause", "two")
    assert world.cluster.admin.changefeed("two")["state"] == "stopped"
    world.audit(*TABLES)


def test_scenario_35_a_planned_resign_leaves_no_time_without_an_owner(new_world: NewWorld) -> None:
    """The next owner knows every table within a second; no table moves or stops, and the watermark never goes back."""
    world = new_world(owners=2, processors=2)
    before, reached, took_s = world.primaries(), 0, []
    for turn in range(1, 6):
        world.cluster.owner_json("resign")
        world.cluster.wait("it is told", lambda turn=turn: len(of_kind(world, "owner_stops_leading")) == turn, WAIT_S)
        world.cluster.wait(
            "it is scheduled", lambda turn=turn: len(of_kind(world, "changefeed_bootstrapped")) == turn + 1, WAIT_S
        )
        left, scheduled = of_kind(world, "owner_stops_leading")[-1], of_kind(world, "changefeed_bootstrapped")[-1]
        assert scheduled["owner"] != left["owner"]
        took_s.append((at(scheduled) - at(left)).total_seconds())
        checkpoint_ts = world.cluster.admin.changefeed("one")["checkpoint_ts"]
        assert checkpoint_ts >= reached
        reached = checkpoint_ts
    print(f"the next owner has scheduled after {[round(s, 3) for s in took_s]} s")
    assert statistics.median(took_s) <= 1.0, took_s
    assert world.primaries() == before
    world.wait_written(*TABLES)
    assert max(map(world.longest_gap_ms, TABLES)) < GAP_MS_MAX
    world.audit(*TABLES)


def of_kind(world: CounterWorld, kind: str) -> list[Any]:
    return [event for event in world.cluster.owner_json("events", "-n", "0")["events"] if event["kind"] == kind]


def at(event: Any) -> datetime:
    return datetime.fromisoformat(event["at"])
