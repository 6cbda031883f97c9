"""Captures that are silent although their leases live: given up, so that their spans can go on elsewhere.

The invariant, whoever leads: **a capture that is not known to be fenced is taken for dead only TTL + margin after some owner has
revoked its lease.** Its key is gone before, but nobody heard it stop, and its sink would not refuse it; it has stopped by itself
once its last keep-alive is a TTL old, and there is none after the revocation. Until then it is passed on as alive, so that
nothing is promoted beside it.

So an eviction stands in etcd from the moment at which the key is gone, written by the same transaction, and is carried on by
whoever leads:

    asked     held; whether the transaction was applied is not known yet
    stands    /tablewire/<cluster>/evicted/<capture_id> = EvictionRecord: the lease has to be revoked
    revoked   held for TTL + margin from here on, by this owner's clock; not at all when the capture is known to be fenced
    over      the record is deleted

A term begins with `load`, before it schedules anything. It cannot know whether its predecessor revoked a lease, or when: it
revokes it (again), and holds the capture for the whole time. What it writes is guarded by its own revision: a thread that is
left over from an earlier term of the same process must not evict what the new one believes alive.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from owner.events.history import History
from owner.owner_config import OwnerConfig
from owner.scheduling.snapshot import Snapshot
from tablewire.errors import ConflictError, EtcdError, NotLeaderError, OperatingError
from tablewire.etcd import keys as etcd_keys
from tablewire.etcd.guarded_write import GuardedWrite
from tablewire.etcd.records import EvictionRecord, decode, encode, now
from tablewire.etcd.session import EtcdSession
from tablewire.etcd.values import Compare, KeyValue, Put, is_absent, is_unchanged
from tablewire.model.ids import CaptureID, CaptureInfo
from tablewire.model.states import CaptureState

_UNHEARD = (CaptureState.SILENT, CaptureState.UNINITIALIZED)  # the latter: not once in this term

_log = structlog.get_logger("owner.evictions")


@dataclass(slots=True)
class _Eviction:
    """One that is not over. until_s: until when it may still write; inf while its lease is not known to be revoked."""

    info: CaptureInfo
    fenced: bool = False
    lease: int = 0
    silent_s: float = 0.0
    stands: bool = False
    until_s: float = math.inf


class Evictions:
    """Of one term. load: before its first tick; step: the thread "store" (both may block on etcd); with_held: the tick's."""

    def __init__(
        self,
        session: EtcdSession,
        write: GuardedWrite,
        guard: Callable[[], Compare],
        owner_revision: int,
        config: OwnerConfig,
        history: History,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """guard: `Election.guard`; owner_revision: of the term. clock: seconds; the same as that of `with_held`."""
        self._session = session
        self._guarded_write = write
        self._guard = guard
        self._owner_revision = owner_revision
        self._cluster = config.cluster
        self._evict_s = config.scheduler.capture_evict_ms / 1000
        self._hold_s = config.etcd.ttl_s + config.etcd.margin_s
        self._history = history
        self._clock = clock
        self._silent_since: dict[CaptureID, float] = {}
        self._evictions: dict[CaptureID, _Eviction] = {}
        self._unreadable: set[tuple[str, int]] = set()
        self._lock = threading.Lock()
        """Of `_evictions`, which `load` and `step` alone change."""

    def load(self) -> None:
        """What former owners began. EtcdError: nothing was loaded, try again."""
        items, _ = self._session.get_prefix(etcd_keys.evicted_prefix(self._cluster))
        for item in items:
            capture = etcd_keys.evicted_of(self._cluster, item.key)
            if capture is None:
                continue
            eviction = _Eviction(CaptureInfo(capture, ""))
            self._read(eviction, item)
            self._set(capture, eviction)
            _log.info("eviction_taken_over", capture=capture, fenced=eviction.fenced)

    def with_held(self, captures: Mapping[CaptureID, CaptureInfo], now_s: float) -> Mapping[CaptureID, CaptureInfo]:
        """The captures of etcd, and those that may still write."""
        with self._lock:
            held = {id: one.info for id, one in self._evictions.items() if not one.fenced and one.until_s > now_s}
        return {**held, **captures} if held else captures

    def step(
        self,
        captures: Mapping[CaptureID, CaptureInfo],
        registered: Mapping[CaptureID, KeyValue],
        snapshots: Sequence[Snapshot | None],
    ) -> None:
        """Evicts whoever is due, and brings each eviction as far as it gets. One that fails stops no other; the first error is
        raised: NotLeaderError at once, EtcdError after all were tried.

        captures: those that count as alive; registered: their keys, both as last seen. snapshots: of every changefeed's
        scheduler, None where there is none."""
        failures: list[EtcdError] = []
        for capture, silent_s in self._due(captures, snapshots):
            info, key = captures.get(capture), registered.get(capture)
            if info is None or key is None:
                continue
            try:
                self._evict(_Eviction(info, _is_known_fenced(capture, snapshots), key.lease, silent_s), key)
            except EtcdError as error:
                failures.append(error)
        for capture, eviction in sorted(self._evictions.items()):
            try:
                self._settle(capture, eviction, capture in registered)
            except EtcdError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    # -- who is due

    def _due(
        self, captures: Mapping[CaptureID, CaptureInfo], snapshots: Sequence[Snapshot | None]
    ) -> list[tuple[CaptureID, float]]:
        """Those that have been silent to all schedulers for too long, and for how long. Nobody while nobody answers: then it is
        we who hear nothing."""
        silent: set[CaptureID] = set()
        heard: set[CaptureID] = set()
        for snapshot in snapshots:
            for view in snapshot.captures if snapshot is not None else ():
                (silent if view.state in _UNHEARD else heard).add(view.id)
        now_s = self._clock()
        self._silent_since = {
            capture: self._silent_since.get(capture, now_s) for capture in sorted((silent - heard) & captures.keys())
        }
        if not self._evict_s or not heard:
            return []
        return [(capture, now_s - since_s) for capture, since_s in self._silent_since.items() if now_s - since_s >= self._evict_s]

    # -- the steps of one eviction

    def _evict(self, eviction: _Eviction, key: KeyValue) -> None:
        """Takes its key away, and with it the capture's permission to write. key: as it stands; when it was changed meanwhile
        nothing happens. It is held from before its key is gone, so that no tick takes it for dead in between."""
        capture = eviction.info.id
        former = self._evictions.get(capture)
        if former is not None and former.stands:
            return  # the watch has not said yet that the key is gone
        self._set(capture, eviction)
        info = eviction.info
        record = EvictionRecord(
            id=info.id,
            address=info.address,
            version=info.version,
            labels=dict(info.labels),
            lease=eviction.lease,
            fenced=eviction.fenced,
            requested_at=now(),
        )
        place = etcd_keys.evicted_key(self._cluster, capture)
        pins = [is_unchanged(key.key, key.mod_revision), is_absent(place)]
        try:
            self._write([Put(place, encode(record))], [key.key], pins)
        except ConflictError:
            return  # changed or gone meanwhile: `_settle` finds out
        self._begin(eviction)

    def _settle(self, capture: CaptureID, eviction: _Eviction, is_registered: bool) -> None:
        """Brings it as far as it gets now; see the module's docstring."""
        place = etcd_keys.evicted_key(self._cluster, capture)
        if not eviction.stands:
            if is_registered:
                return  # the write was not applied, or not yet; while the capture is silent it is tried again
            found = self._session.get(place)
            if found is None:
                self._forget(capture)  # the key went without us
                return
            if not self._read(eviction, found):
                return
            if eviction.silent_s:
                self._begin(eviction)
        if eviction.until_s == math.inf:
            if eviction.lease:
                self._session.revoke(eviction.lease)
            eviction.until_s = self._clock() + (0.0 if eviction.fenced else self._hold_s)
        if eviction.until_s <= self._clock():
            self._write([], [place])
            self._forget(capture)

    def _begin(self, eviction: _Eviction) -> None:
        """It is known that the key is gone and the record stands, and it was we who did it."""
        eviction.stands = True
        capture, silent_s = eviction.info.id, eviction.silent_s
        _log.error("capture_evicted", capture=capture, silent_ms=round(silent_s * 1000))
        self._history.add("capture_evicted", subject=capture, why=f"silent for {silent_s:.1f} s although its lease lives")

    def _read(self, eviction: _Eviction, item: KeyValue) -> bool:
        """Fills the eviction from its record. False: it cannot be read. Without its lease nothing is known of the capture: it is
        held until somebody who knows better deletes the record."""
        try:
            record = decode(EvictionRecord, item.key, item.value)
        except OperatingError as error:
            if (item.key, item.mod_revision) not in self._unreadable:
                self._unreadable.add((item.key, item.mod_revision))
                _log.error("unreadable_record", reason=str(error))
            return False
        eviction.info, eviction.lease, eviction.fenced = record.info, record.lease, record.fenced
        eviction.stands = True
        return True

    def _write(self, puts: Sequence[Put], deletes: Sequence[str], pins: Sequence[Compare] = ()) -> None:
        """As `Election.guarded_write`, in this term alone."""
        guard = self._guard()
        if guard.revision != self._owner_revision:
            raise NotLeaderError("another term has begun")
        self._guarded_write(puts, deletes, [*pins, guard])

    def _set(self, capture: CaptureID, eviction: _Eviction) -> None:
        with self._lock:
            self._evictions[capture] = eviction

    def _forget(self, capture: CaptureID) -> None:
        with self._lock:
            del self._evictions[capture]


def _is_known_fenced(capture: CaptureID, snapshots: Sequence[Snapshot | None]) -> bool:
    """Whether the sink of every changefeed would refuse what the capture still writes. A changefeed that has no scheduler now (it
    is paused, or its source was not reached yet) has not heard what the capture's executor of it is."""
    return all(
        snapshot is not None and capture not in snapshot.unfenced and any(view.id == capture for view in snapshot.captures)
        for snapshot in snapshots
    )
