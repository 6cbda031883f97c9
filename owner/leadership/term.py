"""One term of leadership: from a won election until there is any doubt about it.

The tick's thread owns the runs of the changefeeds. In every round it makes them fit what
`ClusterState` has read from etcd, and ticks them. Everything that may block happens on other
threads: sources on the workers' threads, writes to etcd on the thread "store", calls to processors
on the hub's threads.

Before each effect, it is checked that this owner still leads: by the hub before every Exchange, by
`Election.guarded_write` in etcd.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import structlog

from owner.changefeed.cluster_load import ClusterLoad
from owner.changefeed.run import ChangefeedRun, StoredChangefeed
from owner.changefeed.source_worker import ChangefeedWorker, Duty
from owner.changefeed.sources import new_source, source_request
from owner.changefeed.store import ChangefeedEvent, EtcdChangefeeds
from owner.events.cluster_events import record_request
from owner.events.history import History
from owner.events.placement_counters import PlacementCounters
from owner.events.placement_history import PlacementHistory
from owner.events.recorder import EventRecorder
from owner.exchange.hub import ExchangeHub
from owner.leadership.cluster_state import ClusterState
from owner.leadership.election import Election, Leadership
from owner.leadership.evictions import Evictions
from owner.leadership.protocol_compatibility import ProtocolCompatibility
from owner.owner_config import OwnerConfig
from tablewire.errors import ClosedError, ConflictError, EtcdError, NotLeaderError
from tablewire.etcd import keys as etcd_keys
from tablewire.etcd.records import ChangefeedInfo, ChangefeedStatus, DrainRecord, encode, now
from tablewire.etcd.session import EtcdSession
from tablewire.etcd.values import Put
from tablewire.model.ids import CaptureID, CaptureInfo, ChangefeedID
from tablewire.model.progress import Watermark
from tablewire.runtime.shutdown import run_thread
from tablewire.wire.versions import SUPPORTED_VERSIONS, ProtocolVersions

LOAD_TIMEOUT_S = 5.0
LOAD_RETRY_S = 0.2
QUIET_AFTER_S = 1.0
"""When nothing has moved and no round was asked for within this time, ticks, heartbeats and writes
to etcd become as rare as tick.idle_interval_ms allows."""

_log = structlog.get_logger("owner.term")


class Term:
    """`run` and `close`: the tick's thread. Everything else that is public: any thread."""

    def __init__(
        self,
        leadership: Leadership,
        *,
        owner_id: str,
        config: OwnerConfig,
        session: EtcdSession,
        election: Election,
        hub: ExchangeHub,
        changefeeds: EtcdChangefeeds,
        counters: PlacementCounters,
        observe_tick: Callable[[float], None],
        previous_workers: Mapping[ChangefeedID, ChangefeedWorker],
        protocols: ProtocolVersions = SUPPORTED_VERSIONS,
    ) -> None:
        """observe_tick(seconds): called after each round. previous_workers: those of earlier terms
        whose thread has not ended."""
        write = election.guarded_write
        self.revision = leadership.revision
        self.history = History(session, config.cluster, write, owner_id, leadership.revision, config.history.events_max)
        self.runs: Mapping[ChangefeedID, ChangefeedRun] = MappingProxyType({})
        self._owner_id = owner_id
        self._config = config
        self._election = election
        self._hub = hub
        self._changefeeds = changefeeds
        self._counters = counters
        self._observe_tick = observe_tick
        self._workers = dict(previous_workers)
        self._state = ClusterState(session, config.cluster, self.history, ProtocolCompatibility(protocols), self.wake)
        self._evictions = Evictions(session, write, election.guard, leadership.revision, config, self.history)
        self._is_loaded = False
        self._tick_at = self._moved_at = time.monotonic()
        self._is_active = threading.Event()
        """Whether something has moved, or a round was asked for, within QUIET_AFTER_S."""
        self._idle_interval_s = min(config.tick.idle_interval_ms, config.scheduler.capture_silent_ms / 3) / 1000
        self._interval_s = min(config.tick.interval_ms / 1000, self._idle_interval_s)
        self._wake = threading.Event()
        self._ended = threading.Event()
        self._stop_reason = ""

    # -- any thread ---------------------------------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        """Whether the term has read the state in etcd and has not ended."""
        return self._is_loaded and self._election.leadership() is not None

    @property
    def is_loaded(self) -> bool:
        """Whether the term has read the state in etcd."""
        return self._is_loaded

    def since_tick_s(self) -> float:
        """Return the seconds since the last round of ticks began."""
        return time.monotonic() - self._tick_at

    @property
    def captures(self) -> Mapping[CaptureID, CaptureInfo]:
        return {**self._state.captures, **self._state.compatibility.incompatible}

    @property
    def drains(self) -> Sequence[CaptureID]:
        return sorted(self._state.drains)

    @property
    def workers(self) -> Mapping[ChangefeedID, ChangefeedWorker]:
        """The last worker of each changefeed whose thread has not ended."""
        return {changefeed: worker for changefeed, worker in self._workers.items() if worker.alive}

    def wake(self) -> None:
        """Run the next round now, and the following ones at the short interval."""
        self._moved_at = time.monotonic()
        self._wake.set()

    def stop(self, reason: str, by: str = "") -> None:
        """End the term. Idempotent. by: the caller."""
        if not self._stop_reason:
            self._stop_reason = reason
            self.history.add("owner_stops_leading", subject=self._owner_id, why=reason, by=by)
        self.wake()

    def drain(self, capture: CaptureID, by: str = "") -> None:
        """Store a drain in etcd, then start it. NotLeaderError, EtcdError."""
        record = DrainRecord(capture_id=capture, requested_at=now(), requested_by=by)
        self._election.guarded_write([Put(etcd_keys.drain_key(self._config.cluster, capture), encode(record))])
        record_request(self.history, "drain_requested", capture, by)
        self._state.add_drain(capture)
        self.wake()

    def cancel_drain(self, capture: CaptureID, by: str = "") -> None:
        self._election.guarded_write([], [etcd_keys.drain_key(self._config.cluster, capture)])
        record_request(self.history, "drain_cancelled", capture, by)
        self._state.remove_drain(capture)
        self.wake()

    # -- the tick's thread --------------------------------------------------------------------------------------------

    def run(self) -> str:
        """Lead; when nothing is sent any longer, return why the term ended."""
        try:
            if not self._load():
                return self._end_reason()
            self._hub.set_term(self.revision)
            self.history.add("owner_leads", subject=self._owner_id, text=f"revision {self.revision}")
            run_thread("store", self._store)
            while not (reason := self._end_reason()):
                started = self._tick_at = time.monotonic()
                self._wake.clear()
                self._reconcile()
                runs = self.runs.values()
                cluster = ClusterLoad(run.load for run in runs) if len(runs) > 1 else None
                captures = self._evictions.with_held(self._state.captures, started)
                for run in runs:
                    run.tick(captures, self._state.drains, cluster, self._hub.transport, self._config.scheduler)
                took_s = time.monotonic() - started
                self._observe_tick(took_s)
                self._wake.wait(max(0.0, self._next_interval_s(started) - took_s))
            return reason
        finally:
            self._hub.stop_sending()
            self._ended.set()
            self._is_active.set()
            for run in self.runs.values():
                run.close()
            self._counters.keep_only(())  # the next leader counts
            if self._stop_reason:
                self.history.flush_last()

    def close(self) -> None:
        """Close the watches, which may take a moment. Call it after `run` has returned."""
        self._state.close()

    def _next_interval_s(self, started: float) -> float:
        """Return the longest time from the start of this round to the next one: long if nothing has
        moved for a while."""
        if not all(run.is_quiet for run in self.runs.values()):
            self._moved_at = started
        if started - self._moved_at < QUIET_AFTER_S:
            self._is_active.set()
            return self._interval_s
        self._is_active.clear()
        return self._idle_interval_s

    def _end_reason(self) -> str:
        """Return why this owner must not act as the leader of this term; empty if it may."""
        if self._stop_reason:
            return self._stop_reason
        leadership = self._election.leadership()
        if leadership is None:
            return "leadership was lost"
        return "" if leadership.revision == self.revision else "another term has begun"

    def _load(self) -> bool:
        """Read the state in etcd, linearizably, before the first tick. Return False if the term
        ended before that."""
        loads: dict[str, Callable[[], None]] = {
            "state": lambda: self._state.load(LOAD_TIMEOUT_S),
            "evictions": self._evictions.load,
        }
        for what, load in loads.items():
            while True:
                if self._end_reason():
                    return False
                try:
                    load()
                    break
                except EtcdError as error:
                    _log.warning("cannot_load", what=what, reason=str(error))
                    self._ended.wait(LOAD_RETRY_S)
        self._is_loaded = self._state.is_loaded
        return self._is_loaded

    def _reconcile(self) -> None:
        """Make the runs fit the records, and tell the hub which processors to call and which
        changefeeds are active."""
        stored, runs = self._state.changefeeds, dict(self.runs)
        for changefeed, run in self.runs.items():
            record = stored.get(changefeed)
            if record is not None and run.serves(record):
                run.stored = record
            else:
                run.close()
                del runs[changefeed]
        for changefeed in sorted(stored.keys() - runs.keys()):
            runs[changefeed] = self._new_run(stored[changefeed], self.runs.get(changefeed))
        if runs != self.runs:
            self.runs = MappingProxyType(dict(sorted(runs.items())))
            self._workers = {name: worker for name, worker in self._workers.items() if name in runs or worker.alive}
            self._counters.keep_only(map(str, runs))
        compatibility = self._state.compatibility
        self._hub.set_captures(compatibility.compatible(self._state.captures), compatibility.versions)
        self._hub.set_active([active for run in self.runs.values() if (active := run.active) is not None])

    def _new_run(self, stored: StoredChangefeed, previous: ChangefeedRun | None) -> ChangefeedRun:
        info = stored.info
        status = self._state.statuses.get(info.changefeed)
        watermark = Watermark(0, 0)
        if status is not None and status.generation == info.generation:
            watermark = Watermark(status.checkpoint_ts, status.resolved_ts)
        previous_worker = self._workers.get(info.changefeed)
        worker = ChangefeedWorker(
            info,
            stored.duty,
            self._config.source,
            self._changefeeds,
            new_source=lambda info: new_source(source_request(info, worker.stored_checkpoint_ts)),
            on_change=self.wake,
            stored_checkpoint_ts=watermark.checkpoint_ts,
            previous=previous_worker if previous_worker is not None and previous_worker.alive else None,
        )
        self._workers[info.changefeed] = worker
        history = PlacementHistory(self.history, info.changefeed, lambda: worker.view.table_names)
        recorder = EventRecorder(info.changefeed, self._counters, history, owner_revision=self.revision)
        run = ChangefeedRun(stored, watermark, worker, owner_id=self._owner_id, owner_revision=self.revision, recorder=recorder)
        if previous is not None and _life(previous.stored.info) == _life(info):
            run.continue_from(previous)
        worker.start()
        _log.info("changefeed", changefeed=str(info.changefeed), state=info.state.value, epoch=info.epoch)
        return run

    # -- the thread "store" -------------------------------------------------------------------------------------------

    def _store(self) -> None:
        while not self._ended.wait(self._config.tick.status_interval_ms / 1000):
            try:
                for run in self.runs.values():
                    self._store_run(run)
                self._forget_drains()
                snapshots = [run.scheduler.snapshot() if run.scheduler is not None else None for run in self.runs.values()]
                self._evictions.step(self._state.captures, self._state.capture_keys, snapshots)
                self.history.flush()
            except (NotLeaderError, ClosedError) as error:
                self.stop(str(error))
                return
            except (EtcdError, ConflictError) as error:
                _log.warning("cannot_store", reason=str(error))
            self._is_active.wait(self._idle_interval_s)

    def _store_run(self, run: ChangefeedRun) -> None:
        """Store how far the run is, and the end of a run that has failed or has reached its target."""
        watermark, stored, runs = run.watermark, run.stored_watermark, run.stored.info.state.runs
        moved = (watermark.checkpoint_ts, watermark.resolved_ts) != (stored.checkpoint_ts, stored.resolved_ts)
        try:
            if run.duty is Duty.RUN and watermark.checkpoint_ts and moved:
                status = ChangefeedStatus(
                    checkpoint_ts=watermark.checkpoint_ts,
                    resolved_ts=watermark.resolved_ts,
                    generation=run.stored.info.generation,
                )
                self._changefeeds.set_status(run.changefeed, status, run.stored.revision)
                run.was_stored(watermark)
            if runs and run.worker.view.fatal:
                self._changefeeds.apply(run.changefeed, ChangefeedEvent.FATAL, error=run.worker.view.fatal, epoch=run.epoch)
            elif runs and run.has_reached_target:
                self._changefeeds.apply(run.changefeed, ChangefeedEvent.TARGET_REACHED, epoch=run.epoch)
        except (ConflictError, LookupError):
            return  # it was changed or removed in the meantime, and the watch will deliver that

    def _forget_drains(self) -> None:
        """Delete the drains of captures that have left; a capture id is never used again."""
        for capture in sorted(self._state.drains - self._state.captures.keys()):
            self.cancel_drain(capture)
            _log.info("drain_ended", capture=capture, reason="it has left")


def _life(info: ChangefeedInfo) -> tuple[object, ...]:
    """Return what is the same as long as the progress of a changefeed counts."""
    return info.created_at, info.generation
