"""One changefeed in one term of this owner: its worker (the source), its scheduler, and how far it is.

The tick's thread owns a run; `runtime`, `watermark`, `scheduler` and the worker's view are values that any thread may read.
A run serves one epoch in one duty; pausing, resuming and removing a changefeed end its run and begin another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Set
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


@dataclass(frozen=True, slots=True)
class StoredChangefeed:
    """A changefeed's record as etcd has it, and the revision of its last change."""

    info: ChangefeedInfo
    revision: int

    @property
    def duty(self) -> Duty:
        if self.info.state.runs:
            return Duty.RUN
        return Duty.DROP if self.info.state is ChangefeedState.REMOVED else Duty.WATCH


@dataclass(frozen=True, slots=True)
class ChangefeedRuntime:
    """What the leader knows of a changefeed beyond what etcd holds; a new value whenever something of it changes.

    state: normal, warning, failed, stopped, finished (the text shown to operators). error: why, empty when all is well.
    watermark: of the last tick, or the stored status while not running. source_ts: where the source is now, 0 = not known.
    retained_bytes: what the source keeps on disk for this changefeed, None = not known.
    table_names: what the filter matched last, id -> `schema.table`.
    """

    state: str
    error: str = ""
    watermark: Watermark = field(default_factory=lambda: Watermark(0, 0))
    source_ts: Ts = 0
    retained_bytes: int | None = None
    table_names: Mapping[TableID, str] = field(default_factory=dict)


NewTransport = Callable[[ChangefeedID, int], Transport]


class _ListedSpans:
    """What the source cut its tables into when it listed them: calling it is the worker's, not the tick's."""

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
        """watermark: what etcd knows of it, 0 = nothing."""
        self.stored = stored
        self.worker = worker
        self.watermark = watermark
        self.stored_watermark = watermark
        """What stands in etcd, and what operators are shown: it never goes back, whoever leads next."""
        self.scheduler: SchedulerAndInfo | None = None
        self._owner_id = owner_id
        self._owner_revision = owner_revision
        self._listed = _ListedSpans()
        self._drains: frozenset[CaptureID] = frozenset()
        self.is_quiet = False
        """Whether its last tick found that nothing moves: no checkpoint, no span, no job, no position of the source."""
        self.load: Loads = {}
        """What it brings, or will bring, to each capture, as its last tick left it."""
        self._elsewhere: Loads = {}
        self._lag = SourceLag()
        self._recorder = recorder

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
        """What the processors are told: from the moment on from which etcd says where it starts. That holds before this owner
        has reached the source too, or every change of the leader would close all agents."""
        if self.duty is not Duty.RUN or not self.start_ts or self.worker.view.fatal:
            return None
        return ActiveChangefeed(self.changefeed, self.epoch)

    @property
    def has_reached_target(self) -> bool:
        return self.duty is Duty.RUN and 0 < self.stored.info.target_ts <= self.watermark.checkpoint_ts

    def serves(self, stored: StoredChangefeed) -> bool:
        """Whether this run is the right one for the record as it stands now."""
        return stored.info.epoch == self.epoch and stored.duty is self.duty

    def continue_from(self, former: ChangefeedRun) -> None:
        """A former run of the same changefeed in this term may know more than was stored."""
        self.watermark = max(self.watermark, former.watermark, key=lambda watermark: watermark.checkpoint_ts)

    def lag_s(self) -> float | None:
        """How long ago the source was where the stored checkpoint is; None: not known. Any thread."""
        if not self.worker.view.source_ts or not self.stored_watermark.checkpoint_ts:
            return None
        return self._lag.seconds(self.stored_watermark.checkpoint_ts, time.monotonic())

    def was_stored(self, watermark: Watermark) -> None:
        """By the thread that stores it."""
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
        """One tick, once it is known where it starts and which tables there are. cluster: None while it is alone."""
        view = self.worker.view
        self._lag.note(view.source_ts, self.stored_watermark.checkpoint_ts, time.monotonic())
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
                cluster_load=lambda: self._elsewhere,
                splitter=self._listed,
            )
            _log.info("changefeed_scheduled", changefeed=str(self.changefeed), epoch=self.epoch, tables=len(view.table_ids))
        scheduler = self.scheduler
        self._hand_over_drains(scheduler, drains)
        self._elsewhere = cluster.without(self.load) if cluster is not None else {}
        bound = self.stored.info.target_ts or TS_MAX
        if not len(view.table_ids):
            # Nothing is left to do up to where the source was when it had no table; TS_MAX would make a later table start there.
            bound = min(bound, view.source_ts)
        checkpoint_ts = max(self.start_ts, self.watermark.checkpoint_ts)
        watermark = scheduler.tick(checkpoint_ts, view.table_ids, captures, BarrierWithMinTs(Barrier(bound), TS_MAX))
        self.is_quiet = watermark == self.watermark and view.source_ts <= watermark.checkpoint_ts and _is_settled(scheduler)
        if watermark.checkpoint_ts >= self.watermark.checkpoint_ts and watermark.checkpoint_ts:
            self.watermark = watermark
        self._recorder.record(scheduler.events())
        before, self.load = self.load, scheduler.snapshot().loads_to_come() if cluster is not None else {}
        if cluster is not None:
            cluster.replace(before, self.load)

    def runtime(self) -> ChangefeedRuntime:
        """What operators see."""
        view, info = self.worker.view, self.stored.info
        state, error = info.state, info.error
        if state.runs:
            error = view.fatal or view.error or self._span_error()
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
        """Ends scheduling at once, and the worker after the call that it is in."""
        self.worker.stop()
        self._recorder.close()
        scheduler, self.scheduler = self.scheduler, None
        if scheduler is not None:
            scheduler.close()

    def _hand_over_drains(self, scheduler: SchedulerAndInfo, drains: Set[CaptureID]) -> None:
        handed = set(self._drains & drains)
        for target in sorted(drains - self._drains):
            try:
                scheduler.drain_capture(target)
                handed.add(target)
            except UnknownCaptureError:
                continue  # it has gone, or it has registered since the last tick: then the next one hands it over
        for target in sorted(self._drains - drains):
            scheduler.cancel_drain(target)
        self._drains = frozenset(handed)

    def _span_error(self) -> str:
        scheduler = self.scheduler
        failures = scheduler.snapshot().failures if scheduler is not None else {}
        if not failures:
            return ""
        text = next(iter(failures.values())).error
        return text if len(failures) == 1 else f"{len(failures)} spans, among them: {text}"


def _is_settled(scheduler: SchedulerAndInfo) -> bool:
    return scheduler.snapshot().is_steady and all(query.state in ENDED for query in scheduler.queries())
