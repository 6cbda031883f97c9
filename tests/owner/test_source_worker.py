"""The worker of a changefeed with a scripted source: it starts once, retries, and never passes the
stored checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec
import pytest

from deploy.local.process import wait_until
from owner.changefeed.source_worker import ChangefeedWorker, Duty
from owner.owner_config import SourceSection
from tablewire.errors import ChangesLostError, NotLeaderError, OperatingError
from tablewire.etcd import records as registry
from tablewire.etcd.records import ChangefeedInfo
from tablewire.model.columns import I64
from tablewire.model.ids import ChangefeedID
from tablewire.model.spans import Span, SpanBlock
from tablewire.source import CheckFailure

WAIT_S = 10.0
CONFIG = SourceSection(poll_interval_ms=50, idle_poll_interval_ms=100, retry_min_ms=10, retry_max_ms=20)


class ScriptedSource:
    """A source whose results and errors the test sets, and which records its calls. Any thread."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {2: "public.b", 1: "public.a"}
        self.start_ts = 100
        self.error: Exception | None = None
        self.listing_error: Exception | None = None
        self.advanced: list[int] = []
        self.calls: list[str] = []
        self.inside = 0
        self.hold = threading.Event()
        self.hold.set()

    def check(self) -> Sequence[CheckFailure]:
        return []

    def start(self) -> int:
        self._call("start")
        return self.start_ts

    def tables(self) -> Mapping[int, str]:
        self._call("tables")
        if self.listing_error is not None:
            raise self.listing_error
        return dict(self.names)

    def current_ts(self) -> int:
        return 500

    def advance(self, checkpoint_ts: int) -> None:
        self.advanced.append(checkpoint_ts)

    def retained_bytes(self) -> int:
        self._call("retained_bytes")
        return 77

    def drop(self) -> None:
        self._call("drop")

    def close(self) -> None:
        self.calls.append("close")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        self.inside += 1
        assert self.inside == 1, "two threads call one source"
        self.hold.wait(WAIT_S)
        self.inside -= 1
        if self.error is not None:
            raise self.error


class Host:
    """The source and the records of a worker."""

    def __init__(self, source: ScriptedSource) -> None:
        self.source = source
        self.made: list[ChangefeedInfo] = []
        self.starts: list[int] = []
        self.drops = 0
        self.refusal: Exception | None = None

    def new_source(self, info: ChangefeedInfo) -> ScriptedSource:
        self.made.append(info)
        return self.source

    def set_start(self, changefeed: ChangefeedID, epoch: int, start_ts: int) -> ChangefeedInfo:
        if self.refusal is not None:
            raise self.refusal
        self.starts.append(start_ts)
        return msgspec.structs.replace(self.made[-1], start_ts=start_ts)

    def forget(self, changefeed: ChangefeedID, epoch: int) -> None:
        self.drops += 1


INFO = ChangefeedInfo(id="cf", source_uri="x://", sink_uri="y://", tables=["*"], created_at=registry.now(), epoch=3)

NewWorker = Callable[..., ChangefeedWorker]


@pytest.fixture
def source() -> ScriptedSource:
    return ScriptedSource()


@pytest.fixture
def host(source: ScriptedSource) -> Host:
    return Host(source)


@pytest.fixture
def new_worker(host: Host) -> Iterator[NewWorker]:
    workers: list[ChangefeedWorker] = []

    def start(info: ChangefeedInfo = INFO, duty: Duty = Duty.RUN, **options: object) -> ChangefeedWorker:
        worker = ChangefeedWorker(
            info,
            duty,
            CONFIG,
            host,
            new_source=host.new_source,
            on_change=lambda: None,
            **options,  # type: ignore[arg-type]
        )
        workers.append(worker)
        worker.start()
        return worker

    yield start
    for worker in workers:
        worker.stop()
    host.source.hold.set()
    assert all(worker.join(WAIT_S) for worker in workers)


def _wait(what: str, condition: Callable[[], object]) -> None:
    wait_until(what, lambda: bool(condition()), WAIT_S)


def test_the_first_start_is_stored_before_anything_runs(new_worker: NewWorker, host: Host) -> None:
    """The start is stored once; tables are sorted; nothing is advanced before a checkpoint is
    stored."""
    worker = new_worker()
    _wait("it is polled", lambda: worker.view.retained_bytes == 77)
    assert host.starts == [100]
    assert worker.view.start_ts == 100
    assert worker.view.table_ids is not None
    assert worker.view.table_ids.tolist() == [1, 2]
    assert (worker.view.source_ts, worker.view.error, worker.view.fatal) == (500, "", "")
    assert host.source.advanced == []
    worker.stored_checkpoint_ts = 250
    _wait("the safepoint follows what is stored", lambda: host.source.advanced[-1:] == [250])


