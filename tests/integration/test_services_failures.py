"""Both services as real processes with a real etcd, and what happens to them: kills, pauses, cuts, and being asked to leave."""

from __future__ import annotations

import signal
import time

import pytest

from deploy.local.process import wait_until
from tests.plugins.counter_world import WAIT_S, CounterWorld, NewWorld, now_ms

pytestmark = pytest.mark.integration

TTL_S = 3.0
GAP_MS_MAX = 2_500
"""A table that waits for a lease stands longer than this."""
TABLES = tuple(range(1, 7))


@pytest.fixture
def new_world(new_world: NewWorld) -> NewWorld:
    """Starts a cluster that replicates six tables."""

    def start(**options: object) -> CounterWorld:
        world = new_world(**options)
        world.replicate(*TABLES)
        return world

    return start


def _others(world: CounterWorld, capture: str) -> None:
    """Waits until every table is written by somebody else."""
    wait_until(
        f"all tables are written by others than {capture}",
        lambda: all(world.writes(table)[-1].capture != capture for table in TABLES),
        WAIT_S,
    )


def _back(world: CounterWorld, node: str, former: str) -> None:
    """Waits until the processor is registered under another id."""
    world.cluster.wait("it is back under a new id", lambda: world.cluster.captures().get(node) not in (None, former), WAIT_S)


def test_the_tables_of_a_killed_processor_go_on_elsewhere(new_world: NewWorld) -> None:
    """Within the lease's TTL and a little, exactly where they stopped."""
    world = new_world(processors=2)
    victim = world.capture_of("processor0")
    world.cluster.kill("processor0")
    killed = time.monotonic()
    _others(world, victim)
    assert time.monotonic() - killed < TTL_S + 5.0
    world.audit(*TABLES)


def test_a_new_leader_goes_on_without_moving_anything(new_world: NewWorld) -> None:
    """The next owner leads within the TTL and a little; no table moves or stops, and the checkpoint never goes back."""
    world = new_world(owners=2, processors=2)
    leader = world.cluster.wait_for_leader()
    before, epochs = world.primaries(), {table: world.writes(table)[-1].fence for table in TABLES}
    checkpoint = world.cluster.admin.changefeed("one")["checkpoint_ts"]
    world.cluster.kill(leader)
    killed = time.monotonic()
    world.cluster.wait_for_leader(other_than=leader)
    assert time.monotonic() - killed < TTL_S + 4.0
    seen = [checkpoint]

    def moves_on() -> bool:
        seen.append(world.cluster.admin.changefeed("one")["checkpoint_ts"])
        return seen[-1] > checkpoint + 2 * TTL_S * 1_000

    world.cluster.wait("the checkpoint moves on", moves_on, WAIT_S)
    assert seen == sorted(seen)
    assert world.primaries() == before
    assert {table: world.writes(table)[-1].fence for table in TABLES} == epochs
    assert max(map(world.longest_gap_ms, TABLES)) < GAP_MS_MAX
    world.audit(*TABLES)


def test_an_owner_that_is_asked_to_leave_hands_over_at_once(new_world: NewWorld) -> None:
    """It resigns first: the next owner does not wait for a lease to expire."""
    world = new_world(owners=2, lease_ttl_ms=10_000)
    leader = world.cluster.wait_for_leader()
    asked = time.monotonic()
    world.cluster.node(leader).process.send_signal(signal.SIGTERM)
    world.cluster.wait_for_leader(other_than=leader)
    assert time.monotonic() - asked < 5.0
    assert world.cluster.node(leader).process.wait(10.0) == 0
    world.wait_written(*TABLES)
    assert max(map(world.longest_gap_ms, TABLES)) < GAP_MS_MAX
    world.audit(*TABLES)


def test_a_resigned_leader_stays_as_a_follower(new_world: NewWorld) -> None:
    """`owner resign` moves leadership to the other one at once, and the former one can lead again."""
    world = new_world(owners=2)
    first = world.cluster.wait_for_leader()
    world.cluster.owner_json("resign")
    second = world.cluster.wait_for_leader(other_than=first)
    world.cluster.wait("both are candidates", lambda: len(world.cluster.admin.status()["owners"]) == 2, WAIT_S)
    world.cluster.owner_json("resign")
    world.cluster.wait_for_leader(other_than=second)
    world.wait_steady(len(TABLES))
    world.audit(*TABLES)


