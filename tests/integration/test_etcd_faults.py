"""Real services with three real etcd members: members lost, restarted or slow, a new leader,
compaction, a paused owner.

Replication continues, no table moves, and the watermark never moves backwards; a former leader
writes nothing and is refused.
"""

from __future__ import annotations

import re
from contextlib import closing

import grpc
import pytest

from deploy.local.node import PROCESSOR
from deploy.local.process import wait_until
from tablewire.runtime.grpc import open_channel
from tablewire.wire.codec import EXCHANGE_METHOD, EXCHANGE_SERVICE, BatchBuilder
from tests.integration.etcd_faults import Watched, compact, gateway, key_revisions, member_id, pulse, raft_leader, until_healthy
from tests.plugins.counter_world import WAIT_S, CounterWorld, NewWorld

pytestmark = pytest.mark.integration

TABLES = (1, 2, 3, 4)
TTL_MS = 10_000
"""etcd's default for us: a fault that ends before it has passed has no effect."""
GAP_MS_MAX = 2_500
"""Of a writer whose process has other things to do; without a fault it writes every 20 ms."""


@pytest.fixture
def new_world(new_world: NewWorld) -> NewWorld:
    """Start a cluster with three etcd members, two owners and two processors, which replicates four
    tables.
    """

    def start(**options: object) -> CounterWorld:
        world = new_world(**{"etcd": 3, "owners": 2, "processors": 2, "lease_ttl_ms": TTL_MS, **options})
        world.replicate(*TABLES)
        return world

    return start


def test_any_one_member_lost_and_restarted(new_world: NewWorld) -> None:
    """Each member, etcd's leader included, is killed and started again in turn, without an effect
    on the services.
    """
    world = new_world()
    assert raft_leader(world)
    for member in world.cluster.etcd.members:
        with Watched(world, TABLES, gap_ms=GAP_MS_MAX):
            member.kill()
            world.wait_written(*TABLES)
        with Watched(world, TABLES, gap_ms=GAP_MS_MAX):
            member.start()


def test_all_members_restarted(new_world: NewWorld) -> None:
    """All members are killed at once and started again within the lease TTL: leases, leadership and
    watches continue.
    """
    world = new_world()
    with Watched(world, TABLES, gap_ms=GAP_MS_MAX):
        world.cluster.etcd.kill()
        world.cluster.etcd.start()
    assert "leads" not in world.log(_follower(world))
    world.set_tables(*(f"public.t{number}" for number in range(1, 6)))
    world.wait_steady(5)
    world.cluster.kill("processor0")
    world.cluster.wait("the watches tell of a loss", lambda: len(world.cluster.captures()) == 1, WAIT_S)
    world.wait_written(*TABLES)


def test_etcd_changes_its_leader(new_world: NewWorld) -> None:
    """etcd changes its leader on request (move-leader) and because the leading member is killed."""
    world = new_world()
    former = raft_leader(world)
    other = next(member for member in world.cluster.etcd.members if member is not former)
    with Watched(world, TABLES, gap_ms=GAP_MS_MAX):
        gateway(former, "/v3/maintenance/transfer-leadership", {"targetID": member_id(other)})
        wait_until("etcd has another leader", lambda: raft_leader(world) is other, WAIT_S)
    with Watched(world, TABLES, gap_ms=GAP_MS_MAX):
        other.kill()
        wait_until("etcd has another leader", lambda: raft_leader(world) is not other, WAIT_S)
        other.start()


def test_compaction_while_services_are_cut_off(new_world: NewWorld) -> None:
    """The revision that the leader and a processor watch from is compacted while they cannot reach
    etcd: both reload, and know afterwards what changed meanwhile, here a new processor.
    """
    world = new_world(links=True)
    leader = world.cluster.wait_for_leader()
    late = world.cluster.add_node(PROCESSOR, 2)
    with Watched(world, TABLES, gap_ms=GAP_MS_MAX):
        links = [world.cluster.link(node, member) for node in (leader, "processor0") for member in world.cluster.etcd_names]
        for link in links:
            link.refuse()
        late.start()
        late.wait_ready()
        compact(world)
        for link in links:
            link.heal()
        for node in (leader, "processor0"):
            wait_until(f"{node} loads again", lambda node=node: '"watch_reloads"' in world.log(node), WAIT_S)
        world.cluster.wait("the new processor is known", lambda: "processor2" in world.cluster.captures(), WAIT_S)


