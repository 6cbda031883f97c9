"""Dry runs of the admin API: the moves, the loads before and after, and no effect. Also drains,
which report the remaining tables and the reasons."""

from __future__ import annotations

from collections import Counter

import pytest

from owner.admin import cluster_operations, operations
from owner.admin import plans as planning
from owner.admin.errors import RefusedError, UnknownTableError
from owner.admin.jobs import follow
from owner.changefeed.store import ChangefeedEvent
from owner.core.scheduler_config import SchedulerConfig
from owner.scheduling.scheduler import SchedulerAndInfo
from tablewire.errors import UnknownCaptureError, UnknownChangefeedError
from tablewire.etcd.records import ChangefeedState
from tablewire.model.ids import ChangefeedID
from tablewire.v1 import admin_pb2 as pb
from tests.owner.admin_world import FEED, AdminView, feed
from tests.owner.world import CHANGEFEED, World

OTHER = ChangefeedID("default", "other")


class TwoFeeds(AdminView):
    """Two changefeeds with six tables each, all on capture a, after b has joined."""

    def __init__(self) -> None:
        super().__init__(World(captures=("a",), tables=range(1, 7)))
        self.second = World(captures=("a",), tables=range(1, 7))
        self.store.create(feed("other"))
        for world in (self.world, self.second):
            world.settle()
            world.join("b")
            world.run(5)

    def scheduler(self, changefeed: ChangefeedID) -> SchedulerAndInfo | None:
        if changefeed == OTHER and self.store.infos[OTHER].state.runs:
            return self.second.scheduler
        return super().scheduler(changefeed)


@pytest.fixture
def view() -> AdminView:
    """Return three tables on three captures: there is nothing to balance."""
    view = AdminView()
    view.world.settle()
    return view


@pytest.fixture
def uneven() -> AdminView:
    """Return nine tables on capture a, while b and c have none."""
    view = AdminView(World(captures=("a",), tables=range(1, 10)))
    view.world.settle()
    view.world.join("b")
    view.world.join("c")
    view.world.run(5)
    return view


def targets(plan: pb.Plan) -> Counter[str]:
    return Counter(move.target for move in plan.moves)


def places(view: AdminView) -> dict[int, str]:
    return {table: view.world.primary(table) for table in view.world.tables}


# ---------------------------------------------------------------------------------------------------------------------
# Rebalance


def test_a_plan_lists_moves_and_loads_and_changes_nothing(uneven: AdminView) -> None:
    """Each has its name, source, target, weight and reason; a rebalance then makes exactly these
    moves."""
    before = places(uneven)
    plan = planning.plan_rebalance(uneven, "")
    assert plan.changefeeds == [FEED]
    assert (plan.load_before, plan.load_after) == ({"a": 9, "b": 0, "c": 0}, {"a": 3, "b": 3, "c": 3})
    assert targets(plan) == {"b": 3, "c": 3}
    assert {move.source for move in plan.moves} == {"a"}
    first = plan.moves[0]
    assert (first.changefeed, first.table, first.weight) == (FEED, f"public.t{first.table_id}", 1.0)
    assert "has more load than" in first.reason
    uneven.world.run(5)
    assert places(uneven) == before
    assert not uneven.world.scheduler.queries()
    (job,) = operations.rebalance(uneven, "")
    rows = list(follow([job], until_done=True, timeout_s=30, is_wanted=lambda: bool(uneven.world.step())))
    assert rows[-1].state == "done"
    assert Counter(places(uneven).values()) == {"a": 3, "b": 3, "c": 3}


def test_a_plan_without_moves_gives_the_reason(view: AdminView) -> None:
    """A small difference is ignored, and a single capture has no other to share with."""
    plan = planning.plan_rebalance(view, "")
    assert not plan.moves
    assert "up to 5 % from the mean" in plan.note
    alone = AdminView(World(captures=("a",), tables=(1, 2)))
    alone.world.settle()
    assert "1 processor can take tables" in planning.plan_rebalance(alone, "").note


def test_scenario_26_a_rebalance_covers_all_changefeeds() -> None:
    """The plan balances the sum, so that changefeeds do not each move half of the same difference."""
    view = TwoFeeds()
    plan = planning.plan_rebalance(view, "")
    assert plan.changefeeds == [str(OTHER), FEED]
    assert (plan.load_before, plan.load_after) == ({"a": 12, "b": 0}, {"a": 6, "b": 6})
    assert len(plan.moves) == 6
    jobs = operations.rebalance(view, "")
    assert [job.row().changefeed for job in jobs] == [str(OTHER), FEED]
    only = planning.plan_rebalance(view, "other")
    assert (only.changefeeds, {move.changefeed for move in only.moves}) == ([str(OTHER)], {str(OTHER)})


def test_several_jobs_are_followed_together() -> None:
    """Following ends when the last job has ended."""
    view = TwoFeeds()

    def step() -> bool:
        return bool(view.world.step()) and bool(view.second.step())

    rows = list(follow(operations.rebalance(view, ""), until_done=True, timeout_s=30, is_wanted=step))
    assert {row.changefeed: row.state for row in rows} == {FEED: "done", str(OTHER): "done"}


