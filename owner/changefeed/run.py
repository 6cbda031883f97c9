"""The run of a changefeed in one term: its worker, its scheduler and its progress.

The tick's thread owns a run. `runtime`, `watermark`, `scheduler` and the worker's view are values
that any thread may read. A run serves one epoch with one duty: pausing, resuming and removing a
changefeed end its run and start another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field

import structlog

from owner.changefeed.cluster_load import ClusterLoad, Loads
from owner.changefeed.source_lag import SourceLag
from owner.changefeed.source_worker import ChangefeedWorker, Duty
from owner.core.scheduler_config import SchedulerConfig
from owner.events.recorder import EventRecorder
from owner.scheduling.scheduler import SchedulerAndInfo, new_scheduler
from tablewire.errors import UnknownCaptureError
from tablewire.etcd.records import ChangefeedInfo, ChangefeedState
from tablewire.model.columns import I64
from tablewire.model.ids import TS_MAX, CaptureID, CaptureInfo, ChangefeedID, TableID, Ts
from tablewire.model.jobs import ENDED
from tablewire.model.messages import ActiveChangefeed, Transport
from tablewire.model.progress import Barrier, BarrierWithMinTs, Watermark
from tablewire.model.spans import SpanBlock

_log = structlog.get_logger("owner.run")

NewTransport = Callable[[ChangefeedID, int], Transport]


@dataclass(frozen=True, slots=True)
class StoredChangefeed:
    """The record of a changefeed in etcd, and the revision of its last change."""

    info: ChangefeedInfo
    revision: int

    @property
    def duty(self) -> Duty:
        if self.info.state.runs:
            return Duty.RUN
        return Duty.DROP if self.info.state is ChangefeedState.REMOVED else Duty.WATCH


@dataclass(frozen=True, slots=True)
class ChangefeedRuntime:
    """What the leader knows of a changefeed beyond its record in etcd.

    state: the text shown to operators, normal or warning while it runs. error: empty if there is
    none. watermark: as stored in etcd. source_ts: the position of the source, 0 = not known.
    retained_bytes: what the source keeps on disk for this changefeed, None = not known.
    table_names: the tables of the last listing.
    """

    state: str
    error: str = ""
    watermark: Watermark = field(default_factory=lambda: Watermark(0, 0))
    source_ts: Ts = 0
    retained_bytes: int | None = None
    table_names: Mapping[TableID, str] = field(default_factory=dict)


class _ListedSpans:
    """A Splitter that returns the spans of the worker's last listing."""

    spans: SpanBlock | None = None

    def split(self, table_ids: I64) -> SpanBlock:
        return SpanBlock(table_ids) if self.spans is None else self.spans


