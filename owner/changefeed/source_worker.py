"""The worker of a changefeed: its Source, on a thread of its own, so that nothing that may block
runs on the tick's thread.

The worker publishes a `SourceView`, a new immutable value at each change, which the tick reads
without a lock. After an error it starts over with a new Source, with exponential backoff. `start`
then shows whether the slot was lost in the meantime: if it returns a position behind which changes
are missing, the changefeed fails.

A worker serves one epoch of one changefeed with one duty. Any change of these stops it and starts
another one, whose thread first waits for the previous one: at most one thread of this process calls
a changefeed's source.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

import msgspec
import numpy as np
import structlog

from owner.owner_config import SourceSection
from tablewire.errors import ChangesLostError, ConflictError, InvariantError, NotLeaderError, OperatingError, TablewireError
from tablewire.etcd.records import ChangefeedInfo
from tablewire.model.columns import I64
from tablewire.model.ids import ChangefeedID, TableID, Ts
from tablewire.model.spans import Span, SpanBlock
from tablewire.runtime.backoff import Backoff
from tablewire.runtime.shutdown import run_thread
from tablewire.runtime.uris import redact_uri
from tablewire.source import SelectiveSource, SinkCleaner, Source, SplitSource, StartedSource

PREVIOUS_WAIT_S = 1.0
POLLS_PER_QUIET_CHECK = 5
"""While the source stands still at the checkpoint, its slot is checked in every fifth poll only."""

_log = structlog.get_logger("owner.worker")


class Duty(StrEnum):
    """What a worker does: run (start, list tables, advance), watch (measure what a changefeed that
    does not run retains), or drop (remove what the changefeed made at its source)."""

    RUN = "run"
    WATCH = "watch"
    DROP = "drop"


@dataclass(frozen=True, slots=True, eq=False)
class SourceView:
    """What is known of a source.

    start_ts: where replication starts; 0: not started yet. table_ids: sorted; None: never listed;
    the same object until the tables change. spans: of these tables; None: one for each table.
    source_ts: the position of the source right before that listing. left_out: why tables of the filter
    are not replicated. error: the error that is being retried. fatal: an error that no retry can fix.
    """

    start_ts: Ts = 0
    table_ids: I64 | None = None
    spans: SpanBlock | None = None
    table_names: Mapping[TableID, str] = field(default_factory=dict)
    source_ts: Ts = 0
    retained_bytes: int | None = None
    left_out: Sequence[str] = ()
    error: str = ""
    fatal: str = ""


class WorkerRecords(Protocol):
    """What a worker stores; see `owner.changefeed.store.EtcdChangefeeds`."""

    def set_start(self, changefeed: ChangefeedID, epoch: int, start_ts: Ts) -> ChangefeedInfo: ...

    def forget(self, changefeed: ChangefeedID, epoch: int) -> None: ...


class ChangefeedWorker:
    """start() once, then read `view`; stop() returns at once. Any thread.

    new_source and the records are used on the worker's thread; after NotLeaderError the worker
    ends, after any other error it retries. on_change: called when the view has changed; must return
    at once.
    """

    def __init__(
        self,
        info: ChangefeedInfo,
        duty: Duty,
        config: SourceSection,
        records: WorkerRecords,
        *,
        new_source: Callable[[ChangefeedInfo], Source],
        on_change: Callable[[], None],
        stored_checkpoint_ts: Ts = 0,
        previous: ChangefeedWorker | None = None,
    ) -> None:
        self.info = info
        self.duty = duty
        self.stored_checkpoint_ts = stored_checkpoint_ts
        """The last checkpoint in etcd. The slot must not advance beyond it, because a new owner
        starts there."""
        self.view = SourceView(start_ts=info.start_ts)
        self._config = config
        self._records = records
        self._new_source = new_source
        self._on_change = on_change
        self._previous = previous
        self._stop = threading.Event()
        self._backoff = Backoff(config.retry_min_ms / 1000, config.retry_max_ms / 1000)
        self._polled: tuple[Ts, Ts] | None = None  # source_ts and checkpoint_ts of the last poll
        self._quiet_polls = 0
        self._thread: threading.Thread | None = None

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        self._thread = run_thread(f"changefeed {self.info.changefeed}", self._run)

    def stop(self) -> None:
        """Ask the thread to end after its current call. Idempotent."""
        self._stop.set()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the end of the thread; return whether it has ended."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return not self.alive

    # -- the worker's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._wait_for_previous()
        while not self._stop.is_set():
            try:
                self._serve()
                return
            except NotLeaderError:
                return
            except InvariantError:
                raise
            except ChangesLostError as error:
                self._publish(fatal=redact_uri(str(error)))
                return
            except Exception as error:  # noqa: BLE001 - a user's source may raise anything
                self._failed(error)
                self._stop.wait(self._backoff.next_s())

    def _wait_for_previous(self) -> None:
        """Wait even if this worker was stopped meanwhile, because the next worker waits for this
        one alone."""
        previous, self._previous = self._previous, None
        while previous is not None and not previous.join(PREVIOUS_WAIT_S):
            self._publish(error="an earlier call of the source has not returned yet")

    def _failed(self, error: Exception) -> None:
        """Publish the error, and log it when it is a new one; with its traceback when it does not
        come from Tablewire."""
        is_ours = isinstance(error, TablewireError)
        text = redact_uri(str(error) if is_ours else f"{type(error).__name__}: {error}")
        if text != self.view.error:
            changefeed = str(self.info.changefeed)
            _log.warning("source_failed", changefeed=changefeed, duty=self.duty, error=text, exc_info=None if is_ours else error)
        self._publish(error=text)

    def _serve(self) -> None:
        """Return when the worker was stopped or its duty is done; raise what the source raises."""
        source = self._new_source(self.info)
        self._polled = None
        try:
            if self.duty is Duty.DROP:
                source.drop()
                self._clean_sink(source)
                self._records.forget(self.info.changefeed, self.info.epoch)
                _log.info("changefeed_removed", changefeed=str(self.info.changefeed))
                return
            if self.duty is Duty.RUN:
                self._start(source)
            interval_ms = self._config.poll_interval_ms if self.duty is Duty.RUN else self._config.idle_poll_interval_ms
            while not self._stop.is_set() and not self.view.fatal:
                self._poll(source)
                self._backoff.reset()
                self._stop.wait(interval_ms / 1000)
        finally:
            source.close()

    def _clean_sink(self, source: Source) -> None:
        """Remove what is kept at the sink; a sink that is unreachable does not keep a changefeed from being removed."""
        if not isinstance(source, SinkCleaner):
            return
        try:
            source.clean_sink()
        except OperatingError as error:
            _log.warning("sink_rows_remain", changefeed=str(self.info.changefeed), reason=redact_uri(str(error)))

    def _start(self, source: Source) -> None:
        info = self.info
        if info.generation and not info.start_ts:
            source.drop()  # a resync: what an earlier generation made, or a start that was not stored
        start_ts = source.start() if isinstance(source, StartedSource) else info.start_ts or source.current_ts()
        needed_ts = max(self.view.start_ts, self.stored_checkpoint_ts)
        if not info.start_ts:
            stored = self._records.set_start(info.changefeed, info.epoch, start_ts)
            if (stored.epoch, stored.start_ts) != (info.epoch, start_ts):
                raise ConflictError(f"changefeed {info.changefeed} was changed while it started")
            self.info = msgspec.structs.replace(info, start_ts=start_ts)
            self._publish(start_ts=start_ts)
        elif start_ts > needed_ts:
            self._publish(
                fatal=f"the source can only be read from {start_ts} on, but was replicated up to {needed_ts}: the changes "
                "between are lost (was its slot dropped?); remove this changefeed and create it again"
            )

    def _poll(self, source: Source) -> None:
        # Before the listing: if there is no table in it, the source is replicated up to here.
        source_ts, checkpoint_ts = source.current_ts(), self.stored_checkpoint_ts
        if self.duty is not Duty.RUN:
            self._publish(source_ts=source_ts, retained_bytes=source.retained_bytes(), error="")
            return
        try:
            self._list_tables(source, source_ts)
        finally:  # the rest does not depend on the listing
            self._release(source, source_ts, checkpoint_ts)
        self._publish(error="")

    def _release(self, source: Source, source_ts: Ts, checkpoint_ts: Ts) -> None:
        """Advance to the checkpoint and measure what is retained; rarely, while nothing moves."""
        is_quiet = (source_ts, checkpoint_ts) == self._polled and source_ts <= checkpoint_ts
        self._polled, self._quiet_polls = (source_ts, checkpoint_ts), self._quiet_polls + 1 if is_quiet else 0
        if self._quiet_polls % POLLS_PER_QUIET_CHECK:
            return
        try:
            if checkpoint_ts:
                source.advance(checkpoint_ts)
        finally:
            self._publish(source_ts=source_ts, retained_bytes=source.retained_bytes())

    def _list_tables(self, source: Source, source_ts: Ts) -> None:
        names = source.tables()
        if self.view.table_ids is None or names != self.view.table_names:
            table_ids = np.sort(np.fromiter(names, np.int64, len(names)))
            table_ids.setflags(write=False)
            spans = _checked_spans(source.spans(table_ids), table_ids) if isinstance(source, SplitSource) else None
            self._publish(table_ids=table_ids, spans=spans, table_names=dict(names), source_ts=source_ts)
        if isinstance(source, SelectiveSource) and (left_out := tuple(source.left_out())) != self.view.left_out:
            self._publish(left_out=left_out)

    def _publish(self, **changes: object) -> None:
        before = self.view
        self.view = replace(before, **changes)  # type: ignore[arg-type]
        replaced = {name for name, value in changes.items() if getattr(before, name) is not value}
        if replaced - {"source_ts", "retained_bytes"}:  # no tick has to see these at once
            self._on_change()


def _checked_spans(spans: SpanBlock, table_ids: I64) -> SpanBlock:
    """Return the spans of a source if they belong to its tables and are in order. The scheduler
    reports gaps between them."""
    if strange := sorted(set(np.unique(spans.table_ids).tolist()) - set(table_ids.tolist())):
        raise OperatingError(f"the source gave spans of table {strange[0]}, which it does not list")
    previous: Span | None = None
    for span in spans if spans.start_keys else ():
        if previous is not None and not previous < span:
            raise OperatingError(f"the source gave span {span} behind {previous}: spans must be sorted and unique")
        previous = span
    return spans