def test_a_stopped_changefeed_is_skipped_or_refused() -> None:
    """A changefeed that does not run is skipped, or refused if it was named."""
    view = TwoFeeds()
    view.store.apply(OTHER, ChangefeedEvent.PAUSE)
    assert planning.plan_rebalance(view, "").changefeeds == [FEED]
    with pytest.raises(RefusedError, match="default/other is stopped"):
        planning.plan_rebalance(view, "other")
    view.store.apply(CHANGEFEED, ChangefeedEvent.PAUSE)
    with pytest.raises(RefusedError, match="none of the 2 changefeeds runs"):
        operations.rebalance(view, "")
    view.store.infos.clear()
    with pytest.raises(UnknownChangefeedError):
        planning.plan_rebalance(view, "")


def test_no_plan_during_bootstrap(view: AdminView) -> None:
    """No plan is made from an incomplete view."""
    view.world.elect()
    with pytest.raises(RefusedError, match="default/test cannot be planned yet"):
        planning.plan_rebalance(view, "")


# ---------------------------------------------------------------------------------------------------------------------
# Drains and moves


def test_a_drain_is_planned_over_all_changefeeds() -> None:
    """Every table of the capture gets a target, and the capture ends empty."""
    plan = planning.plan_drain(TwoFeeds(), "a")
    assert (plan.load_after, len(plan.moves), plan.note) == ({"a": 0, "b": 12}, 12, "")
    assert {move.source for move in plan.moves} == {"a"}


def test_a_drain_without_a_target_has_an_empty_plan() -> None:
    """The note says what is missing."""
    alone = AdminView(World(captures=("a",), tables=(1, 2)))
    alone.world.settle()
    plan = planning.plan_drain(alone, "a")
    assert (plan.moves, plan.load_before) == ([], plan.load_after)
    assert "no other processor can take tables" in plan.note
    with pytest.raises(UnknownCaptureError):
        planning.plan_drain(alone, "z")


def test_a_move_is_planned_or_refused_as_the_scheduler_would(view: AdminView) -> None:
    """The reasons are the same."""
    source = view.world.primary(1)
    target, third = (capture for capture in "abc" if capture != source)
    plan = planning.plan_move(view, "", "public.t1", target)
    (move,) = plan.moves
    assert (move.source, move.target, move.reason) == (source, target, "asked for")
    assert (plan.load_before[target], plan.load_after[target]) == (1, 2)
    with pytest.raises(RefusedError, match=f"processor {source} is already the primary"):
        planning.plan_move(view, "", "1", source)
    with pytest.raises(UnknownTableError):
        planning.plan_move(view, "", "77", target)
    cluster_operations.drain(view, third)
    view.world.run(2)
    with pytest.raises(RefusedError, match=f"processor {third} is being drained"):
        planning.plan_move(view, "", "1", third)
    view.world.paused.add(target)
    view.world.run(40)
    with pytest.raises(RefusedError, match=f"processor {target} is silent"):
        planning.plan_move(view, "", "1", target)


def test_a_drain_without_a_target_is_accepted() -> None:
    """The drain remains in force, and continues when a capture joins."""
    view = AdminView(World(captures=("a",), tables=(1, 2)))
    view.world.settle()
    assert cluster_operations.drain(view, "a").draining
    view.world.run(3)
    progress = cluster_operations.drain_progress(view, "a")
    assert (progress.remaining, progress.reasons) == (2, {"no_capture": 2})
    assert "start a processor, or cancel the drain" in progress.note
    (row,) = cluster_operations.list_captures(view)
    assert (row.draining, row.remaining, row.reasons) == (True, 2, {"no_capture": 2})
    view.world.join("b")
    view.world.until(lambda: cluster_operations.drain_progress(view, "a").remaining == 0, what="drained")
    assert cluster_operations.drain_progress(view, "a").note == ""


def test_a_drain_counts_preparing_and_waiting_tables(uneven: AdminView) -> None:
    """Both are counted separately."""
    uneven.world.config = SchedulerConfig(max_task_concurrency=2)
    uneven.world.elect()
    uneven.world.settle()
    for capture in "bc":
        uneven.world.executors[capture].hang("prepare")
    cluster_operations.drain(uneven, "a")
    uneven.world.run(5)
    progress = cluster_operations.drain_progress(uneven, "a")
    assert (progress.remaining, progress.reasons, progress.note) == (9, {"preparing": 2, "concurrency": 7}, "")


def test_scenario_23_a_changefeed_without_a_schedule_blocks_the_end_of_a_drain(view: AdminView) -> None:
    """Its tables run on the captures although the new leader does not know them yet, so the capture
    is not safe to stop."""
    view.store.create(feed("other", start_ts=100))
    cluster_operations.drain(view, "a")
    view.world.until(lambda: view.world.scheduler.drain_capture("a") == 0, what="drained")
    progress = cluster_operations.drain_progress(view, "a")
    assert (progress.remaining, progress.reasons) == (1, {"bootstrap": 1})
    assert "default/other is not scheduled yet" in progress.note
    view.store.infos[OTHER] = feed("other", start_ts=100, state=ChangefeedState.STOPPED)
    assert cluster_operations.drain_progress(view, "a").remaining == 0


def test_status_lists_guarded_changefeeds() -> None:
    """They are listed while the guard is active."""
    view = AdminView(World(captures="abcd", tables=range(1, 9)))
    view.world.settle()
    assert cluster_operations.cluster_status(view).braked == []
    for capture in "abc":
        view.world.die(capture)
    view.world.run(2)
    assert cluster_operations.cluster_status(view).braked == [FEED]