def test_a_processor_that_is_asked_to_leave_is_drained_first(new_world: NewWorld) -> None:
    """Its tables move away one by one without a gap; it leaves by itself, with exit code 0."""
    world = new_world(processors=2)
    leaving = world.capture_of("processor1")
    assert leaving in world.primaries().values()
    assert world.cluster.terminate("processor1", timeout_s=WAIT_S) == 0
    assert leaving not in world.primaries().values()
    world.wait_written(*TABLES)
    assert max(map(world.longest_gap_ms, TABLES)) < GAP_MS_MAX
    assert "leaves_undrained" not in world.log("processor1")
    gone = [event for event in world.cluster.owner_json("events")["events"] if event["kind"] == "capture_gone"]
    assert [(event["subject"], event["why"]) for event in gone] == [(leaving, "it was stopping")]
    world.audit(*TABLES)


def test_the_last_processor_does_not_wait_for_nobody(new_world: NewWorld) -> None:
    """Without another one that could take its tables it stops them and leaves; the next one continues from there."""
    world = new_world()
    assert world.cluster.terminate("processor0", timeout_s=10.0) == 0
    world.cluster.start_node("processor0")
    world.wait_written(*TABLES)
    world.audit(*TABLES)


def test_a_second_signal_leaves_at_once(new_world: NewWorld) -> None:
    """Whatever it was waiting for."""
    world = new_world(processors=2, links=True)
    world.cluster.link("owner0", "processor1").cut()  # so that its drain never ends
    process = world.cluster.node("processor1").process
    process.send_signal(signal.SIGTERM)
    wait_until("it is stopping", lambda: '"stopping"' in world.log("processor1"), WAIT_S)
    process.send_signal(signal.SIGTERM)
    assert process.wait(2.0) == 128 + signal.SIGTERM


def test_scenario_12_a_paused_processor_writes_nothing_when_it_wakes_up(new_world: NewWorld) -> None:
    """SIGSTOP past the lease, SIGCONT: its tables run elsewhere, it writes nothing under its old
    id, and comes back under a new id."""
    world = new_world(processors=2)
    paused = world.capture_of("processor0")
    world.cluster.pause("processor0")
    _others(world, paused)
    woken = now_ms()
    world.cluster.resume("processor0")
    _back(world, "processor0", paused)
    world.wait_written(*TABLES)
    assert all(write.at_ms < woken for table in TABLES for write in world.writes(table) if write.capture == paused)
    world.audit(*TABLES)
    assert world.cluster.node("processor0").process.running


def test_scenario_13_a_processor_without_etcd_stops_before_its_lease_ends(new_world: NewWorld) -> None:
    """Cut off from etcd and not from the sink: it stops by itself, others go on, and it comes back when the cut is healed."""
    world = new_world(processors=2, links=True)
    alone = world.capture_of("processor0")
    mine = [table for table, capture in world.primaries().items() if capture == alone]
    assert mine
    world.cluster.link("processor0", "etcd0").cut()
    _others(world, alone)
    for table in mine:
        writes = world.writes(table)
        taken_at = next(write.at_ms for write in writes if write.capture != alone)
        assert max(write.at_ms for write in writes if write.capture == alone) < taken_at
    world.cluster.heal()
    _back(world, "processor0", alone)
    world.audit(*TABLES)


def test_an_owner_without_etcd_steps_down_and_the_other_leads(new_world: NewWorld) -> None:
    """Cut off from etcd and not from the processors: it stops speaking to them before the next one begins."""
    world = new_world(owners=2, links=True)
    leader = world.cluster.wait_for_leader()
    world.cluster.link(leader, "etcd0").cut()
    wait_until("it steps down", lambda: "steps_down" in world.log(leader), WAIT_S)
    other = next(name for name in world.cluster.owners if name != leader)
    wait_until("the other one leads", lambda: '"leads"' in world.log(other), WAIT_S)
    world.cluster.heal()
    world.wait_steady(len(TABLES))
    world.wait_written(*TABLES)
    world.audit(*TABLES)


def test_a_leader_that_was_paused_past_its_lease_says_nothing_more(new_world: NewWorld) -> None:
    """SIGSTOP, another one leads, SIGCONT: the former leader steps down before it sends anything, and nothing moves."""
    world = new_world(owners=2, processors=2)
    leader, before = world.cluster.wait_for_leader(), world.primaries()
    world.cluster.pause(leader)
    other = _other_owner(world, leader)
    wait_until("the other one leads", lambda: '"leads"' in world.log(other), WAIT_S)
    world.wait_steady(len(TABLES))
    world.cluster.resume(leader)
    wait_until("the former one steps down", lambda: '"steps_down"' in world.log(leader), WAIT_S)
    world.wait_written(*TABLES)
    assert world.primaries() == before
    assert world.cluster.leader() == other
    assert max(map(world.longest_gap_ms, TABLES)) < GAP_MS_MAX
    world.audit(*TABLES)


