"""Rebalance, drains with nowhere to go, and the brake, on a real cluster and as an operator sees them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.plugins.counter_world import WAIT_S, CounterWorld, NewWorld

pytestmark = pytest.mark.integration

TABLES = 6


def held(world: CounterWorld, *changefeeds: str) -> Counter[str]:
    """How many tables each capture writes."""
    return sum((Counter(world.primaries(name).values()) for name in changefeeds), Counter())


def sample(world: CounterWorld, name: str, **labels: str) -> float:
    """Of the leader's /metrics."""
    text = world.cluster.node(world.cluster.wait_for_leader()).metrics()
    for family in text_string_to_metric_families(text):
        for found in family.samples:
            if found.name == name and found.labels == labels:
                return float(found.value)
    raise AssertionError(f"no {name} {labels} in\n{text}")


def capture_row(world: CounterWorld, capture: str) -> Any:
    return next(row for row in world.cluster.owner_json("capture", "list")["captures"] if row["id"] == capture)


def test_scenario_26_a_rebalance_evens_out_the_cluster(new_world: NewWorld, tmp_path: Path) -> None:
    """Two changefeeds sit on one capture after a drain; the plan says what would move, the rebalance does it, nothing is lost."""
    world = new_world(processors=2)
    ask = world.cluster.owner_json
    sinks = {"one": world.sink, "two": tmp_path / "second"}
    sinks["two"].mkdir()
    for name, sink in sinks.items():
        world.create(name, sink=sink)
        world.wait_steady(TABLES, name)
    full, empty = world.capture_of("processor0"), world.capture_of("processor1")
    assert ask("capture", "drain", empty, "--dry-run")["load_after"] == {full: 2 * TABLES, empty: 0}
    assert ask("capture", "drain", empty, "--wait")["remaining"] == 0
    assert not ask("capture", "drain", empty, "--cancel")["draining"]
    assert held(world, "one", "two") == {full: 2 * TABLES}

    plan = ask("rebalance", "--dry-run")
    assert plan["changefeeds"] == ["default/one", "default/two"]
    assert (plan["load_before"][empty], plan["load_after"][empty]) == (0, TABLES)
    assert held(world, "one", "two") == {full: 2 * TABLES}
    done = ask("rebalance", "--wait")
    assert (done["state"], len(done["jobs"])) == ("done", 2)
    assert held(world, "one", "two") == {full: TABLES, empty: TABLES}
    assert ask("rebalance", "--dry-run")["moves"] == []
    moved = sum(sample(world, "tablewire_owner_placements_total", changefeed=f"default/{name}", why="balance") for name in sinks)
    assert moved == TABLES == len(plan["moves"])
    assert ask("rebalance", "--wait", "--changefeed", "two")["jobs"][0]["changefeed"] == "default/two"
    world.wait_written(*range(1, TABLES + 1))
    world.audit(*range(1, TABLES + 1))


def test_a_drain_of_the_only_capture_waits_for_another_one(new_world: NewWorld) -> None:
    """Accepted, said, and done as soon as a processor joins."""
    world = new_world(processors=1)
    world.create()
    world.wait_steady(TABLES)
    only = world.capture_of("processor0")
    world.cluster.owner_json("capture", "drain", only)
    world.cluster.wait("the drain says why", lambda: capture_row(world, only)["reasons"] == {"no_capture": TABLES}, WAIT_S)
    said = world.cluster.owner_cli("capture", "drain", only).stdout
    assert "no other processor is ready to take them: start a processor, or cancel the drain" in said
    assert f"{TABLES} left (no_capture {TABLES})" in world.cluster.owner_cli("capture", "list").stdout
    world.cluster.add_node("processor", 1)
    world.cluster.start_node("processor1")
    answer = world.cluster.owner_json("capture", "drain", only, "--wait")
    assert (answer["remaining"], answer["note"]) == (0, None)
    assert set(world.primaries().values()) == {world.capture_of("processor1")}
    world.audit(*range(1, TABLES + 1))


def test_the_brake_holds_and_lets_go(new_world: NewWorld) -> None:
    """Three of four processors die at once: what runs continues, the rest waits and says so, then it is placed again."""
    world = new_world(processors=4, owner_config={"scheduler": {"brake_hold_ms": 12_000}})
    world.create()
    world.wait_steady(TABLES)
    survivor = world.capture_of("processor3")
    kept = [table for table, capture in world.primaries().items() if capture == survivor]
    for number in range(3):
        world.cluster.kill(f"processor{number}")
    world.cluster.wait("the brake is on", lambda: world.cluster.owner_json("status")["braked"] == ["default/one"], WAIT_S)
    assert "brake" in world.cluster.owner_cli("status").stdout
    assert sample(world, "tablewire_owner_brake", changefeed="default/one") == 1
    stalled = world.cluster.owner_json("table", "list", "--stalled")["tables"]
    assert {row["stall_reason"] for row in stalled} == {"brake"}
    world.wait_written(*kept)
    world.wait_steady(TABLES)
    assert world.cluster.owner_json("status")["braked"] == []
    assert sample(world, "tablewire_owner_brakes_total", changefeed="default/one") == 1
    assert sample(world, "tablewire_owner_failovers_total", changefeed="default/one") >= 1
    world.wait_written(*range(1, TABLES + 1))
    world.audit(*range(1, TABLES + 1))
