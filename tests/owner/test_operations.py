"""The operations on a real scheduler: their answers, and that a refusal gives the reason and
changes nothing."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from owner.admin import cluster_operations, operations
from owner.admin.errors import AlreadyExistsError, InvalidRequestError, RefusedError, UnknownTableError
from owner.admin.jobs import FollowedJob, follow
from owner.admin.resolve import parse_changefeed
from owner.changefeed.store import ChangefeedEvent, ChangefeedRefusedError
from tablewire.errors import ConfigError, UnknownCaptureError, UnknownChangefeedError
from tablewire.etcd.records import ChangefeedState, LeaderRecord
from tablewire.model.spans import Span
from tablewire.source import CheckFailure
from tablewire.v1 import admin_pb2 as pb
from tests.owner.admin_world import CREATE, FEED, AdminView, feed, paused
from tests.owner.world import CHANGEFEED, World


@pytest.fixture
def view() -> AdminView:
    """Return an owner of three processors and three tables, all replicating."""
    view = AdminView()
    view.world.settle()
    return view


def create_request(**fields: object) -> pb.CreateChangefeedRequest:
    """Return CREATE with other values."""
    request = pb.CreateChangefeedRequest()
    request.CopyFrom(CREATE)
    for name in fields:
        request.ClearField(name)
    request.MergeFrom(pb.CreateChangefeedRequest(**fields))
    return request


def states(job: FollowedJob, view: AdminView, *, until_done: bool = True) -> list[str]:
    """Return each state that following the job shows, while the world is ticked."""
    rows = follow([job], until_done=until_done, timeout_s=30.0, is_wanted=lambda: bool(view.world.step()))
    return [state for state, _ in itertools.groupby(row.state for row in rows)]


def other_than(view: AdminView, table: int) -> str:
    return next(capture for capture in "abc" if capture != view.world.primary(table))


# ---------------------------------------------------------------------------------------------------------------------
# Moves


def test_a_move_by_name_ends_at_its_target(view: AdminView) -> None:
    """The table is named as in the source, and the job is followed to its end."""
    target = other_than(view, 2)
    job = operations.move_table(view, "", "public.t2", target)
    assert job.row().target == "public.t2"
    assert view.pokes.is_set()
    assert states(job, view)[-1] == "done"
    assert view.world.primary(2) == target


def test_a_move_by_id_is_followed_until_it_is_accepted(view: AdminView) -> None:
    """Without waiting for the end, following stops at the decision."""
    job = operations.move_table(view, FEED, "1", other_than(view, 1))
    assert states(job, view, until_done=False)[-1] == "accepted"


def test_scenario_31_a_move_to_where_it_is_is_refused_with_the_reason(view: AdminView) -> None:
    """A move that changes nothing is never accepted."""
    job = operations.move_table(view, "", "1", view.world.primary(1))
    assert states(job, view)[-1] == "refused"
    assert "already the primary" in job.row().reason


def test_a_pending_move_is_reported_as_pending_when_the_time_has_passed(view: AdminView) -> None:
    """A job that no tick has seen is neither accepted nor refused."""
    job = operations.move_table(view, "", "1", other_than(view, 1))
    rows = list(follow([job], until_done=False, timeout_s=0.05))
    assert [row.state for row in rows] == ["pending"]


def test_following_ends_when_the_scheduler_is_another_one(view: AdminView) -> None:
    """A restarted changefeed does not leave its callers waiting for a job that no longer exists."""
    job = operations.move_table(view, "", "1", other_than(view, 1))
    view.world.elect()
    with pytest.raises(RefusedError, match=r"move of public.t1: pending when changefeed default/test stopped running here"):
        list(follow([job], until_done=True, timeout_s=30.0))


@pytest.mark.parametrize(
    ("table", "target", "error", "text"),
    [
        ("public.t9", "b", UnknownTableError, r"no table 'public.t9' in changefeed default/test; there: public.t1"),
        ("t1", "b", UnknownTableError, "no table 't1'"),
        ("public.t1", "z", UnknownCaptureError, r"no processor 'z'; registered: a, b, c"),
    ],
)
def test_a_move_of_what_is_not_there_names_it(
    view: AdminView, table: str, target: str, error: type[Exception], text: str
) -> None:
    """One error names the unknown table or processor and those that exist; no job is created."""
    with pytest.raises(error, match=text):
        operations.move_table(view, "", table, target)
    assert not view.world.scheduler.queries()


def test_an_unknown_table_id_is_refused_by_the_scheduler(view: AdminView) -> None:
    """An id may be newer than the known names, so the scheduler decides."""
    job = operations.move_table(view, "", "77", "a")
    assert states(job, view)[-1] == "refused"
    assert "table 77 is unknown" in job.row().reason


def test_a_paused_changefeed_has_nothing_to_move(view: AdminView) -> None:
    """The refusal says that it is stopped."""
    view.store.infos[CHANGEFEED] = feed(state=ChangefeedState.STOPPED)
    with pytest.raises(RefusedError, match=r"default/test is stopped, so it has no tables now"):
        operations.move_table(view, "", "1", "a")


def test_rebalance_with_nothing_to_move_is_done(view: AdminView) -> None:
    """If the loads are even, it ends with the next tick."""
    (job,) = operations.rebalance(view, "")
    assert states(job, view)[-1] == "done"


# ---------------------------------------------------------------------------------------------------------------------
# Which changefeed


def test_the_only_changefeed_needs_no_name_and_two_do(view: AdminView) -> None:
    """The error names those that exist."""
    assert operations.query_changefeed(view, "").changefeed == FEED
    view.store.create(paused())
    with pytest.raises(InvalidRequestError, match=r"2 changefeeds, so name one; there: default/other, default/test"):
        operations.query_changefeed(view, "")
    view.store.infos.clear()
    with pytest.raises(UnknownChangefeedError, match="there is no changefeed"):
        operations.query_changefeed(view, "")


def test_one_that_is_being_removed_does_not_make_a_name_necessary(view: AdminView) -> None:
    """It counts only if there is no other."""
    view.store.create(feed("old", state=ChangefeedState.REMOVED))
    assert operations.query_changefeed(view, "").changefeed == FEED
    del view.store.infos[CHANGEFEED]
    assert operations.query_changefeed(view, "").changefeed == "default/old"


def test_an_unknown_changefeed_is_named_with_those_that_there_are(view: AdminView) -> None:
    """A long list is cut."""
    for number in range(30):
        view.store.create(paused(f"feed{number:02}"))
    with pytest.raises(UnknownChangefeedError, match=r"no changefeed default/nope; there: default/feed00, .* and 21 more"):
        operations.query_changefeed(view, "nope")


@pytest.mark.parametrize("name", ["A", "-a", "a b", "a" * 49, "", "x/", "../a/b", "ünder", "a\n", "/a"])
def test_a_changefeed_id_that_cannot_be_one_is_refused(name: str) -> None:
    """It becomes part of a key and of a slot's name."""
    with pytest.raises(InvalidRequestError, match=r"is not (a )?valid"):
        parse_changefeed(name)