def test_the_table_ids_stay_the_same_object_until_they_change(new_worker: NewWorker, source: ScriptedSource) -> None:
    """A tick detects at no cost that nothing has changed."""
    worker = new_worker()
    _wait("it is polled", lambda: worker.view.retained_bytes == 77)
    first = worker.view.table_ids
    polls = source.calls.count("tables")
    _wait("two more polls", lambda: source.calls.count("tables") >= polls + 2)
    assert worker.view.table_ids is first
    source.names[3] = "public.c"
    _wait("the new table", lambda: worker.view.table_ids is not None and len(worker.view.table_ids) == 3)


def test_a_quiet_source_is_listed_at_each_poll_and_its_slot_checked_rarely(new_worker: NewWorker, source: ScriptedSource) -> None:
    """New tables are noticed as before; the slot is advanced again as soon as the checkpoint moves."""
    worker = new_worker(stored_checkpoint_ts=400)
    _wait("it is polled", lambda: len(source.advanced) > 3)
    worker.stored_checkpoint_ts = 500  # the position of the source
    _wait("the slot follows", lambda: source.advanced[-1:] == [500])
    advances, listings = len(source.advanced), source.calls.count("tables")
    _wait("ten more polls", lambda: source.calls.count("tables") >= listings + 10)
    assert len(source.advanced) - advances <= 3
    worker.stored_checkpoint_ts = 501
    _wait("the slot follows at once", lambda: source.advanced[-1:] == [501])


def test_slot_advances_although_tables_cannot_be_listed(new_worker: NewWorker, source: ScriptedSource) -> None:
    """The error is shown, the slot follows the checkpoint, and what the source retains is measured."""
    source.listing_error = OperatingError("no listing")
    worker = new_worker(msgspec.structs.replace(INFO, start_ts=100), stored_checkpoint_ts=250)
    _wait("the error", lambda: worker.view.error == "no listing")
    _wait("the slot follows", lambda: source.advanced[-1:] == [250])
    assert worker.view.retained_bytes == 77
    worker.stored_checkpoint_ts = 300
    _wait("the slot follows again", lambda: source.advanced[-1:] == [300])
    source.listing_error = None
    _wait("it is listed", lambda: worker.view.table_ids is not None and not worker.view.error)


def test_changes_that_are_lost_are_fatal(new_worker: NewWorker, source: ScriptedSource) -> None:
    """The changefeed fails at once, without a retry."""
    source.error = ChangesLostError("the slot is gone")
    worker = new_worker()
    _wait("it is fatal", lambda: worker.view.fatal == "the slot is gone")
    assert worker.join(WAIT_S)
    assert source.calls.count("start") == 1


def test_an_error_is_shown_and_retried_with_a_new_source(new_worker: NewWorker, host: Host, source: ScriptedSource) -> None:
    """The known tables stay known, and the retry uses the stored start."""
    worker = new_worker()
    _wait("it is polled", lambda: worker.view.retained_bytes == 77)
    source.error = OperatingError("cannot reach postgresql://u:secret@h/db")
    _wait("the error", lambda: worker.view.error)
    assert worker.view.error == "cannot reach postgresql://u:***@h/db"
    assert worker.view.table_ids is not None
    source.error = None
    _wait("it recovers", lambda: not worker.view.error)
    assert host.starts == [100]
    assert host.made[-1].start_ts == 100
    assert not worker.view.fatal


def test_pauses_double_up_to_a_limit_and_never_agree(host: Host) -> None:
    """Many changefeeds of a source that was unavailable do not retry at the same moment."""
    config = SourceSection(retry_min_ms=100, retry_max_ms=1_000)
    workers = [
        ChangefeedWorker(INFO, Duty.RUN, config, host, new_source=host.new_source, on_change=lambda: None) for _ in range(50)
    ]
    waits = [[worker._backoff.next_s() for worker in workers] for _ in range(40)]
    for failures, found in enumerate(waits):
        longest = min(1.0, 0.1 * 2**failures)
        assert all(longest / 2 <= wait <= longest for wait in found)
        assert len(set(found)) > 40


def test_an_error_of_any_kind_is_the_changefeeds_alone(new_worker: NewWorker, source: ScriptedSource) -> None:
    """A plug-in may raise anything."""
    source.error = ZeroDivisionError("oops")
    worker = new_worker()
    _wait("the error", lambda: worker.view.error == "ZeroDivisionError: oops")
    assert worker.alive


