"""Links are cut, reset and stalled under load; every row is exactly once at the postgres sink."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.harness, pytest.mark.integration]

Start = Callable[..., Any]
LEASE_TTL_MS = 2_000


def test_scenario_13_processor_cut_off_from_etcd_but_not_from_the_sink(replication: Start) -> None:
    """It stops before its lease has expired, others continue its tables, and it returns when the link heals."""
    world = replication(etcd=1, owners=2, processors=3, lease_ttl_ms=LEASE_TTL_MS)
    victim = world.busiest()
    capture = world.cluster.captures()[victim]
    world.cluster.link(victim, "etcd0").cut()
    world.wait_replicating_without(capture)
    world.more_rows(300)
    world.cluster.heal()
    world.cluster.wait("it is back under a new id", lambda: world.cluster.captures().get(victim) not in (None, capture))
    world.more_rows(300)
    world.finish()


def test_scenario_13_leader_cut_off_from_etcd_but_not_from_the_processors(replication: Start) -> None:
    """It steps down: the other owner leads under a newer election, and no processor obeys the old one."""
    world = replication(etcd=1, owners=2, processors=2, lease_ttl_ms=LEASE_TTL_MS)
    leader = world.cluster.wait_for_leader()
    world.cluster.link(leader, "etcd0").cut()
    successor = world.cluster.wait_for_leader(other_than=leader)
    world.wait_replicating()
    world.more_rows(300)
    world.cluster.heal()
    world.more_rows(300)
    assert world.cluster.leader() == successor
    world.finish()


@pytest.mark.parametrize("direction", ["to_target", "from_target"])
def test_leader_and_processor_cannot_talk(replication: Start, direction: str) -> None:
    """One direction is cut: the processor continues its assignments, and after heal both agree again."""
    world = replication(etcd=1, owners=1, processors=2, lease_ttl_ms=LEASE_TTL_MS)
    link = world.cluster.link("owner0", world.busiest())
    assert link.accepted > 0
    link.cut(direction)
    world.more_rows(500)
    link.heal()
    world.wait_replicating()
    world.finish()


@pytest.mark.parametrize("server", ["source", "sink"])
def test_connections_to_postgres_are_reset(replication: Start, server: str) -> None:
    """Connections that break within transactions are opened again, and nothing is lost or duplicated."""
    world = replication(etcd=1, owners=1, processors=2, lease_ttl_ms=LEASE_TTL_MS, rows_per_s=1_000)
    for _ in range(5):
        for node in world.cluster.processors:
            world.cluster.link(node, server).reset()
        world.more_rows(400)
    world.wait_replicating()
    world.finish()


def test_sink_does_not_answer_for_a_while(replication: Start) -> None:
    """A stalled link to the sink holds changes back, within bounds; after heal all of them arrive."""
    world = replication(etcd=1, owners=1, processors=2, lease_ttl_ms=LEASE_TTL_MS, rows_per_s=1_000)
    links = [world.cluster.link(node, "sink") for node in world.cluster.processors]
    for link in links:
        link.stall()
    world.more_rows(3_000)
    for link in links:
        link.heal()
    world.wait_replicating()
    world.finish()


def test_etcd_member_killed_under_load(replication: Start) -> None:
    """One of three members dies and returns: leadership and leases survive, and replication continues."""
    world = replication(etcd=3, owners=2, processors=2, lease_ttl_ms=5_000)
    world.cluster.kill("etcd0")
    world.more_rows(500)
    world.wait_replicating()
    world.cluster.start_node("etcd0")
    world.more_rows(300)
    world.finish()


def test_etcd_in_trouble_under_load(replication: Start) -> None:
    """Each member is slow (pulses of SIGSTOP imitate a slow disk), then killed, then all are restarted.

    Leases and leadership survive, no table moves, and replication continues all the time.
    """
    world = replication(etcd=3, owners=2, processors=2, lease_ttl_ms=10_000)
    before, leader = world.primaries(), world.cluster.wait_for_leader()
    for member in world.cluster.etcd.members:
        for _ in range(3):
            member.pause()
            try:
                world.more_rows(200)
            finally:
                member.resume()
            world.more_rows(50)
    for member in world.cluster.etcd.members:
        member.kill()
        world.more_rows(200)
        member.start()
    world.cluster.etcd.kill()
    world.cluster.etcd.start()
    world.more_rows(300)
    world.wait_replicating()
    assert world.primaries() == before
    assert world.cluster.leader() == leader
    world.finish()