def test_a_namespace_may_be_given() -> None:
    """Without one it is `default`."""
    assert str(parse_changefeed("team-a/orders_2")) == "team-a/orders_2"
    assert str(parse_changefeed("orders")) == "default/orders"


# ---------------------------------------------------------------------------------------------------------------------
# Changefeeds


def test_create_names_every_failed_check_and_stores_nothing(view: AdminView) -> None:
    """One error names them with passwords hidden, and the source is closed."""
    view.failures = [
        CheckFailure("wal_level", "wal_level is replica, not logical"),
        CheckFailure("sink_writable", "cannot connect to postgresql://me:hunter2@sink/db"),
    ]
    with pytest.raises(RefusedError, match=r"2 checks failed: wal_level: wal_level is replica.*; sink_writable: ") as caught:
        operations.create_changefeed(view, CREATE)
    assert "hunter2" not in str(caught.value)
    assert list(view.store.infos) == [CHANGEFEED]
    assert all(source.closed for source in view.sources)


def test_create_stores_what_was_written_and_hides_passwords(view: AdminView, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plug-in receives the secret, etcd receives what the operator wrote."""
    monkeypatch.setenv("SOURCE_PASSWORD", "s3cret")
    request = create_request(
        source_uri="postgresql://me:${SOURCE_PASSWORD}@source/db",
        sink_uri="postgresql://me:hunter2@sink/db",
        skip_snapshot=True,
        options={"publication": "p", "sink.batch_rows": "10", "sink.password": "hunter3"},
    )
    row = operations.create_changefeed(view, request)
    assert (row.changefeed, row.state, row.skip_snapshot, row.running) == ("default/new", "normal", True, False)
    assert row.source_uri == "postgresql://me:${SOURCE_PASSWORD}@source/db"
    assert "hunter" not in str(row)
    (asked,) = view.requests
    assert asked.source_uri == "postgresql://me:s3cret@source/db"
    assert not asked.initial_snapshot
    stored = view.store.get(parse_changefeed("new"))
    assert (stored.source_uri, stored.sink_uri) == (request.source_uri, request.sink_uri)
    assert stored.options == request.options


def test_create_with_an_unset_variable_names_it(view: AdminView, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source is not called."""
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(ConfigError, match="variable NOT_SET is not set"):
        operations.create_changefeed(view, create_request(source_uri="postgresql://a:${NOT_SET}@b/c"))
    assert not view.requests


def test_a_dry_run_checks_and_stores_nothing(view: AdminView) -> None:
    """All checks run."""
    operations.create_changefeed(view, create_request(dry_run=True))
    assert view.sources
    assert list(view.store.infos) == [CHANGEFEED]


def test_an_id_that_exists_is_refused_before_any_check(view: AdminView) -> None:
    """The source is not called."""
    with pytest.raises(AlreadyExistsError, match="default/test exists already; nothing was changed"):
        operations.create_changefeed(view, create_request(changefeed="test"))
    assert not view.requests


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"source_uri": "nonsense"}, "the source 'nonsense' is not a URI"),
        ({"sink_uri": ""}, "the sink '' is not a URI"),
        ({"sink_uri": "file:///" + "x" * 5000}, "longer than 4096"),
        ({"tables": ()}, "no tables"),
        ({"tables": ("public.*", " ")}, "is empty or has spaces"),
        ({"tables": ("a.b",) * 1001}, "at most 1000 table patterns"),
    ],
)
def test_a_create_that_cannot_be_right_is_refused_at_once(view: AdminView, fields: dict[str, object], text: str) -> None:
    """The error says what is wrong and where."""
    with pytest.raises(InvalidRequestError, match=text):
        operations.create_changefeed(view, create_request(**fields))
    assert not view.requests


