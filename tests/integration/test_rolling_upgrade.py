"""A running cluster whose processes are replaced one after the other by a release that speaks another version of the wire."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local.node import ROOT, service_environment
from deploy.local.process import ManagedProcess
from tests.plugins.counter_world import WAIT_S, CounterWorld, environment_of

pytestmark = pytest.mark.integration

TABLES = tuple(range(1, 7))
GAP_MS_MAX = 2_500


@pytest.fixture
def world(tmp_path: Path, plugin: Path) -> Iterator[CounterWorld]:
    """Two owners and two processors of this release, replicating."""
    world = CounterWorld(tmp_path, plugin, owners=2, processors=2)
    world.set_tables(*(f"public.t{number}" for number in TABLES))
    try:
        world.cluster.start()
        world.create()
        world.wait_steady(len(TABLES))
        yield world
    finally:
        world.close()


def as_release(world: CounterWorld, plugin: Path, name: str, lowest: int, highest: int) -> None:
    """This node's next start is of the release that speaks these versions."""
    node = world.cluster.node(name)
    command = [sys.executable, "-m", "tests.integration.versioned_process", node.kind, str(lowest), str(highest)]
    environment = service_environment(environment_of(plugin))
    node._process = ManagedProcess(name, [*command, str(node.config_file)], log=node.log, env=environment, cwd=ROOT)


def upgrade(world: CounterWorld, plugin: Path, name: str, lowest: int, highest: int) -> None:
    """SIGTERM, wait until it has left, start the other release, wait until it is back."""
    cluster = world.cluster
    former = cluster.captures().get(name)
    assert cluster.terminate(name) == 0
    as_release(world, plugin, name, lowest, highest)
    cluster.start_node(name)
    if cluster.node(name).kind == "processor":
        cluster.wait(f"{name} is back", lambda: cluster.captures().get(name) not in (None, former), WAIT_S)
        cluster.owner_json("rebalance", "--wait")
    else:
        cluster.wait("both owners are there", lambda: len(cluster.admin.status()["owners"]) == 2, WAIT_S)
    world.wait_steady(len(TABLES))


def spoken(world: CounterWorld) -> set[tuple[str, int]]:
    """(processor node, version of the wire) as the leader has it."""
    leader = world.cluster.wait_for_leader()
    nodes = {capture: node for node, capture in world.cluster.captures().items()}
    found = set()
    for line in world.cluster.node(leader).metrics().splitlines():
        if line.startswith("tablewire_owner_exchange_protocol_version{"):
            capture = line.partition('capture="')[2].partition('"')[0]
            found.add((nodes[capture], int(float(line.rpartition(" ")[2]))))
    return found


def test_scenario_36_two_versions_work_side_by_side(world: CounterWorld, plugin: Path) -> None:
    """Processors first, then owners, one at a time: at each step every pair speaks its highest common version, every table goes
    on without a gap, and nothing is written twice."""
    assert spoken(world) == {("processor0", 1), ("processor1", 1)}
    upgrade(world, plugin, "processor0", 1, 2)
    assert set(world.primaries().values()) == set(world.cluster.captures().values())
    assert spoken(world) == {("processor0", 1), ("processor1", 1)}
    for owner in ("owner0", "owner1"):
        upgrade(world, plugin, owner, 1, 2)
    assert spoken(world) == {("processor0", 2), ("processor1", 1)}
    target = world.capture_of("processor0")
    for table, holder in world.primaries().items():
        if holder != target:
            world.cluster.owner_json("table", "move", str(table), "--to", target, "--wait")
    upgrade(world, plugin, "processor1", 1, 2)
    assert spoken(world) == {("processor0", 2), ("processor1", 2)}
    world.wait_written(*TABLES)
    world.audit(*TABLES)
    assert max(map(world.longest_gap_ms, TABLES)) < GAP_MS_MAX


def test_scenario_36_who_speaks_nothing_in_common_is_named_and_the_others_go_on(world: CounterWorld, plugin: Path) -> None:
    """It is listed with the reason, gets no table, cannot be moved to, and disturbs no other; once
    it supports our version it works."""
    cluster = world.cluster
    cluster.terminate("processor1")
    world.wait_steady(len(TABLES))
    as_release(world, plugin, "processor1", 7, 9)
    cluster.start_node("processor1")
    cluster.wait("it is listed", lambda: "processor1" in cluster.captures(), WAIT_S)
    row = next(row for row in cluster.owner_json("capture", "list")["captures"] if row["labels"]["node"] == "processor1")
    assert (row["state"], row["spans"]) == ("incompatible", 0)
    assert row["labels"]["incompatible"] == "speaks protocol 7 to 9, this owner 1"
    assert cluster.owner_json("rebalance", "--wait")["state"] == "done"
    assert set(world.primaries().values()) == {world.capture_of("processor0")}
    world.wait_written(*TABLES)
    assert cluster.admin.changefeed("one")["state"] == "normal"
    cluster.terminate("processor1")
    upgrade_target = cluster.node("processor1")
    as_release(world, plugin, "processor1", 1, 7)
    upgrade_target.start()
    upgrade_target.wait_ready()
    cluster.wait("it is ready", lambda: [row["state"] for row in cluster.admin.captures()] == ["ready", "ready"], WAIT_S)
    world.audit(*TABLES)


def test_scenario_36_a_leader_that_cannot_speak_with_a_holder_writes_nothing_twice(world: CounterWorld, plugin: Path) -> None:
    """An upgrade that skipped a release: what the old processor holds stays its own until its registration is over."""
    cluster = world.cluster
    upgrade(world, plugin, "processor0", 1, 2)
    for owner in ("owner0", "owner1"):
        cluster.node(owner).config["scheduler"] = {"capture_evict_ms": 5_000, "bootstrap_timeout_ms": 1_000}
        cluster.terminate(owner)
        as_release(world, plugin, owner, 2, 2)
        cluster.start_node(owner)
    cluster.wait_for_leader()
    alone = world.capture_of("processor0")
    cluster.wait("all tables are where they can be", lambda: set(world.primaries().values()) == {alone}, 60.0)
    world.wait_steady(len(TABLES))
    world.wait_written(*TABLES)
    states = {row["labels"]["node"]: row["state"] for row in cluster.admin.captures()}
    assert states == {"processor0": "ready", "processor1": "incompatible"}
    world.audit(*TABLES)
