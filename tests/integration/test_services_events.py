"""The history and the statistics of a real cluster: real etcd, real services, and the CLI as an operator runs it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest

from deploy.local.node import ROOT, service_environment
from tests.plugins.counter_world import WAIT_S, CounterWorld, NewWorld

pytestmark = pytest.mark.integration


def events(world: CounterWorld) -> list[Any]:
    found: list[Any] = world.cluster.owner_json("events", "-n", "0")["events"]
    return found


def wait_event(world: CounterWorld, kind: str, **fields: str) -> Any:
    """The newest event of this kind with these fields, once there is one."""

    def newest() -> Any:
        matching = [
            event
            for event in events(world)
            if event["kind"] == kind and all(text in (event[name] or "") for name, text in fields.items())
        ]
        return matching[-1] if matching else None

    world.cluster.wait(f"there is an event {kind} {fields}", lambda: newest() is not None, WAIT_S)
    return newest()


def test_what_happens_is_kept_and_survives_the_leader(new_world: NewWorld) -> None:
    """A changefeed's life, a move by name, a failover with its counts, and both elections; any owner answers."""
    world = new_world(owners=2, processors=2)
    world.create()
    world.wait_steady(6)
    captures = world.cluster.captures()
    before = world.primaries()[1]
    target = next(capture for capture in captures.values() if capture != before)
    world.cluster.owner_json("table", "move", "public.t1", "--to", target, "--wait")
    moved = wait_event(world, "span_moved")
    assert (moved["subject"], moved["text"], moved["why"]) == ("public.t1", f"from {before} to {target}", "move")
    assert moved["changefeed"] == "default/one"
    world.cluster.owner_json("resign")
    left = wait_event(world, "owner_stops_leading")
    assert left["why"] == "it was asked to resign"
    assert wait_event(world, "owner_leads")["owner"] != left["owner"]

    world.cluster.kill("processor0")
    wait_event(world, "capture_gone", subject=captures["processor0"])
    wait_event(world, "failover_done")
    assert captures["processor0"] in wait_event(world, "failover_began")["subject"]
    wait_event(world, "spans_placed", why="add")
    assert wait_event(world, "capture_gone")["why"] is None  # it was lost

    world.cluster.owner_json("changefeed", "pause", "one")
    world.cluster.owner_json("changefeed", "resume", "one")
    world.wait_steady(6)
    world.cluster.owner_json("changefeed", "remove", "one", "--wait")
    wait_event(world, "changefeed_removed", changefeed="default/one")
    listed = events(world)
    kinds = [event["kind"] for event in listed]
    life = [kind for kind in kinds if kind.startswith("changefeed_") and kind != "changefeed_bootstrapped"]
    assert life[:3] == ["changefeed_created", "changefeed_paused", "changefeed_resumed"]
    assert life[-1] == "changefeed_removed"
    asked = {event["kind"]: event["by"] for event in listed if event["by"]}
    assert asked.keys() == {
        "changefeed_created", "changefeed_paused", "changefeed_resumed", "changefeed_removing",
        "move_requested", "span_moved", "owner_stops_leading",
    }  # fmt: skip
    assert all(by.startswith("127.") for by in asked.values())
    assert [event["sequence"] for event in listed] == list(range(1, len(listed) + 1))
    assert len(kinds) < 40


def test_a_follower_of_events_sees_each_once_over_a_change_of_the_leader(new_world: NewWorld) -> None:
    """It continues with the next leader where it was, and Ctrl-C ends it with exit code 0."""
    world = new_world(owners=2, processors=1)
    environment = {**service_environment({}), "TABLEWIRE_ENDPOINTS": ",".join(world.cluster.admin_endpoints)}
    process = subprocess.Popen(
        [sys.executable, "-m", "owner", "events", "--follow", "-n", "0", "-o", "json"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    seen: list[Any] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: seen.extend(map(json.loads, process.stdout)))  # type: ignore[arg-type]
    reader.start()
    try:
        world.create()
        world.cluster.wait("the first ones are seen", lambda: "changefeed_created" in kinds_of(seen), WAIT_S)
        leader = world.cluster.wait_for_leader()
        world.cluster.kill(leader)
        world.cluster.wait_for_leader(other_than=leader)
        world.cluster.owner_json("changefeed", "pause", "one")
        world.cluster.wait("the later ones are seen", lambda: "changefeed_paused" in kinds_of(seen), WAIT_S)
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.wait()
        reader.join(WAIT_S)
    sequences = [event["sequence"] for event in seen]
    assert sequences == list(range(1, len(sequences) + 1))


def kinds_of(events: list[Any]) -> set[str]:
    return {event["kind"] for event in events}