def test_scenario_33_a_paused_changefeed_is_shown_as_stopped(view: AdminView) -> None:
    """A second pause is refused with the reason."""
    assert operations.pause_changefeed(view, "").state == "stopped"
    row = operations.query_changefeed(view, "")
    assert (row.state, row.running, row.retained_bytes) == ("stopped", False, 4096)
    with pytest.raises(ChangefeedRefusedError, match="cannot pause: it is paused already"):
        operations.pause_changefeed(view, "")
    assert operations.resume_changefeed(view, "").state == "normal"
    with pytest.raises(ChangefeedRefusedError, match="cannot resume: it is running already"):
        operations.resume_changefeed(view, "")


def test_a_removal_must_name_its_changefeed(view: AdminView) -> None:
    """This holds even if there is only one."""
    with pytest.raises(InvalidRequestError, match="must name its changefeed"):
        operations.remove_changefeed(view, "")
    assert operations.remove_changefeed(view, "test") == FEED
    assert operations.query_changefeed(view, "test").state == "removed"


def test_a_query_shows_the_progress_and_what_it_waits_for(view: AdminView) -> None:
    """It has watermark, lag, retained bytes, states and the slowest span."""
    view.world.advance(700)
    view.world.run(5)
    view.world.executors[other_than(view, 1)].hang("prepare", Span(1))
    operations.move_table(view, "", "1", other_than(view, 1))
    view.world.run(3)
    row = operations.query_changefeed(view, "")
    assert row.initialized
    assert row.running
    assert row.checkpoint_ts == view.world.watermark.checkpoint_ts > 0
    assert (row.lag, row.retained_bytes, row.spans) == (50, 4096, 3)
    assert row.spans_by_state == {"replicating": 2, "prepare": 1}
    assert row.stalls == {"preparing": 1}
    assert row.HasField("slowest")
    assert row.slowest.table.startswith("public.t")
    assert [(job.kind, job.state) for job in row.jobs] == [("move", "accepted")]


