"""Both services as real processes with a real etcd: what an operator does to a changefeed, without any failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.local.cluster import CliError
from tests.plugins.counter_world import WAIT_S, CounterWorld, NewWorld, now_ms

pytestmark = pytest.mark.integration


def test_a_move_has_no_gap_and_no_second_writer(new_world: NewWorld) -> None:
    """The target continues where the former writer stopped, under a newer epoch, at once."""
    world = new_world(processors=2)
    world.create()
    world.wait_steady(6)
    before = world.primaries()[1]
    target = next(capture for capture in world.cluster.captures().values() if capture != before)
    world.cluster.owner_json("table", "move", "public.t1", "--to", target, "--wait")
    assert world.primaries()[1] == target
    world.wait_written(1)
    world.audit(*range(1, 7))
    assert {write.capture for write in world.writes(1)} == {before, target}
    assert world.longest_gap_ms(1) < 2_500


def test_tables_that_come_and_go_are_noticed(new_world: NewWorld) -> None:
    """A new table is replicated and a dropped one is stopped, while the others go on."""
    world = new_world()
    world.create(tables=["public.*"])
    world.wait_steady(6)
    world.set_tables(*(f"public.t{number}" for number in range(1, 9)))
    world.wait_steady(8)
    world.wait_written(7, 8)
    world.set_tables(*(f"public.t{number}" for number in range(1, 6)))
    world.cluster.wait("only five are left", lambda: sorted(world.primaries()) == [1, 2, 3, 4, 5], WAIT_S)
    world.wait_written(1, 2, 3, 4, 5)
    world.audit(*range(1, 9))


def test_a_changefeed_without_tables_moves_on_and_takes_the_first_one(new_world: NewWorld) -> None:
    """With no table the checkpoint follows the source, and a table that appears starts there, not at the end of time."""
    world = new_world()
    world.create()
    world.wait_steady(6)
    world.set_tables("other.t")
    world.cluster.wait("no table is left", lambda: not world.primaries(), WAIT_S)
    reached = world.cluster.admin.changefeed("one")["checkpoint_ts"]
    world.cluster.wait_checkpoint(reached + 1_000, "one", WAIT_S)
    assert world.cluster.admin.changefeed("one")["checkpoint_ts"] <= now_ms()
    world.set_tables("other.t", "public.late")
    world.wait_steady(1)
    world.wait_written(2)
    assert world.cluster.admin.changefeed("one")["checkpoint_ts"] <= now_ms()


def test_pause_stops_resume_goes_on_and_remove_leaves_nothing(new_world: NewWorld) -> None:
    """Each does what it says to its own changefeed, and nothing to the other one."""
    world = new_world(processors=2)
    other = world.folder / "other"
    other.mkdir()
    world.create()
    world.create("two", sink=other)
    world.wait_steady(6)
    world.wait_steady(6, "two")
    epoch = world.cluster.admin.changefeed("one")["epoch"]

    world.cluster.owner_json("changefeed", "pause", "one")
    world.cluster.wait(
        "the agents are closed", lambda: all("agent_closed" in world.log(node) for node in ("processor0", "processor1"))
    )
    paused = world.cluster.admin.changefeed("one")
    assert (paused["state"], paused["running"]) == ("stopped", False)
    last = {table: world.writes(table)[-1] for table in range(1, 7)}
    world.cluster.wait("the other one goes on", lambda: world.writes(1, other)[-1].at_ms > last[1].at_ms + 500, WAIT_S)
    assert {table: world.writes(table)[-1] for table in range(1, 7)} == last
    with pytest.raises(CliError, match="paused already"):
        world.cluster.owner_json("changefeed", "pause", "one")

    world.cluster.owner_json("changefeed", "resume", "one")
    world.wait_steady(6)
    world.wait_written(*range(1, 7))
    resumed = world.cluster.admin.changefeed("one")
    assert resumed["state"] == "normal"
    assert resumed["epoch"] > epoch
    assert resumed["checkpoint_ts"] >= paused["checkpoint_ts"]
    world.audit(*range(1, 7))

    assert (world.source / "slot-one").exists()
    world.cluster.owner_json("changefeed", "remove", "one")
    world.cluster.wait(
        "it is forgotten", lambda: [row["changefeed"] for row in world.cluster.admin.changefeeds()] == ["default/two"]
    )
    assert not (world.source / "slot-one").exists()
    assert (world.source / "slot-two").exists()
    since = now_ms()
    world.cluster.wait("the other one goes on", lambda: world.writes(1, other)[-1].at_ms > since, WAIT_S)


def test_changefeeds_are_placed_with_a_view_of_each_other(new_world: NewWorld) -> None:
    """Three tables each on two processors: two and one, then one and two, so that the cluster is even."""
    world = new_world(processors=2)
    other = world.folder / "other"
    other.mkdir()
    world.set_tables("public.a", "public.b", "public.c")
    world.create()
    world.wait_steady(3)
    world.create("two", sink=other)
    world.wait_steady(3, "two")
    held = [*world.primaries().values(), *world.primaries("two").values()]
    assert sorted(held.count(capture) for capture in world.cluster.captures().values()) == [3, 3]


def test_a_changefeed_that_was_removed_can_be_created_again(new_world: NewWorld) -> None:
    """The new one starts above all epochs of the former, so that its sink lets it write."""
    world = new_world()
    world.create()
    world.wait_steady(6)
    world.cluster.owner_json("changefeed", "remove", "one")
    world.cluster.wait("it is forgotten", lambda: not world.cluster.admin.changefeeds())
    world.create()
    world.wait_steady(6)
    world.wait_written(*range(1, 7))
    world.audit(*range(1, 7), recreated=True)


def test_a_broken_source_is_a_warning_of_its_changefeed_alone(new_world: NewWorld, tmp_path: Path) -> None:
    """The error is shown and retried; the other changefeed continues; a removal says what it could not drop."""
    world = new_world()
    good = CounterWorld.__new__(CounterWorld)
    good.__dict__.update(world.__dict__)
    good.source, good.sink = tmp_path / "good-source", tmp_path / "good-sink"
    good.source.mkdir()
    good.sink.mkdir()
    good.set_tables("public.a")
    world.create()
    good.create("good")
    world.wait_steady(6)
    good.wait_steady(1, "good")
    (world.source / "broken").write_text("the disk is on fire")
    world.cluster.wait("a warning", lambda: world.cluster.admin.changefeed("one")["state"] == "warning", WAIT_S)
    assert world.cluster.admin.changefeed("one")["error"] == "the disk is on fire"
    assert world.cluster.admin.changefeed("good")["state"] == "normal"
    good.wait_written(1)
    (world.source / "broken").unlink()
    world.cluster.wait("it recovers", lambda: world.cluster.admin.changefeed("one")["state"] == "normal", WAIT_S)
    assert not world.cluster.admin.changefeed("one")["error"]

    (world.source / "broken").write_text("slot is busy")
    world.cluster.owner_json("changefeed", "remove", "one")
    world.cluster.wait("it says why not", lambda: world.cluster.admin.changefeed("one")["error"] == "slot is busy", WAIT_S)
    assert world.cluster.admin.changefeed("one")["state"] == "removed"
    (world.source / "broken").unlink()
    world.cluster.wait("it is gone", lambda: len(world.cluster.admin.changefeeds()) == 1, WAIT_S)


def test_a_broken_table_is_shown_and_the_others_go_on(new_world: NewWorld) -> None:
    """A span's error is the span's: it alone is retried, the changefeed shows a warning, and recovers by itself."""
    world = new_world(processors=2)
    world.create()
    world.wait_steady(6)
    (world.source / "broken-3").write_text("no such column")
    world.cluster.wait("a warning", lambda: world.cluster.admin.changefeed("one")["state"] == "warning", WAIT_S)
    assert "no such column" in world.cluster.admin.changefeed("one")["error"]
    world.wait_written(1, 2, 4, 5, 6)
    (world.source / "broken-3").unlink()
    world.wait_steady(6)
    world.wait_written(3)
    world.cluster.wait("it recovers", lambda: world.cluster.admin.changefeed("one")["state"] == "normal", WAIT_S)
    world.audit(*range(1, 7))


def test_bad_requests_change_nothing(new_world: NewWorld) -> None:
    """An id that exists, no plug-in, checks that fail, an unknown table or capture: one clear text each, and nothing stored."""
    world = new_world()
    world.create()
    world.wait_steady(6)
    before = world.cluster.admin.changefeeds()
    for arguments, text in (
        (
            ("changefeed", "create", "--id", "one", "--source", "counter:///x", "--sink", "file:///y", "--tables", "*"),
            "exists already",
        ),
        (("changefeed", "create", "--id", "no", "--source", "nothing://x", "--sink", "file:///y", "--tables", "*"), "no plug-in"),
        (
            ("changefeed", "create", "--id", "no", "--source", "counter:///x", "--sink", "file:///y", "--tables", "*"),
            "source_reachable",
        ),
        (("table", "move", "public.none", "--to", "nobody"), "none"),
        (("table", "move", "public.t1", "--to", "nobody"), "nobody"),
        (("changefeed", "pause", "none"), "none"),
    ):
        with pytest.raises(CliError, match=text):
            world.cluster.owner_json(*arguments)
    assert [row["changefeed"] for row in world.cluster.admin.changefeeds()] == [row["changefeed"] for row in before]
    world.wait_written(*range(1, 7))