def test_a_slow_disk(new_world: NewWorld) -> None:
    """SIGSTOP simulates a disk that delays a member: first the leading member and another one for
    0.4 s at a time, which causes no election, then the leading one for 2.5 s, which does. No lease
    is lost.
    """
    world = new_world()
    leading = raft_leader(world)
    with Watched(world, TABLES, gap_ms=GAP_MS_MAX):
        pulse(world, leading, 8, TABLES)
    with Watched(world, TABLES, gap_ms=GAP_MS_MAX):
        pulse(world, next(member for member in world.cluster.etcd.members if member is not leading), 8, TABLES)
    leading = raft_leader(world)
    with Watched(world, TABLES, gap_ms=GAP_MS_MAX):
        pulse(world, leading, 2, TABLES, pulse_ms=2_500)
        wait_until("all members are well", until_healthy(world), WAIT_S)


def test_no_quorum_for_longer_than_the_leases(new_world: NewWorld) -> None:
    """Without a quorum no service acts after its lease has expired; when the members are back,
    everything continues.
    """
    world = new_world(lease_ttl_ms=3_000)
    reached = world.cluster.admin.changefeed("one")["checkpoint_ts"]
    for name in ("etcd0", "etcd1"):
        world.cluster.kill(name)
    for node in world.cluster.processors:
        wait_until(f"{node} has fenced itself", lambda node=node: "registration_lost" in world.log(node), WAIT_S)
    for node in world.cluster.owners:
        wait_until(f"{node} says so", lambda node=node: not world.cluster.node(node).ready(), WAIT_S)
    for name in ("etcd0", "etcd1"):
        world.cluster.etcd.member(name).launch()
    world.wait_written(*TABLES)
    world.wait_steady(len(TABLES))
    assert world.cluster.admin.changefeed("one")["checkpoint_ts"] >= reached
    world.audit(*TABLES)


def test_a_paused_leader_that_resumes_writes_nothing_and_is_refused(new_world: NewWorld) -> None:
    """Another owner leads meanwhile, and is stopped while the former leader wakes up, so that every
    write would be the former leader's: it writes nothing but its own candidacy. A processor refuses
    its revision by name.
    """
    world = new_world(lease_ttl_ms=6_000)
    former = world.cluster.wait_for_leader()
    revision = world.cluster.admin.status()["leader_revision"]
    world.cluster.pause(former)
    other = _follower(world, former)
    wait_until("the other one leads", lambda: '"leads"' in world.log(other), WAIT_S)
    world.wait_steady(len(TABLES))
    world.cluster.pause(other)
    before = key_revisions(world)
    world.cluster.resume(former)
    wait_until("the former one steps down", lambda: '"steps_down"' in world.log(former), WAIT_S)
    wait_until("it is in the line again", lambda: len(_candidates(world)) == 2, WAIT_S)
    after = key_revisions(world)
    world.cluster.resume(other)
    prefix = f"/tablewire/{world.cluster.name}/owner/"
    assert {key: at for key, at in after.items() if not key.startswith(prefix)} == {
        key: at for key, at in before.items() if not key.startswith(prefix)
    }
    for node in world.cluster.processors:
        error = _exchange_as(world, former, revision, node)
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert re.fullmatch(rf"owner_revision: {revision} has been replaced by \d+", error.details())
    with Watched(world, TABLES, gap_ms=GAP_MS_MAX):
        assert world.cluster.leader() == other
    assert world.longest_gap_ms(1) < GAP_MS_MAX


def _follower(world: CounterWorld, leader: str = "") -> str:
    leader = leader or world.cluster.wait_for_leader()
    return next(name for name in world.cluster.owners if name != leader)


def _candidates(world: CounterWorld) -> list[str]:
    return [key for key in key_revisions(world) if key.startswith(f"/tablewire/{world.cluster.name}/owner/")]


def _exchange_as(world: CounterWorld, owner: str, revision: int, node: str) -> grpc.RpcError:
    """Return the response of a processor to an Exchange of this owner and revision. It names no
    changefeed, so that the processor would close all agents if it accepted it.
    """
    batch = BatchBuilder(owner, world.capture_of(node), revision, ()).finish()
    with closing(open_channel(world.cluster.node(node).address)) as channel:
        try:
            channel.unary_unary(f"/{EXCHANGE_SERVICE}/{EXCHANGE_METHOD}")(batch, timeout=20)
        except grpc.RpcError as error:
            return error
    raise AssertionError("a former leader was obeyed")
