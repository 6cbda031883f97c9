"""The owner CLI against real owners and processors: every command, whichever owner is asked, and when owners come and go."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local.cluster import CliError
from tests.plugins.counter_world import CounterWorld

pytestmark = pytest.mark.integration

TABLES = 6


@pytest.fixture
def world(tmp_path: Path, plugin: Path) -> Iterator[CounterWorld]:
    """Two owners, two processors, six tables, no changefeed yet."""
    world = CounterWorld(tmp_path, plugin, owners=2, processors=2)
    world.set_tables(*(f"public.t{number}" for number in range(1, TABLES + 1)))
    with world.cluster:
        yield world


def refusal(world: CounterWorld, *arguments: str) -> str:
    """The reason of a command that must fail; the same on stderr and as JSON, which is all there is on stdout."""
    done = world.cluster.owner_cli(*arguments, "-o", "json")
    assert done.returncode == 1, done
    message: str = json.loads(done.stdout)["error"]["message"]
    assert done.stderr.rstrip().endswith(f"Error: {message}")
    return message


def test_an_operators_day(world: CounterWorld) -> None:
    """Create, look, move, pause, resume, drain, remove: each says what became of it, and refuses with the reason."""
    ask = world.cluster.owner_json
    assert "no changefeed" in refusal(world, "table", "list")
    assert "tables_match: nothing matches nothing.*" in refusal(
        world, "changefeed", "create", "--id", "one", "--tables", "nothing.*",
        "--source", f"counter://{world.source}", "--sink", f"file://{world.sink}",
    )  # fmt: skip
    assert ask("changefeed", "list") == {"changefeeds": []}
    assert world.create()["changefeed"] == "default/one"
    assert "default/one exists already" in refusal(
        world, "changefeed", "create", "--id", "one", "--tables", "*", "--source", "counter:///x", "--sink", "file:///x"
    )
    world.wait_steady(TABLES)

    status = ask("status")
    assert len(status["owners"]) == 2
    assert (status["captures_by_state"], status["changefeeds_by_state"]) == ({"ready": 2}, {"normal": 1})
    captures = {row["id"]: row for row in ask("capture", "list")["captures"]}
    tables = ask("table", "list")["tables"]
    assert sum(row["spans"] for row in captures.values()) == len(tables) == TABLES
    assert {row["table"] for row in tables} == {f"public.t{number}" for number in range(1, TABLES + 1)}

    source = tables[0]["primary"]
    target = next(capture for capture in captures if capture != source)
    moved = ask("table", "move", "public.t1", "--to", target, "--wait")
    assert (moved["state"], moved["target"], moved["capture"]) == ("done", "public.t1", target)
    assert ask("table", "list", "--table", "1")["tables"][0]["primary"] == target
    assert f"processor {target} is already the primary" in refusal(world, "table", "move", "1", "--to", target)
    assert "no table 'public.t99'" in refusal(world, "table", "move", "public.t99", "--to", target)
    assert "no processor 'nobody'" in refusal(world, "table", "move", "1", "--to", "nobody")
    assert ask("rebalance", "--wait")["state"] == "done"

    drained = ask("capture", "drain", target, "--wait")
    assert (drained["remaining"], drained["draining"]) == (0, True)
    assert {row["primary"] for row in ask("table", "list")["tables"]} == {source}
    assert "is being drained" in refusal(world, "table", "move", "1", "--to", target)
    assert not ask("capture", "drain", target, "--cancel")["draining"]

    assert ask("changefeed", "pause")["state"] == "stopped"
    assert "is stopped, so it has no tables now" in refusal(world, "table", "list")
    assert "paused already" in refusal(world, "changefeed", "pause")
    assert ask("changefeed", "resume")["state"] == "normal"
    world.wait_steady(TABLES)
    shown = ask("changefeed", "query")
    assert (shown["running"], shown["spans"], shown["stalls"]) == (True, TABLES, {})
    assert ask("changefeed", "remove", "one", "--wait") == {"changefeed": "default/one", "gone": True}
    assert ask("changefeed", "list") == {"changefeeds": []}


def test_resign_hands_over_and_any_owner_answers(world: CounterWorld) -> None:
    """The former leader passes calls on from then on; a dead owner among the endpoints is skipped."""
    world.create()
    world.wait_steady(TABLES)
    former = world.cluster.wait_for_leader()
    answer = world.cluster.owner_json("resign")
    assert answer["former"] == former
    assert answer["leader"]["id"] != former
    through = ("--endpoint", world.cluster.node(former).advertised)
    assert world.cluster.owner_json(*through, "status")["answered_by"] == answer["leader"]["id"]
    world.wait_steady(TABLES)
    row = world.cluster.owner_json("table", "list", "--table", "public.t2", *through)["tables"][0]
    target = next(capture for capture in world.cluster.captures().values() if capture != row["primary"])
    assert world.cluster.owner_json("table", "move", "2", "--to", target, "--wait", *through)["state"] == "done"
    world.cluster.kill(former)
    assert world.cluster.owner_json("status")["answered_by"] == answer["leader"]["id"]


@pytest.mark.parametrize("how", ["kill", "pause"])
def test_a_command_outlasts_the_loss_of_the_leader(world: CounterWorld, how: str) -> None:
    """Dead or hanging: while there is no leader, the CLI waits for the next one instead of failing."""
    world.create()
    world.wait_steady(TABLES)
    leader = world.cluster.wait_for_leader()
    getattr(world.cluster, how)(leader)
    shown = world.cluster.owner_json("changefeed", "query", "one", "--timeout-s", "30")
    assert shown["state"] == "normal"
    if how == "kill":
        assert "only owner" in refusal(world, "resign")


def test_without_etcd_the_reason_is_told(world: CounterWorld) -> None:
    """Neither a hang nor a stack trace."""
    world.cluster.etcd.kill()
    owners = [world.cluster.node(name) for name in world.cluster.owners]
    world.cluster.wait("no owner can be elected", lambda: not any(owner.ready() for owner in owners))
    status = world.cluster.owner_json("status")
    assert (status["leader"], status["changefeeds_by_state"]) == (None, {})
    assert status["problem"].startswith("etcd ")
    assert f"problem      {status['problem'][:20]}" in world.cluster.owner_cli("status").stdout
    with pytest.raises(CliError, match="and cannot be elected: etcd"):
        world.cluster.owner_json("changefeed", "pause", "one", "--timeout-s", "20")
