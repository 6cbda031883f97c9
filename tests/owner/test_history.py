"""The history of events in etcd is bounded, guarded and without secrets, and bulk placement is one event."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import msgspec
import pytest

from deploy.local.etcd import EtcdServer
from owner.core.events import JobChanged, PlacementReason, SpanMoved
from owner.events.cluster_events import record_captures, record_changefeeds
from owner.events.history import PENDING_MAX, History
from owner.events.placement_history import PlacementHistory
from tablewire.errors import ConflictError, EtcdError, NotLeaderError
from tablewire.etcd import keys as etcd_keys
from tablewire.etcd.records import ChangefeedState, EventRecord, encode
from tablewire.etcd.session import EtcdSession
from tablewire.etcd.values import Compare, EtcdUnavailableError, Put
from tablewire.model.ids import CaptureInfo, ChangefeedID
from tablewire.model.jobs import JobView
from tablewire.model.spans import Span
from tablewire.model.states import QueryKind, QueryState
from tests.owner.admin_world import feed

pytestmark = pytest.mark.integration

NewHistory = Callable[..., History]


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Writer:
    """A guarded write of a leader that may be gone, or whose answers may be lost after the write."""

    def __init__(self, session: EtcdSession) -> None:
        self.session = session
        self.leads = True
        self.answers = True
        self.writes = 0

    def __call__(self, puts: Sequence[Put], deletes: Sequence[str] = (), extra_compares: Sequence[Compare] = ()) -> int:
        if not self.leads:
            raise NotLeaderError("not the leader")
        self.writes += 1
        result = self.session.transact(extra_compares, puts, deletes)
        if not self.answers:
            raise EtcdUnavailableError("no answer")
        if not result.applied:
            raise ConflictError("lost a race")
        return result.revision


@pytest.fixture
def session(etcd_server: EtcdServer) -> Iterator[EtcdSession]:
    session = EtcdSession([etcd_server.endpoint])
    yield session
    session.close()


@pytest.fixture
def cluster(etcd_prefix: str) -> str:
    return etcd_prefix.strip("/").replace("/", "-")


@pytest.fixture
def writer(session: EtcdSession) -> Writer:
    return Writer(session)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def new_history(session: EtcdSession, cluster: str, writer: Writer) -> NewHistory:
    return lambda events_max=100: History(session, cluster, writer, "owner-1", 7, events_max)


def records(history: History) -> list[EventRecord]:
    return [event.record for event in history.events_after(0) or () if event.record is not None]


def kinds(history: History) -> list[str]:
    return [record.kind for record in records(history)]


def test_events_are_stored_in_etcd_and_the_next_leader_continues(new_history: NewHistory) -> None:
    """The next term reads what this one stored, and appends its own."""
    first = new_history()
    assert first.events_after(0) is None
    first.add("capture_joined", subject="a", text="registered")
    first.flush()
    second = new_history()
    second.add("owner_leads", subject="owner-2")
    second.flush()
    assert kinds(second) == ["capture_joined", "owner_leads"]
    assert [event.sequence for event in second.events_after(0) or ()] == [1, 2]
    assert (records(second)[0].owner, records(second)[0].owner_revision) == ("owner-1", 7)


def test_a_bounded_number_is_kept(new_history: NewHistory, session: EtcdSession, cluster: str, writer: Writer) -> None:
    """The oldest are deleted in the same write; a smaller limit is reached step by step."""
    history = new_history(50)
    for number in range(120):
        history.add("n", text=str(number))
    history.flush()
    assert [record.text for record in records(history)] == [str(number) for number in range(70, 120)]
    assert writer.writes == 4
    smaller = new_history(10)
    for number in range(3):
        smaller.add("m", text=str(number))
        smaller.flush()
    items, _ = session.get_prefix(etcd_keys.events_prefix(cluster))
    assert len(items) == len(records(smaller)) == 10


def test_a_lost_answer_duplicates_nothing(new_history: NewHistory, writer: Writer) -> None:
    """After a write with an unknown result, the history is read again first."""
    history = new_history()
    history.add("one")
    history.flush()
    history.add("two")
    writer.answers = False
    with pytest.raises(EtcdError):
        history.flush()
    writer.answers = True
    history.add("three")
    history.flush()
    assert kinds(history) == kinds(new_history_of(history)) == ["one", "two", "three"]


def new_history_of(history: History) -> History:
    """Another reader of the same keys."""
    other = History(history._session, history._cluster, history._write, "owner-2", 8, 100)
    other.flush()
    return other


def test_a_sequence_number_that_is_taken_is_not_overwritten(new_history: NewHistory, session: EtcdSession, cluster: str) -> None:
    """The write requires that its keys are absent, so our event comes behind the foreign one."""
    history = new_history()
    history.flush()
    foreign = EventRecord(at=feed().created_at, kind="foreign", owner="x")
    session.put(etcd_keys.event_key(cluster, 1), encode(foreign))
    history.add("ours")
    history.flush()
    assert kinds(history) == ["foreign", "ours"]


def test_a_deposed_leader_writes_nothing(new_history: NewHistory, writer: Writer) -> None:
    """The guard fails; a bounded number of events waits, and the loss of others is an event."""
    history = new_history()
    writer.leads = False
    for _ in range(PENDING_MAX + 5):
        history.add("n")
    with pytest.raises(NotLeaderError):
        history.flush()
    history.flush_last()
    writer.leads = True
    history.flush()
    assert records(history)[-1].kind == "events_dropped"
    assert records(history)[-1].text.startswith("5 events")


def test_no_secret_is_stored(new_history: NewHistory, session: EtcdSession, cluster: str) -> None:
    """Secrets in error texts are removed."""
    history = new_history()
    history.add(
        "changefeed_failed", text="postgresql://me:hunter2@h/db", why="password=hunter2 was wrong\nsecond line" + "x" * 900
    )
    history.flush()
    items, _ = session.get_prefix(etcd_keys.events_prefix(cluster))
    assert b"hunter2" not in items[0].value
    assert "\n" not in records(history)[0].why
    assert len(records(history)[0].why) == 500


def test_an_unreadable_event_is_skipped(new_history: NewHistory, session: EtcdSession, cluster: str) -> None:
    """It does not disturb, and is deleted when it is old."""
    session.put(etcd_keys.event_key(cluster, 3), b"{nonsense")
    history = new_history(10)
    history.add("one")
    history.flush()
    assert kinds(history) == ["one"]
    assert [event.sequence for event in history.events_after(0) or ()] == [3, 4]


def test_many_spans_are_one_event_when_it_is_over(new_history: NewHistory, clock: Clock) -> None:
    """The moves of a drain are counted while they continue; a move by hand is named."""
    history = new_history()
    placement = PlacementHistory(history, ChangefeedID("default", "one"), lambda: {7: "public.t7"}, clock)
    for number in range(100):
        placement.add(SpanMoved(Span(number), "a", "b", PlacementReason.DRAIN))
    placement.add_counts({"add": 1_000}, {}, 0)
    placement.flush()
    history.flush()
    assert kinds(history) == []
    clock.now += 3
    move = JobView(1, QueryKind.MOVE, "b", table_id=7, state=QueryState.DONE)
    placement.add(SpanMoved(Span(7), "a", "b", PlacementReason.MOVE))
    placement.add(JobChanged(move))
    placement.add(JobChanged(JobView(2, QueryKind.CANCEL, "a", state=QueryState.DONE)))  # the operator's request says it
    refused_move = replace(move, table_id=8, state=QueryState.REFUSED, reason="capture b is draining")
    placement.add(JobChanged(refused_move))
    placement.flush()
    history.flush()
    moved, refused, placed = records(history)
    assert (moved.subject, moved.text, moved.why) == ("public.t7", "from a to b", "move")
    assert (refused.subject, refused.text, refused.why) == ("8", "move to b: refused", "capture b is draining")
    assert (placed.text, placed.why) == ("1100 tables began to replicate", "add 1000, drain 100")


def test_captures_and_changefeeds_that_change_are_events(new_history: NewHistory) -> None:
    """Each change of state has its kind; many captures at once are one event."""
    history = new_history()
    a = {"a": CaptureInfo("a", "a:1")}
    record_captures(history, {}, a)
    record_captures(history, {"b": CaptureInfo("b", "b:1"), **a}, a, leaving={"a", "b"})
    record_captures(history, a, {f"c{number}": CaptureInfo(f"c{number}", "x:1") for number in range(9)})
    name = feed().changefeed
    life = [
        None,
        feed(asked_by="alice"),
        feed(state=ChangefeedState.STOPPED, asked_by="bob"),
        feed(epoch=2, asked_by="bob via owner-2"),
        feed(epoch=2, state=ChangefeedState.FAILED, error="slot lost", asked_by="bob"),
        feed(epoch=2, state=ChangefeedState.REMOVED, asked_by="carol"),
        None,
    ]
    created_at = feed().created_at
    stored = [{name: msgspec.structs.replace(info, created_at=created_at)} if info else {} for info in life]
    for before, after in itertools.pairwise(stored):
        record_changefeeds(history, before, after)
    history.flush()
    assert kinds(history) == [
        "capture_joined",
        "capture_gone",
        "capture_joined",
        "capture_gone",
        "changefeed_created",
        "changefeed_paused",
        "changefeed_resumed",
        "changefeed_failed",
        "changefeed_removing",
        "changefeed_removed",
    ]
    assert [record.why for record in records(history)[1:4:2]] == ["it was stopping", ""]
    assert records(history)[7].why == "slot lost"
    assert [record.by for record in records(history)[4:]] == ["alice", "bob", "bob via owner-2", "", "carol", ""]


def test_a_reader_waits_for_events(new_history: NewHistory) -> None:
    """The wait returns False when there are none."""
    history = new_history()
    history.flush()
    assert not history.wait_after(0, 0.01)
    history.add("one")
    history.flush()
    assert history.wait_after(0, 0.01)
    assert not history.wait_after(1, 0.01)