def test_before_bootstrap_every_span_waits_for_it() -> None:
    """An owner that knows no tables yet says so."""
    view = AdminView()
    view.world.settle()
    view.world.elect()
    row = operations.query_changefeed(view, "")
    assert (row.initialized, row.checkpoint_ts) == (False, view.world.watermark.checkpoint_ts)


# ---------------------------------------------------------------------------------------------------------------------
# Tables and captures


def test_tables_are_filtered_by_capture_table_and_stall(view: AdminView) -> None:
    """A row must match all filters."""

    def listed(**fields: object) -> list[int]:
        _, rows = operations.list_tables(view, pb.ListTablesRequest(**fields))
        return [row.table_id for row in rows]

    assert listed() == [1, 2, 3]
    assert listed(table="public.t2") == [2]
    assert listed(table="3") == [3]
    assert listed(stalled=True) == []
    held = [table for table in (1, 2, 3) if view.world.primary(table) == "a"]
    assert listed(capture="a") == held
    assert listed(capture="a", table=str(held[0])) == held[:1]
    with pytest.raises(UnknownCaptureError):
        listed(capture="z")
    target = other_than(view, 1)
    view.world.executors[target].hang("prepare", Span(1))
    operations.move_table(view, "", "1", target)
    view.world.run(3)
    assert listed(stalled=True) == [1]
    assert 1 in listed(capture=target)


def test_a_row_names_processors_and_reason(view: AdminView) -> None:
    """A table in a move shows both processors and its stall reason."""
    target = other_than(view, 1)
    view.world.executors[target].hang("prepare", Span(1))
    operations.move_table(view, "", "1", target)
    view.world.run(5)
    _, rows = operations.list_tables(view, pb.ListTablesRequest(table="1"))
    (row,) = rows
    assert (row.table, row.state, row.primary, row.secondary) == ("public.t1", "prepare", view.world.primary(1), target)
    assert row.stall_reason == "preparing"
    assert row.state_age_ms > 0


def test_scenario_32_lists_agree_with_each_other(view: AdminView) -> None:
    """Processors, tables and the query count the same spans."""
    held = {row.id: row.spans for row in cluster_operations.list_captures(view)}
    _, rows = operations.list_tables(view, pb.ListTablesRequest())
    primaries = [row.primary for row in rows]
    assert held == {capture: primaries.count(capture) for capture in "abc"}
    assert operations.query_changefeed(view, "").spans == len(primaries) == sum(held.values())


def test_captures_show_state_and_labels(view: AdminView) -> None:
    """A silent processor is shown as silent, and one without changefeeds as idle."""
    view.world.paused.add("b")
    view.world.run(60)
    rows = {row.id: row for row in cluster_operations.list_captures(view)}
    assert {name: row.state for name, row in rows.items()} == {"a": "ready", "b": "silent", "c": "ready"}
    assert rows["a"].labels == {"zone": "x"}
    view.store.apply(CHANGEFEED, ChangefeedEvent.PAUSE)
    assert {row.state for row in cluster_operations.list_captures(view)} == {"idle"}


def test_scenario_23_a_drain_counts_until_nothing_is_left(view: AdminView) -> None:
    """The count is never 0 before a tick has seen the drain; then it falls to 0, and the others
    have all tables."""
    progress = cluster_operations.drain(view, "a")
    assert progress.draining
    assert progress.remaining >= 1
    view.world.until(lambda: cluster_operations.drain_progress(view, "a").remaining == 0, what="drained")
    assert "a" not in {view.world.primary(table) for table in (1, 2, 3)}
    cancelled = cluster_operations.cancel_drain(view, "a")
    assert not cancelled.draining