def test_a_slot_that_was_lost_is_fatal(new_worker: NewWorker, source: ScriptedSource) -> None:
    """The rows between the checkpoint and the start of the slot are lost, and the changefeed fails
    instead of skipping them."""
    source.start_ts = 400
    worker = new_worker(msgspec.structs.replace(INFO, start_ts=100), stored_checkpoint_ts=250)
    _wait("it is fatal", lambda: worker.view.fatal)
    assert "from 400 on" in worker.view.fatal
    assert "up to 250" in worker.view.fatal
    assert worker.view.table_ids is None


def test_a_source_that_stands_behind_the_checkpoint_is_fine(new_worker: NewWorker, source: ScriptedSource) -> None:
    """The slot may be behind the stored checkpoint, or exactly there."""
    source.start_ts = 250
    worker = new_worker(msgspec.structs.replace(INFO, start_ts=100), stored_checkpoint_ts=250)
    _wait("it is polled", lambda: worker.view.retained_bytes == 77)
    assert not worker.view.fatal


def test_what_does_not_run_is_only_watched(new_worker: NewWorker, source: ScriptedSource) -> None:
    """A paused changefeed reports what it retains, and is neither started nor advanced."""
    worker = new_worker(duty=Duty.WATCH, stored_checkpoint_ts=250)
    _wait("it is polled", lambda: worker.view.retained_bytes == 77)
    assert "start" not in source.calls
    assert source.advanced == []


def test_a_removal_is_tried_until_it_works(new_worker: NewWorker, host: Host, source: ScriptedSource) -> None:
    """The error is reported in the meantime; then the changefeed is deleted, once."""
    source.error = OperatingError("slot is in use")
    worker = new_worker(duty=Duty.DROP)
    _wait("it says why", lambda: worker.view.error == "slot is in use")
    assert host.drops == 0
    source.error = None
    assert worker.join(WAIT_S)
    assert host.drops == 1


def test_a_worker_ends_with_its_term(new_worker: NewWorker, host: Host) -> None:
    """A worker of an owner that does not lead stores nothing."""
    host.refusal = NotLeaderError("gone")
    worker = new_worker()
    assert worker.join(WAIT_S)
    assert worker.view.start_ts == 0


def test_one_thread_at_a_time_talks_to_a_source(new_worker: NewWorker, source: ScriptedSource) -> None:
    """A new worker waits for a call of an earlier one, even if the workers between them never
    started."""
    source.hold.clear()
    first = new_worker()
    _wait("the call is under way", lambda: source.calls == ["start"])
    first.stop()
    second = new_worker(previous=first)
    second.stop()
    third = new_worker(previous=second)
    _wait("it says so", lambda: "has not returned yet" in third.view.error)
    assert source.calls == ["start"]
    source.hold.set()
    _wait("it is polled", lambda: third.view.retained_bytes == 77 and not third.view.error)
    assert second.join(WAIT_S)


class CuttingSource(ScriptedSource):
    """A source whose tables are split into the spans that the test gives."""

    def __init__(self, *cut: Span) -> None:
        super().__init__()
        self.cut = cut

    def spans(self, table_ids: I64) -> SpanBlock:
        self._call("spans")
        return SpanBlock.of([span for span in self.cut if span.table_id in table_ids or span.table_id == 9])


HALVES = tuple(Span(table, start, end) for table in (1, 2) for start, end in ((b"", b"m"), (b"m", b"")))


def test_a_source_cuts_its_tables_at_every_new_listing(new_worker: NewWorker, host: Host) -> None:
    """The spans are published together with their tables; a source that does not split has none."""
    source = host.source = CuttingSource(*HALVES)
    source.names = {1: "public.a"}
    worker = new_worker()
    _wait("table 1 is cut", lambda: worker.view.spans is not None)
    assert worker.view.spans == SpanBlock.of(HALVES[:2])
    source.names = {1: "public.a", 2: "public.b"}
    _wait("both are listed", lambda: worker.view.table_ids is not None and len(worker.view.table_ids) == 2)
    assert worker.view.spans == SpanBlock.of(HALVES)


@pytest.mark.parametrize(
    ("cut", "text"),
    [
        ((*HALVES, Span(9)), "the source gave spans of table 9, which it does not list"),
        ((HALVES[1], HALVES[0]), "spans must be sorted and unique"),
        ((HALVES[0], HALVES[0]), "spans must be sorted and unique"),
    ],
)
def test_a_wrong_cut_is_the_source_s_error(new_worker: NewWorker, host: Host, cut: tuple[Span, ...], text: str) -> None:
    """The error is reported, and no table is scheduled until the source corrects it."""
    source = host.source = CuttingSource(*cut)
    worker = new_worker()
    _wait("it is told", lambda: text in worker.view.error)
    assert worker.view.table_ids is None
    source.cut = HALVES
    _wait("it is mended", lambda: worker.view.spans == SpanBlock.of(HALVES))
