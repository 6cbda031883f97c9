"""A move can be followed through the logs of all processes, by the ids that their lines have in common."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.plugins.counter_world import WAIT_S, CounterWorld, install_plugin

pytestmark = pytest.mark.integration


@pytest.fixture
def world(tmp_path: Path) -> Iterator[CounterWorld]:
    """Twenty tables on two processors."""
    world = CounterWorld(tmp_path / "world", install_plugin(tmp_path / "plugin"), processors=2)
    world.set_tables(*(f"public.t{number}" for number in range(1, 21)))
    try:
        world.cluster.start()
        world.create()
        world.wait_steady(20)
        yield world
    finally:
        world.close()


def lines(world: CounterWorld, node: str, event: str, **ids: object) -> list[dict[str, Any]]:
    """The log's lines of this event with these ids."""
    found = [json.loads(line) for line in world.log(node).splitlines() if line.startswith("{")]
    return [line for line in found if line["event"] == event and all(line.get(name) == value for name, value in ids.items())]


def test_a_move_is_one_story_in_three_logs(world: CounterWorld) -> None:
    """Prepare and write at the target, stop at the source, the end at the owner; a start of many tables is no line per table. The
    job's id is in each of them, in the events and in what the CLI answers."""
    source = world.primaries()[1]
    nodes = {capture: node for node, capture in world.cluster.captures().items()}
    target = next(capture for capture in nodes if capture != source)
    answered = world.cluster.owner_json("table", "move", "public.t1", "--to", target, "--wait")
    ids: dict[str, Any] = {"changefeed": "default/one", "job": answered["id"]}
    (asked,) = lines(world, "owner0", "move_requested", **ids)
    assert (asked["subject"], asked["by"]) == ("public.t1", answered["by"])
    ids["span"] = "1"
    world.cluster.wait("the owner tells", lambda: lines(world, "owner0", "span_moved", **ids), WAIT_S)
    (moved,) = lines(world, "owner0", "span_moved", **ids)
    assert (moved["source"], moved["target"], moved["why"]) == (source, target, "move")
    ids["owner_revision"] = moved["owner_revision"]
    assert moved["owner_revision"] > 0
    prepare, write = lines(world, nodes[target], "span_ordered", capture=target, **ids)
    assert (prepare["order"], write["order"]) == ("prepare", "write")
    (stop,) = lines(world, nodes[source], "span_ordered", capture=source, **ids)
    assert stop["order"] == "stop"
    assert asked["timestamp"] < prepare["timestamp"] < stop["timestamp"] < write["timestamp"] < moved["timestamp"]
    assert write["assignment_epoch"] == world.writes(1)[-1].epoch
    story = [event for event in world.cluster.owner_json("events")["events"] if event["job"] == answered["id"]]
    assert [(event["kind"], event["subject"]) for event in story] == [
        ("move_requested", "public.t1"),
        ("span_moved", "public.t1"),
    ]
    for node in nodes.values():
        assert len(lines(world, node, "span_ordered")) <= 3
        assert lines(world, node, "spans_ordered")
