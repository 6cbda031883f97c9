"""One changefeed's Source, on a thread of its own: everything that may block stays here, never on the tick's thread.

The worker publishes a `SourceView`, a whole new value at each change, which the tick reads without a lock. What fails is
retried with exponential backoff and jitter from the beginning (a new Source, `start` again), so that a slot that was lost
meanwhile is noticed: `start` then returns a position behind which rows are missing, and that is fatal.

A worker serves one epoch of one changefeed in one duty. Whatever changes that stops it and starts another, whose thread
first waits for the former one: at most one thread of this process talks to a changefeed's source.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

import msgspec
import numpy as np
import structlog

from owner.owner_config import SourceSection
from tablewire.errors import InvariantError, NotLeaderError, OperatingError, TablewireError
from tablewire.etcd.records import ChangefeedInfo
from tablewire.model.columns import I64
from tablewire.model.ids import TableID, Ts
from tablewire.model.spans import Span, SpanBlock
from tablewire.runtime.shutdown import run_thread
from tablewire.runtime.uris import redact_uri
from tablewire.source import Source, SplitSource, StartedSource

FORMER_WAIT_S = 1.0

_log = structlog.get_logger("owner.worker")


class Duty(StrEnum):
    """What a worker does: run (start, list tables, advance), watch (a changefeed that does not run still pins its source),
    drop (it is removed)."""

    RUN = "run"
    WATCH = "watch"
    DROP = "drop"


def _no_tables() -> I64:
    return np.empty(0, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class SourceView:
    """What is known of a source. start_ts: where replication starts, 0 = not started yet. table_ids: sorted, None = never
    listed; the same object as long as the tables are the same. spans: of these tables, None = each is one. source_ts: where
    the source was right before that listing. error: what is being retried. fatal: what no retry can mend."""

    start_ts: Ts = 0
    table_ids: I64 | None = None
    spans: SpanBlock | None = None
    table_names: Mapping[TableID, str] = field(default_factory=dict)
    source_ts: Ts = 0
    retained_bytes: int | None = None
    error: str = ""
    fatal: str = ""


class WorkerHost(Protocol):
    """What a worker needs of the term it serves. Called on the worker's thread; all but `changed` may block on etcd and raise
    NotLeaderError (the term is over: the worker ends) or another OperatingError (retried)."""

    def new_source(self, info: ChangefeedInfo) -> Source: ...

    def started(self, info: ChangefeedInfo, start_ts: Ts) -> None:
        """Stores where replication of a changefeed starts that had no start yet."""
        ...

    def dropped(self, info: ChangefeedInfo) -> None:
        """Everything at the source is gone: forget the changefeed."""
        ...

    def changed(self) -> None:
        """The view has changed. Returns at once."""
        ...


class ChangefeedWorker:
    """start() once, then read `view`; stop() returns at once. Any thread."""

    def __init__(
        self,
        info: ChangefeedInfo,
        duty: Duty,
        host: WorkerHost,
        config: SourceSection,
        *,
        stored_checkpoint_ts: Ts = 0,
        former: ChangefeedWorker | None = None,
    ) -> None:
        self.info = info
        self.duty = duty
        self.stored_checkpoint_ts = stored_checkpoint_ts
        """The last one that stands in etcd, kept up to date by whoever stores it. The safepoint must not pass it: a new owner
        starts there."""
        self._host = host
        self._config = config
        self._former = former
        self._view = SourceView(start_ts=info.start_ts)
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._jitter = random.Random()
        self._served = False
        self._thread: threading.Thread | None = None

    @property
    def view(self) -> SourceView:
        return self._view

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        self._thread = run_thread(f"changefeed {self.info.changefeed}", self._run)

    def stop(self) -> None:
        """Asks the thread to end after the call it is in. Idempotent."""
        self._stop.set()
        self._wake.set()

    def join(self, timeout_s: float | None = None) -> bool:
        """Waits for the thread's end; whether it has ended."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return not self.alive

    def _run(self) -> None:
        if not self._wait_for_former():
            return
        failures = 0
        while not self._stop.is_set():
            try:
                self._serve()
                return
            except NotLeaderError:
                return
            except InvariantError:
                raise
            except Exception as error:  # noqa: BLE001 - the border to a user's source
                failures = 0 if self._served else failures
                self._failed(error)
                self._pause(self._backoff_s(failures))
                failures += 1

    def _wait_for_former(self) -> bool:
        """False: asked to stop meanwhile. It waits all the same, since a later worker waits for this one alone."""
        former, self._former = self._former, None
        while former is not None and not former.join(FORMER_WAIT_S):
            self._publish(error="a call of the source that was made before has not returned yet")
        return not self._stop.is_set()

    def _failed(self, error: Exception) -> None:
        """Published each time, logged when it is another one than before; with its traceback when it is none of ours."""
        is_ours = isinstance(error, TablewireError)
        text = redact_uri(str(error) if is_ours else f"{type(error).__name__}: {error}")
        if text != self._view.error:
            changefeed = str(self.info.changefeed)
            _log.warning("source_failed", changefeed=changefeed, duty=self.duty, error=text, exc_info=None if is_ours else error)
        self._publish(error=text)

    def _backoff_s(self, failures: int) -> float:
        ceiling_ms = min(self._config.retry_max_ms, self._config.retry_min_ms * 2.0 ** min(failures, 30))
        return self._jitter.uniform(0.5, 1.0) * ceiling_ms / 1000

    def _serve(self) -> None:
        """Returns when asked to stop or when its duty is done; raises what the source raises."""
        self._served = False
        source = self._host.new_source(self.info)
        try:
            if self.duty is Duty.DROP:
                source.drop()
                self._host.dropped(self.info)
                return
            if self.duty is Duty.RUN:
                self._start(source)
            interval_ms = self._config.poll_interval_ms if self.duty is Duty.RUN else self._config.idle_poll_interval_ms
            while not self._stop.is_set() and not self._view.fatal:
                self._poll(source)
                self._served = True
                self._pause(interval_ms / 1000)
        finally:
            source.close()

    def _start(self, source: Source) -> None:
        start_ts = _start_ts(source, self.info.start_ts)
        if not self.info.start_ts:
            self._host.started(self.info, start_ts)
            self.info = msgspec.structs.replace(self.info, start_ts=start_ts)
            self._publish(start_ts=start_ts)
            return
        needed_ts = max(self._view.start_ts, self.stored_checkpoint_ts)
        if start_ts > needed_ts:
            self._publish(
                fatal=f"the source can only be read from {start_ts} on, but was replicated up to {needed_ts}: "
                "what lies between is lost (was its slot dropped?); remove this changefeed and create it anew"
            )

    def _poll(self, source: Source) -> None:
        if self._view.fatal:
            return
        # Before the listing: with no table in it, all of the source up to here is done.
        source_ts = source.current_ts()
        if self.duty is Duty.RUN:
            self._list_tables(source, source_ts)
            checkpoint_ts = self.stored_checkpoint_ts
            if checkpoint_ts:
                source.advance(checkpoint_ts)
        retained_bytes = source.retained_bytes()
        self._publish(source_ts=source_ts, retained_bytes=retained_bytes, error="")

    def _list_tables(self, source: Source, source_ts: Ts) -> None:
        names = source.tables()
        if self._view.table_ids is None or names != self._view.table_names:
            table_ids = np.sort(np.fromiter(names, np.int64, len(names)))
            table_ids.setflags(write=False)
            spans = _checked_spans(source.spans(table_ids), table_ids) if isinstance(source, SplitSource) else None
            self._publish(table_ids=table_ids, spans=spans, table_names=dict(names), source_ts=source_ts)

    def _publish(self, **changes: object) -> None:
        before = self._view
        self._view = replace(before, **changes)  # type: ignore[arg-type]
        replaced = {name for name, value in changes.items() if getattr(before, name) is not value}
        # retained_bytes is for operators alone.
        if replaced - {"source_ts", "retained_bytes"} or before.source_ts != self._view.source_ts:
            self._host.changed()

    def _pause(self, seconds: float) -> None:
        self._wake.wait(seconds)
        if not self._stop.is_set():
            self._wake.clear()


def _start_ts(source: Source, known: Ts) -> Ts:
    """Where replication starts: what the source says when it makes what it needs, else where it is at the first start."""
    if isinstance(source, StartedSource):
        return source.start()
    return known or source.current_ts()


def _checked_spans(spans: SpanBlock, table_ids: I64) -> SpanBlock:
    """What a source says its tables should be cut into, if it is of these tables and in order. A hole is not an error here: the
    scheduler finds it and says so."""
    if strange := sorted(set(np.unique(spans.table_ids).tolist()) - set(table_ids.tolist())):
        raise OperatingError(f"the source gave spans of table {strange[0]}, which it does not list")
    former: Span | None = None
    for span in spans if spans.start_keys else ():
        if former is not None and not former < span:
            raise OperatingError(f"the source gave span {span} behind {former}: spans must be sorted and unique")
        former = span
    return spans