class ChangefeedRun:
    """`tick` and `close`: the tick's thread."""

    def __init__(
        self,
        stored: StoredChangefeed,
        watermark: Watermark,
        worker: ChangefeedWorker,
        *,
        owner_id: str,
        owner_revision: int,
        recorder: EventRecorder,
    ) -> None:
        """watermark: as stored in etcd; 0: none was stored."""
        self.stored = stored
        self.worker = worker
        self.watermark = watermark
        self.stored_watermark = watermark
        """The watermark in etcd, which is what operators see: it never goes back, even when another
        owner takes over."""
        self.scheduler: SchedulerAndInfo | None = None
        self.is_quiet = False
        """Whether the last tick found that nothing happens: no span changes its state, no job is under
        way, and no rows are written (the position of an idle database moves, too) or, where executors
        do not report rates, neither the checkpoint nor the source moves."""
        self.load: Loads = {}
        """The weight that this changefeed brings to each capture, including its planned moves."""
        self._owner_id = owner_id
        self._owner_revision = owner_revision
        self._recorder = recorder
        self._listed = _ListedSpans()
        self._load_elsewhere: Loads = {}
        self._lag = SourceLag()

    @property
    def changefeed(self) -> ChangefeedID:
        return self.stored.info.changefeed

    @property
    def epoch(self) -> int:
        return self.stored.info.epoch

    @property
    def duty(self) -> Duty:
        return self.worker.duty

    @property
    def start_ts(self) -> Ts:
        return self.stored.info.start_ts or self.worker.view.start_ts

    @property
    def active(self) -> ActiveChangefeed | None:
        """The changefeed as batches name it to processors; None before etcd has the start position.

        It does not depend on the source being reachable: otherwise each change of the leader would
        close all agents.
        """
        if self.duty is not Duty.RUN or not self.start_ts or self.worker.view.fatal:
            return None
        return ActiveChangefeed(self.changefeed, self.epoch)

    @property
    def has_reached_target(self) -> bool:
        return self.duty is Duty.RUN and 0 < self.stored.info.target_ts <= self.watermark.checkpoint_ts

    def serves(self, stored: StoredChangefeed) -> bool:
        """Return whether this run fits the record as it is now."""
        return stored.info.epoch == self.epoch and stored.duty is self.duty

    def continue_from(self, previous: ChangefeedRun) -> None:
        """Take over the watermark of an earlier run of this changefeed, which may be ahead of the
        stored one."""
        self.watermark = max(self.watermark, previous.watermark, key=lambda watermark: watermark.checkpoint_ts)

    def lag_s(self) -> float | None:
        """Return how far the stored checkpoint is behind the source, in seconds; None: not known.
        Any thread."""
        if not self.worker.view.source_ts or not self.stored_watermark.checkpoint_ts:
            return None
        return self._lag.seconds(self.stored_watermark.checkpoint_ts, time.monotonic())

    def was_stored(self, watermark: Watermark) -> None:
        """Note the watermark that etcd has now. Called by the thread that stores it."""
        self.stored_watermark = watermark
        self.worker.stored_checkpoint_ts = watermark.checkpoint_ts

    def tick(
        self,
        captures: Mapping[CaptureID, CaptureInfo],
        drains: Set[CaptureID],
        cluster: ClusterLoad | None,
        new_transport: NewTransport,
        config: SchedulerConfig,
    ) -> None:
        """Tick the scheduler, once the start position and the tables are known. cluster: None if
        this is the only changefeed."""
        view = self.worker.view
        self._lag.observe(view.source_ts, self.stored_watermark.checkpoint_ts, time.monotonic())
        self.is_quiet = self.active is None or view.table_ids is None
        if self.active is None or view.table_ids is None:
            return
        self._listed.spans = view.spans
        if self.scheduler is None:
            self.scheduler = new_scheduler(
                owner_id=self._owner_id,
                changefeed_id=self.changefeed,
                owner_revision=self._owner_revision,
                changefeed_epoch=self.epoch,
                transport=new_transport(self.changefeed, self.epoch),
                config=config,
                cluster_load=lambda: self._load_elsewhere,
                splitter=self._listed,
            )
            _log.info("changefeed_scheduled", changefeed=str(self.changefeed), epoch=self.epoch, tables=len(view.table_ids))
        scheduler = self.scheduler
        self._pass_on_drains(scheduler, drains)
        self._load_elsewhere = cluster.without(self.load) if cluster is not None else {}
        bound = self.stored.info.target_ts or TS_MAX
        if not len(view.table_ids):
            # Without tables the source is replicated up to its position; with TS_MAX a later table would start there.
            bound = min(bound, view.source_ts)
        checkpoint_ts = max(self.start_ts, self.watermark.checkpoint_ts)
        watermark = scheduler.tick(checkpoint_ts, view.table_ids, captures, BarrierWithMinTs(Barrier(bound), TS_MAX))
        moves = watermark != self.watermark or view.source_ts > watermark.checkpoint_ts
        self.is_quiet = _is_settled(scheduler) and (not moves or scheduler.snapshot().is_idle)
        if watermark.checkpoint_ts >= self.watermark.checkpoint_ts and watermark.checkpoint_ts:
            self.watermark = watermark
        self._recorder.record(scheduler.events())
        if cluster is not None:
            before, self.load = self.load, scheduler.snapshot().loads_to_come()
            cluster.replace(before, self.load)
        else:
            self.load = {}

    def runtime(self) -> ChangefeedRuntime:
        """Return what operators see."""
        view, info = self.worker.view, self.stored.info
        state, error = info.state, info.error
        if state.runs:
            error = view.fatal or view.error or self._span_error() or _left_out(view.left_out)
            state = ChangefeedState.WARNING if error else ChangefeedState.NORMAL
        elif self.duty is Duty.DROP:
            error = view.error
        return ChangefeedRuntime(
            state=state.value,
            error=error,
            watermark=self.stored_watermark,
            source_ts=view.source_ts,
            retained_bytes=view.retained_bytes,
            table_names=view.table_names,
        )

    def close(self) -> None:
        """Stop scheduling at once, and the worker after its current call."""
        self.worker.stop()
        self._recorder.close()
        scheduler, self.scheduler = self.scheduler, None
        if scheduler is not None:
            scheduler.close()

    def _pass_on_drains(self, scheduler: SchedulerAndInfo, drains: Set[CaptureID]) -> None:
        """Make the scheduler drain these captures and no others."""
        in_force = scheduler.snapshot().drains.keys()
        for target in sorted(drains - in_force):
            with suppress(UnknownCaptureError):  # it has left, or it has registered since the last tick
                scheduler.drain_capture(target)
        for target in sorted(in_force - drains):
            scheduler.cancel_drain(target)

    def _span_error(self) -> str:
        scheduler = self.scheduler
        failures = scheduler.snapshot().failures if scheduler is not None else {}
        if not failures:
            return ""
        text = next(iter(failures.values())).error
        return text if len(failures) == 1 else f"{len(failures)} spans, among them: {text}"


def _left_out(reasons: Sequence[str]) -> str:
    if not reasons:
        return ""
    return f"left out, while all others are replicated: {reasons[0]}{f' (and {len(reasons) - 1} more)' if reasons[1:] else ''}"


def _is_settled(scheduler: SchedulerAndInfo) -> bool:
    return scheduler.snapshot().is_steady and all(query.state in ENDED for query in scheduler.queries())