def test_scenario_22_a_drain_may_be_asked_for_again_and_cancelled_once(view: AdminView) -> None:
    """Repeating it returns the progress; cancelling what does not exist is refused."""
    cluster_operations.drain(view, "a")
    cluster_operations.drain(view, "a")
    assert view.drains == ["a"]
    cluster_operations.cancel_drain(view, "a")
    with pytest.raises(RefusedError, match="processor a is not being drained"):
        cluster_operations.cancel_drain(view, "a")
    with pytest.raises(UnknownCaptureError, match="no processor 'z'"):
        cluster_operations.drain(view, "z")


def test_a_drain_that_cannot_continue_says_why(view: AdminView) -> None:
    """What is left is counted by stall reason."""
    held = next(table for table in (1, 2, 3) if view.world.primary(table) == "a")
    for capture in "bc":
        view.world.executors[capture].hang("prepare", Span(held))
    cluster_operations.drain(view, "a")
    view.world.run(10)
    progress = cluster_operations.drain_progress(view, "a")
    assert progress.reasons == {"preparing": 1}
    assert progress.remaining == 1


def test_a_drained_capture_that_left_is_gone(view: AdminView) -> None:
    """A client that waits for a drain sees its end."""
    cluster_operations.drain(view, "a")
    view.world.die("a")
    assert cluster_operations.drain_progress(view, "a").gone


# ---------------------------------------------------------------------------------------------------------------------
# The cluster


def test_status_counts_what_there_is(view: AdminView) -> None:
    """It has the leader, the owners, and processors and changefeeds by state."""
    view.records.append(LeaderRecord(id="owner-2", address="127.0.0.1:2"))
    view.store.create(paused())
    status = cluster_operations.cluster_status(view)
    assert status.HasField("leader")
    assert (status.leader.id, status.leader.leading, status.leader_revision) == ("owner-1", True, 7)
    assert [(owner.id, owner.leading) for owner in status.owners] == [("owner-1", True), ("owner-2", False)]
    assert status.captures_by_state == {"ready": 3}
    assert status.changefeeds_by_state == {"normal": 1, "stopped": 1}


def test_status_of_a_follower_without_a_leader_says_so(view: AdminView) -> None:
    """It counts the processors as unknown."""
    view.leads, view.records = False, []
    status = cluster_operations.cluster_status(view)
    assert (status.HasField("leader"), status.leader_revision) == (False, 0)
    assert status.captures_by_state == {"unknown": 3}


def test_the_only_owner_does_not_resign(view: AdminView) -> None:
    """No other owner could lead, so nothing changes."""
    with pytest.raises(RefusedError, match="only owner"):
        cluster_operations.resign(view)
    assert view.leads
    view.records.append(LeaderRecord(id="owner-2", address="127.0.0.1:2"))
    assert cluster_operations.resign(view) == "owner-1"
    assert not view.leads
    with pytest.raises(RefusedError, match="does not lead"):
        cluster_operations.resign(view)


def test_a_world_without_tables_has_empty_lists() -> None:
    """Nothing divides by zero."""
    view = AdminView(World(tables=()))
    view.world.run(3)
    row = operations.query_changefeed(view, "")
    assert (row.spans, row.HasField("slowest"), row.stalls) == (0, False, {})


def test_a_resume_shows_what_was_stored_before_the_leader_has_looked(view: AdminView) -> None:
    """The leader last saw the pause; only a warning is known to the leader alone."""
    seen = view.runtime(CHANGEFEED)
    assert seen is not None
    view.runtime = lambda _changefeed: dataclasses.replace(seen, state="stopped")  # type: ignore[method-assign]
    assert operations.query_changefeed(view, "").state == "normal"
    view.runtime = lambda _changefeed: dataclasses.replace(seen, state="warning", error="x")  # type: ignore[method-assign]
    row = operations.query_changefeed(view, "")
    assert (row.state, row.error) == ("warning", "x")
