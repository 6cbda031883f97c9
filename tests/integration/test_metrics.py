"""What both services show at /metrics while they work, as real processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugins.counter_world import WAIT_S, CounterWorld, install_plugin

pytestmark = pytest.mark.integration

TABLES = 3


@pytest.fixture
def world(tmp_path: Path) -> Iterator[CounterWorld]:
    """Two changefeeds of three tables on one processor."""
    world = CounterWorld(tmp_path / "world", install_plugin(tmp_path / "plugin"))
    world.set_tables(*(f"public.t{number}" for number in range(1, TABLES + 1)))
    other = world.folder / "other"
    other.mkdir()
    try:
        world.cluster.start()
        world.create("one")
        world.create("one-two", sink=other)
        world.wait_steady(TABLES, "one")
        world.wait_steady(TABLES, "one-two")
        yield world
    finally:
        world.close()


def series(world: CounterWorld, node: str) -> dict[str, float]:
    """Every sample of ours by its whole name, labels included."""
    lines = re.findall(r"^(tablewire_[^ ]+(?: [^ ]+)*?) ([^ ]+)$", world.cluster.node(node).metrics(), re.M)
    return {name: float(value) for name, value in lines}


def test_an_owner_shows_how_it_stands(world: CounterWorld) -> None:
    """Progress, spans, processors, calls and its own lease, in the units of their names."""
    world.cluster.wait("the lag is known", lambda: any("lag_seconds" in name for name in series(world, "owner0")), WAIT_S)
    shown = series(world, "owner0")
    capture = world.capture_of("processor0")
    feed = 'changefeed="default/one"'
    assert shown["tablewire_owner_is_leader"] == 1
    assert 0 < shown["tablewire_owner_lease_margin_seconds"] <= 3
    assert shown[f'tablewire_owner_spans{{{feed},state="replicating"}}'] == TABLES
    assert shown[f'tablewire_owner_captures{{{feed},state="ready"}}'] == 1
    assert shown[f'tablewire_owner_capture_spans{{capture="{capture}",{feed}}}'] == TABLES
    assert shown[f'tablewire_owner_capture_load{{capture="{capture}",{feed}}}'] >= TABLES
    assert shown[f'tablewire_owner_jobs_ended_total{{{feed},kind="move",state="done"}}'] == 0
    assert shown[f'tablewire_owner_placements_total{{{feed},why="add"}}'] == TABLES
    assert 0 <= shown[f"tablewire_owner_checkpoint_lag_seconds{{{feed}}}"] < 10
    assert shown[f"tablewire_owner_checkpoint_ts{{{feed}}}"] > 0
    assert shown[f'tablewire_owner_exchange_seconds_count{{capture="{capture}"}}'] > 0
    assert shown[f'tablewire_owner_exchange_seconds_sum{{capture="{capture}"}}'] > 0
    assert shown[f'tablewire_owner_exchange_failing_seconds{{capture="{capture}"}}'] == 0
    assert shown["tablewire_owner_tick_seconds_count"] > 0
    processor = series(world, "processor0")
    assert 0 < processor["tablewire_processor_lease_margin_seconds"] <= 3
    assert processor[f'tablewire_processor_spans{{{feed},state="replicating"}}'] == TABLES


def test_scenario_30_series_go_with_their_changefeed_and_no_others(world: CounterWorld) -> None:
    """On the owner and on the processor; the other one's name begins with the same letters."""

    def of(node: str, changefeed: str) -> set[str]:
        return {name for name in series(world, node) if f'changefeed="default/{changefeed}"' in name}

    before = {node: of(node, "one-two") for node in ("owner0", "processor0")}
    assert all(before.values())
    world.cluster.owner_json("changefeed", "remove", "one", "--wait")
    for node, names in before.items():
        world.cluster.wait(f"{node} has forgotten it", lambda node=node: not of(node, "one"), WAIT_S)
        assert names <= of(node, "one-two")
