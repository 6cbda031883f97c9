"""Nodes are killed and stopped under load; every row is exactly once at the postgres sink."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.harness, pytest.mark.integration]

Start = Callable[..., Any]
LEASE_TTL_MS = 2_000


def test_nothing_happens(replication: Start) -> None:
    """Without faults, everything that the load has changed is at the sink."""
    world = replication(etcd=1, owners=1, processors=1)
    world.more_rows(1_000)
    counts = world.finish()
    assert all(count > 0 for count in counts.by_kind.values())


def test_processor_killed_in_the_middle_of_a_load(replication: Start) -> None:
    """SIGKILL of the processor with most tables: other processors continue them, and no row is lost or duplicated."""
    world = replication(etcd=3, owners=2, processors=3, lease_ttl_ms=LEASE_TTL_MS)
    victim = world.busiest()
    capture = world.cluster.captures()[victim]
    assert capture in world.primaries().values()
    world.cluster.kill(victim)
    world.more_rows(300)
    world.wait_replicating_without(capture)
    world.more_rows(300)
    world.finish()


def test_processor_killed_when_the_sink_is_further_than_the_owner_knows(replication: Start) -> None:
    """Its last reports are lost: the successor starts from an old checkpoint and continues at the sink's position."""
    world = replication(etcd=1, owners=1, processors=3, lease_ttl_ms=LEASE_TTL_MS)
    victim = world.busiest()
    capture = world.cluster.captures()[victim]
    world.cluster.link("owner0", victim).cut("from_target")
    world.more_rows(800)
    world.cluster.kill(victim)
    world.wait_replicating_without(capture)
    world.more_rows(300)
    world.finish()


def test_leader_killed_in_the_middle_of_a_load(replication: Start) -> None:
    """SIGKILL of the leading owner: the other one leads under a newer election, and no row is lost or duplicated."""
    world = replication(etcd=3, owners=2, processors=3, lease_ttl_ms=LEASE_TTL_MS)
    leader = world.cluster.wait_for_leader()
    revision = world.cluster.admin.status()["leader_revision"]
    world.cluster.kill(leader)
    world.more_rows(300)
    successor = world.cluster.wait_for_leader(other_than=leader)
    assert world.cluster.admin.status()["leader_revision"] > revision
    world.wait_replicating()
    world.cluster.start_node(leader)
    assert world.cluster.leader() == successor
    world.more_rows(300)
    world.finish()


def test_scenario_12_processor_stopped_past_its_lease(replication: Start) -> None:
    """A processor is stopped (SIGSTOP) for longer than its lease: its tables continue elsewhere.

    When it is resumed (SIGCONT), the changes that it still holds are not written, and it returns as a new
    capture.
    """
    world = replication(etcd=3, owners=2, processors=3, lease_ttl_ms=LEASE_TTL_MS, rows_per_s=1_000)
    victim = world.busiest()
    capture = world.cluster.captures()[victim]
    world.cluster.pause(victim)
    world.wait_replicating_without(capture)
    world.more_rows(500)
    world.cluster.resume(victim)
    world.more_rows(500)
    world.cluster.wait(
        "the processor is back under a new id",
        lambda: world.cluster.captures().get(victim) not in (None, capture) or not world.cluster.node(victim).process.running,
    )
    assert capture not in world.primaries().values()
    world.finish()