def test_leader_and_processor_killed_together(new_world: NewWorld) -> None:
    """The next leader finds out by itself what went with them."""
    world = new_world(owners=2, processors=3)
    leader, victim = world.cluster.wait_for_leader(), world.capture_of("processor1")
    world.cluster.kill("processor1")
    world.cluster.kill(leader)
    _others(world, victim)
    world.cluster.start_node("processor1")
    world.cluster.start_node(leader)
    world.wait_steady(len(TABLES))
    world.audit(*TABLES)


def test_all_comes_back_after_etcd_was_away(new_world: NewWorld) -> None:
    """No service acts without it, no process ends, and when it is back everything continues where it stopped."""
    world = new_world(owners=2, processors=2)
    world.cluster.kill("etcd0")
    wait_until("all writing has stopped", lambda: now_ms() - max(world.writes(t)[-1].at_ms for t in TABLES) > 500, WAIT_S)
    world.cluster.start_node("etcd0")
    world.wait_written(*TABLES)
    world.wait_steady(len(TABLES))
    assert all(node.process.running for node in world.cluster.nodes.values())
    world.audit(*TABLES)


def test_a_processor_that_the_owner_cannot_reach_keeps_its_tables(new_world: NewWorld) -> None:
    """Its lease lives, so its tables stay its own, and it continues; when the link is back nothing has moved."""
    world = new_world(processors=2, links=True)
    before = world.primaries()
    cut = world.capture_of("processor0")
    world.cluster.link("owner0", "processor0").cut()
    world.cluster.wait("it counts as silent", lambda: _state(world, cut) == "silent", WAIT_S)
    world.wait_written(*TABLES)
    world.cluster.heal()
    world.cluster.wait("it answers again", lambda: _state(world, cut) == "ready", WAIT_S)
    assert world.primaries() == before
    world.audit(*TABLES)


def test_scenario_22_a_drain_survives_the_leader(new_world: NewWorld) -> None:
    """The target is stored in etcd: the next leader continues the drain, gives it nothing new, and
    forgets it when it has left."""
    world = new_world(owners=2, processors=2)
    target = world.capture_of("processor0")
    leader = world.cluster.wait_for_leader()
    world.cluster.owner_json("capture", "drain", target)
    world.cluster.kill(leader)
    world.cluster.wait_for_leader(other_than=leader)
    world.cluster.wait("all tables have left", lambda: target not in world.primaries().values(), WAIT_S)
    world.set_tables(*(f"public.t{number}" for number in range(1, 11)))
    world.wait_steady(10)
    assert target not in world.primaries().values()
    assert [row["draining"] for row in world.cluster.admin.captures() if row["id"] == target] == [True]
    world.audit(*TABLES)
    assert world.cluster.terminate("processor0", timeout_s=WAIT_S) == 0
    wait_until("the drain is forgotten", lambda: '"drain_ended"' in world.log(_other_owner(world, leader)), WAIT_S)


def test_the_loss_of_one_etcd_member_is_not_noticed(new_world: NewWorld) -> None:
    """Whichever member a process is connected to: no lease is lost, no table stops or moves."""
    world = new_world(etcd=3, owners=2, processors=2)
    before, leader = world.primaries(), world.cluster.wait_for_leader()
    for member in ("etcd0", "etcd1", "etcd2"):
        world.cluster.kill(member)
        since = now_ms()
        world.wait_written(*TABLES, after_ms=since + int(TTL_S * 1_000))
        world.cluster.start_node(member)
    assert world.primaries() == before
    assert world.cluster.leader() == leader
    assert "registration_lost" not in world.log("processor0") + world.log("processor1")
    world.audit(*TABLES)


def _other_owner(world: CounterWorld, owner: str) -> str:
    return next(name for name in world.cluster.owners if name != owner)


def test_scenario_05_a_silent_processor_is_given_up_in_the_end(new_world: NewWorld) -> None:
    """etcd hears it and the owner does not: its registration is taken away, its tables continue
    elsewhere, it comes back under a new id."""
    world = new_world(
        processors=2, links=True, owner_config={"scheduler": {"capture_silent_ms": 1_000, "capture_evict_ms": 1_500}}
    )
    silent = world.capture_of("processor0")
    world.cluster.link("owner0", "processor0").cut()
    _others(world, silent)
    assert "registration_lost" in world.log("processor0")
    world.cluster.heal()
    _back(world, "processor0", silent)
    world.audit(*TABLES)


def _state(world: CounterWorld, capture: str) -> str:
    return next((str(row["state"]) for row in world.cluster.admin.captures() if row["id"] == capture), "gone")
