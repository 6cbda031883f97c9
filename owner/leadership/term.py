"""One term of leadership: from a won election until any doubt about it.

Reads are level-triggered: watches keep the whole of captures, changefeeds and drains, and every round of the loop makes the runs
fit what they say. The tick's thread owns the runs. Everything that may block happens elsewhere: a source on its changefeed's
worker, storing in etcd on the thread "store", the calls to the processors on the hub's.

Before each effect the term asks whether it still leads: the hub before every Exchange, `Election.guarded_write` at etcd.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TypeVar

import structlog

from owner.changefeed.cluster_load import ClusterLoad
from owner.changefeed.run import ChangefeedRun, StoredChangefeed
from owner.changefeed.source_worker import ChangefeedWorker, Duty
from owner.changefeed.sources import new_source, source_request
from owner.changefeed.store import ChangefeedEvent, EtcdChangefeeds
from owner.events.cluster_events import record_captures, record_changefeeds, record_request
from owner.events.history import History
from owner.events.placement_counters import PlacementCounters
from owner.events.placement_history import PlacementHistory
from owner.events.recorder import EventRecorder
from owner.exchange.hub import ExchangeHub
from owner.leadership.election import Election, Leadership
from owner.leadership.evictions import Evictions
from owner.leadership.protocol_compatibility import ProtocolCompatibility
from owner.owner_config import OwnerConfig
from tablewire.errors import ClosedError, ConflictError, EtcdError, NotLeaderError, OperatingError
from tablewire.etcd import keys as etcd_keys
from tablewire.etcd.keys import ChangefeedKey
from tablewire.etcd.records import CaptureRecord, ChangefeedInfo, ChangefeedStatus, DrainRecord, Record, decode, encode, now
from tablewire.etcd.session import EtcdSession
from tablewire.etcd.values import KeyValue, PrefixState, Put
from tablewire.etcd.watch import PrefixWatch
from tablewire.model.ids import CaptureID, CaptureInfo, ChangefeedID, Ts
from tablewire.model.progress import Watermark
from tablewire.runtime.shutdown import run_thread
from tablewire.source import Source
from tablewire.wire.versions import SUPPORTED_VERSIONS, ProtocolVersions

LOAD_TIMEOUT_S = 5.0
LOAD_RETRY_S = 0.2
QUIET_AFTER_S = 1.0
"""When nothing has moved for this long, ticks, heartbeats and writes to etcd become as rare as tick.idle_interval_ms allows."""

_R = TypeVar("_R", bound=Record)

_log = structlog.get_logger("owner.term")


class Term:
    """run: the tick's thread. Everything public below "any thread": any."""

    def __init__(
        self,
        leadership: Leadership,
        *,
        owner_id: str,
        config: OwnerConfig,
        session: EtcdSession,
        election: Election,
        hub: ExchangeHub,
        counters: PlacementCounters,
        observe_tick: Callable[[float], None],
        former_workers: Mapping[ChangefeedID, ChangefeedWorker],
        protocols: ProtocolVersions = SUPPORTED_VERSIONS,
    ) -> None:
        """former_workers: those of earlier terms whose thread may still be in a call. protocols: of the wire."""
        self.revision = leadership.revision
        self._owner_id = owner_id
        self._config = config
        self._session = session
        self._election = election
        self._hub = hub
        self._counters = counters
        self._observe_tick = observe_tick
        self._registry = EtcdChangefeeds(session, config.cluster, election.guarded_write)
        self.history = History(
            session, config.cluster, election.guarded_write, owner_id, leadership.revision, config.history.events_max
        )
        self._workers = dict(former_workers)
        self._compatibility = ProtocolCompatibility(protocols)
        self._scheduler_config = config.scheduler
        self._runs: Mapping[ChangefeedID, ChangefeedRun] = MappingProxyType({})
        self._captures: Mapping[CaptureID, CaptureInfo] = MappingProxyType({})
        self._stored: Mapping[ChangefeedID, StoredChangefeed] = MappingProxyType({})
        self._statuses: Mapping[ChangefeedID, ChangefeedStatus] = MappingProxyType({})
        self._drains: frozenset[CaptureID] = frozenset()
        self._registered: Mapping[CaptureID, KeyValue] = MappingProxyType({})
        self._evictions = Evictions(session, election.guarded_write, election.guard, leadership.revision, config, self.history)
        self._unreadable: dict[str, int] = {}
        self._watches: list[PrefixWatch] = []
        self._lock = threading.Lock()
        """Of what the watches say: `_captures`, `_stored`, `_statuses`, `_drains` and the revisions they stand at."""
        self._revisions: dict[str, int] = {}
        self._loaded = False
        self._tick_at = self._moved_at = time.monotonic()
        self._is_active = threading.Event()
        """Whether something has moved within QUIET_AFTER_S."""
        self._idle_interval_s = min(config.tick.idle_interval_ms, config.scheduler.capture_silent_ms / 3) / 1000
        self._wake = threading.Event()
        self._ended = threading.Event()
        self._stop_reason = ""

    # -- any thread ---------------------------------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        """Whether the term has read the state in etcd and has not ended."""
        return self._loaded and self._election.leadership() is not None

    @property
    def is_loaded(self) -> bool:
        """Whether it knows what etcd holds."""
        return self._loaded

    def silence_s(self) -> float:
        """Seconds since the last round of ticks began."""
        return time.monotonic() - self._tick_at

    @property
    def captures(self) -> Mapping[CaptureID, CaptureInfo]:
        return {**self._captures, **self._compatibility.incompatible}

    @property
    def drains(self) -> Sequence[CaptureID]:
        return sorted(self._drains)

    @property
    def runs(self) -> Mapping[ChangefeedID, ChangefeedRun]:
        return self._runs

    @property
    def workers(self) -> Mapping[ChangefeedID, ChangefeedWorker]:
        """The last worker of each changefeed whose thread has not ended."""
        return {changefeed: worker for changefeed, worker in self._workers.items() if worker.alive}

    def wake(self) -> None:
        self._wake.set()

    def stop(self, reason: str, by: str = "") -> None:
        """Ends the term. Idempotent. by: who asked."""
        if not self._stop_reason:
            self._stop_reason = reason
            self.history.add("owner_stops_leading", subject=self._owner_id, why=reason, by=by)
        self._wake.set()

    def drain(self, capture: CaptureID, by: str = "") -> None:
        """Stores the target, then hands it over. NotLeaderError, EtcdError."""
        record = DrainRecord(capture_id=capture, requested_at=now(), requested_by=by)
        self._election.guarded_write([Put(etcd_keys.drain_key(self._config.cluster, capture), encode(record))])
        record_request(self.history, "drain_requested", capture, by)
        with self._lock:
            self._drains |= {capture}
        self.wake()

    def cancel_drain(self, capture: CaptureID, by: str = "") -> None:
        self._election.guarded_write([], [etcd_keys.drain_key(self._config.cluster, capture)])
        record_request(self.history, "drain_cancelled", capture, by)
        with self._lock:
            self._drains -= {capture}
        self.wake()

    # -- the tick's thread --------------------------------------------------------------------------------------------

    def run(self) -> str:
        """Leads; returns why it ended, when nothing is sent any more."""
        try:
            if not self._load():
                return self._doubt()
            self._hub.set_term(self.revision)
            self.history.add("owner_leads", subject=self._owner_id, text=f"revision {self.revision}")
            run_thread("store", self._store)
            while not (reason := self._doubt()):
                started = self._tick_at = time.monotonic()
                self._wake.clear()
                self._reconcile()
                runs = self._runs.values()
                cluster = ClusterLoad(run.load for run in runs) if len(runs) > 1 else None
                captures = self._evictions.with_held(self._captures, started)
                for run in runs:
                    run.tick(captures, self._drains, cluster, self._hub.transport, self._scheduler_config)
                took_s = time.monotonic() - started
                self._observe_tick(took_s)
                self._wake.wait(max(0.0, self._pace_s(started) - took_s))
            return reason
        finally:
            self._hub.stop_sending()
            self._ended.set()
            self._is_active.set()
            for run in self._runs.values():
                run.close()
            self._counters.keep_only(())  # the next leader counts
            if self._stop_reason:
                self.history.flush_last()

    def _pace_s(self, started: float) -> float:
        """Return the longest time until the next round: nothing is due soon once nothing has moved for a while."""
        if not all(run.is_quiet for run in self._runs.values()):
            self._moved_at = started
            self._is_active.set()
        elif started - self._moved_at >= QUIET_AFTER_S:
            self._is_active.clear()
        return self._idle_interval_s if not self._is_active.is_set() else self._config.tick.interval_ms / 1000

    def close(self) -> None:
        """After `run`: what may take a moment."""
        for watch in self._watches:
            watch.close()

    def _doubt(self) -> str:
        """Why this owner must not act as the leader of this term any more; "" = it may."""
        if self._stop_reason:
            return self._stop_reason
        leadership = self._election.leadership()
        if leadership is None:
            return "leadership was lost"
        return "" if leadership.revision == self.revision else "another term has begun"

    def _load(self) -> bool:
        """Everything of etcd once, linearizable, before the first tick; False when the term ended before."""
        cluster = self._config.cluster
        places = (
            (etcd_keys.captures_prefix(cluster), self._captures_changed),
            (etcd_keys.changefeeds_prefix(cluster), self._changefeeds_changed),
            (etcd_keys.drains_prefix(cluster), self._drains_changed),
        )
        changes = [self._in_order(prefix, changed) for prefix, changed in places]
        self._watches = [
            self._session.watch_prefix(prefix, change, name="watch") for (prefix, _), change in zip(places, changes, strict=True)
        ]
        # on_change runs after a waiter is woken: apply the state here too, or the first tick might see nothing.
        loads: list[tuple[str, Callable[[], None]]] = [
            (watch.prefix, partial(_load_watch, watch, change)) for watch, change in zip(self._watches, changes, strict=True)
        ]
        for prefix, load in [*loads, (etcd_keys.evicted_prefix(cluster), self._evictions.load)]:
            while True:
                if self._doubt():
                    return False
                try:
                    load()
                    break
                except EtcdError as error:
                    _log.warning("cannot_load", prefix=prefix, reason=str(error))
                    self._ended.wait(LOAD_RETRY_S)
        self._loaded = True
        return True

    def _in_order(self, prefix: str, changed: Callable[[PrefixState], bool]) -> Callable[[PrefixState], None]:
        """`changed`, for states that are newer than what was applied of this prefix, one at a time. It says whether to tick."""

        def apply(state: PrefixState) -> None:
            with self._lock:
                if state.revision <= self._revisions.get(prefix, 0):
                    return
                self._revisions[prefix] = state.revision
                matters = changed(state)
            if matters:
                self.wake()

        return apply

    def _reconcile(self) -> None:
        """Makes the runs fit the records, and tells the hub whom to call and what is active."""
        stored, runs = self._stored, dict(self._runs)
        changed = False
        for changefeed, run in list(runs.items()):
            record = stored.get(changefeed)
            if record is None or not run.serves(record):
                run.close()
                del runs[changefeed]
                changed = True
            else:
                run.stored = record
        for changefeed in sorted(stored.keys() - runs.keys()):
            runs[changefeed] = self._new_run(stored[changefeed], self._runs.get(changefeed))
            changed = True
        if changed:
            self._runs = MappingProxyType(dict(sorted(runs.items())))
            self._workers = {name: worker for name, worker in self._workers.items() if name in runs or worker.alive}
        self._counters.keep_only(map(str, runs))
        self._hub.set_captures(self._compatibility.compatible(self._captures), self._compatibility.versions)
        self._hub.set_active([active for run in self._runs.values() if (active := run.active) is not None])

    def _new_run(self, stored: StoredChangefeed, former: ChangefeedRun | None) -> ChangefeedRun:
        info = stored.info
        status = self._statuses.get(info.changefeed)
        watermark = Watermark(status.checkpoint_ts, status.resolved_ts) if status is not None else Watermark(0, 0)
        former_worker = self._workers.get(info.changefeed)
        worker = ChangefeedWorker(
            info,
            stored.duty,
            _Host(self),
            self._config.source,
            stored_checkpoint_ts=watermark.checkpoint_ts,
            former=former_worker if former_worker is not None and former_worker.alive else None,
        )
        self._workers[info.changefeed] = worker
        history = PlacementHistory(self.history, info.changefeed, lambda: worker.view.table_names)
        recorder = EventRecorder(info.changefeed, self._counters, history, owner_revision=self.revision)
        run = ChangefeedRun(stored, watermark, worker, owner_id=self._owner_id, owner_revision=self.revision, recorder=recorder)
        if former is not None and former.stored.info.created_at == info.created_at:
            run.continue_from(former)
        worker.start()
        _log.info("changefeed", changefeed=str(info.changefeed), state=info.state.value, epoch=info.epoch)
        return run

    # -- the watches' threads (and once the tick's) -------------------------------------------------------------------

    def _captures_changed(self, state: PrefixState) -> bool:
        read = [(self._read(CaptureRecord, item), item) for item in state.entries.values()]
        self._registered = MappingProxyType({record.id: item for record, item in read if record is not None})
        captures = self._compatibility.update(record for record, _ in read if record is not None)
        before, self._captures = self._captures, captures
        record_captures(self.history if self._loaded else None, before, captures, self._compatibility.leaving)
        return True

    def _changefeeds_changed(self, state: PrefixState) -> bool:
        stored: dict[ChangefeedID, StoredChangefeed] = {}
        statuses: dict[ChangefeedID, ChangefeedStatus] = {}
        before = self._stored
        for item in state.entries.values():
            place = etcd_keys.changefeed_of(self._config.cluster, item.key)
            if place is None:
                continue
            changefeed, kind = place
            if kind is ChangefeedKey.STATUS:
                status = self._read(ChangefeedStatus, item)
                if status is not None:
                    statuses[changefeed] = status
                continue
            known = before.get(changefeed)
            if known is not None and known.revision == item.mod_revision:
                stored[changefeed] = known
                continue
            info = self._read(ChangefeedInfo, item)
            if info is not None:
                stored[changefeed] = StoredChangefeed(info, item.mod_revision)
        self._statuses = MappingProxyType(statuses)
        if stored == before:
            return False  # a status alone, most likely our own
        if self._loaded:
            record_changefeeds(self.history, _infos(before), _infos(stored))
        self._stored = MappingProxyType(stored)
        return True

    def _drains_changed(self, state: PrefixState) -> bool:
        found = (etcd_keys.drain_of(self._config.cluster, key) for key in state.entries)
        self._drains = frozenset(capture for capture in found if capture is not None)
        return True

    def _read(self, kind: type[_R], item: KeyValue) -> _R | None:
        try:
            return decode(kind, item.key, item.value)
        except OperatingError as error:
            if self._unreadable.get(item.key) != item.mod_revision:
                self._unreadable[item.key] = item.mod_revision
                _log.error("unreadable_record", reason=str(error))
            return None

    # -- the thread "store" -------------------------------------------------------------------------------------------

    def _store(self) -> None:
        interval_s = self._config.tick.status_interval_ms / 1000
        while not self._ended.wait(interval_s):
            try:
                for run in self._runs.values():
                    self._store_run(run)
                self._forget_drains()
                self._evict()
                self.history.flush()
            except (NotLeaderError, ClosedError) as error:
                self.stop(str(error))
                return
            except (EtcdError, ConflictError) as error:
                _log.warning("cannot_store", reason=str(error))
            self._is_active.wait(self._idle_interval_s)

    def _store_run(self, run: ChangefeedRun) -> None:
        watermark, info = run.watermark, run.stored.info
        stored = run.stored_watermark
        moved = (watermark.checkpoint_ts, watermark.resolved_ts) != (stored.checkpoint_ts, stored.resolved_ts)
        try:
            if run.duty is Duty.RUN and watermark.checkpoint_ts and moved:
                status = ChangefeedStatus(checkpoint_ts=watermark.checkpoint_ts, resolved_ts=watermark.resolved_ts)
                self._registry.set_status(run.changefeed, status, run.stored.revision)
                run.was_stored(watermark)
            if info.state.runs and run.worker.view.fatal:
                self._registry.apply(run.changefeed, ChangefeedEvent.FATAL, error=run.worker.view.fatal, epoch=run.epoch)
            elif info.state.runs and run.has_reached_target:
                self._registry.apply(run.changefeed, ChangefeedEvent.TARGET_REACHED, epoch=run.epoch)
        except (ConflictError, LookupError):
            return  # it was changed or removed meanwhile; the watch says so

    def _forget_drains(self) -> None:
        """A capture id never comes back, so a drain of one that has gone is done."""
        for capture in sorted(self._drains - self._captures.keys()):
            self.cancel_drain(capture)
            _log.info("drain_ended", capture=capture, reason="it has left")

    def _evict(self) -> None:
        schedulers = [run.scheduler for run in self._runs.values()]
        snapshots = [scheduler.snapshot() if scheduler is not None else None for scheduler in schedulers]
        self._evictions.step(self._captures, self._registered, snapshots)


def _infos(stored: Mapping[ChangefeedID, StoredChangefeed]) -> dict[ChangefeedID, ChangefeedInfo]:
    return {changefeed: one.info for changefeed, one in stored.items()}


def _load_watch(watch: PrefixWatch, change: Callable[[PrefixState], None]) -> None:
    change(watch.wait_loaded(LOAD_TIMEOUT_S))


class _Host:
    """What the workers of a term may ask of it, on their threads."""

    def __init__(self, term: Term) -> None:
        self._term = term

    def new_source(self, info: ChangefeedInfo) -> Source:
        return new_source(source_request(info))

    def started(self, info: ChangefeedInfo, start_ts: Ts) -> None:
        now_stored = self._term._registry.set_start(info.changefeed, info.epoch, start_ts)
        if now_stored.epoch != info.epoch or now_stored.start_ts != start_ts:
            raise ConflictError(f"changefeed {info.changefeed} was changed while it started")

    def dropped(self, info: ChangefeedInfo) -> None:
        self._term._registry.forget(info.changefeed, info.epoch)
        _log.info("changefeed_removed", changefeed=str(info.changefeed))

    def changed(self) -> None:
        self._term.wake()
