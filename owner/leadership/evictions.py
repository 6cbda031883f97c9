"""Evictions: captures that do not answer although their leases are alive lose their registration,
so that others take over.

The invariant, whichever owner leads: **a capture that is not known to be fenced counts as dead only
TTL + margin after an owner has revoked its lease.** It has not been seen to stop, and its sink would not
refuse its writes; but it stops by itself when its last keep-alive is a TTL old, and there is none
after the revocation. Until then it is reported as alive, so that no other capture is promoted.

So the transaction that deletes the key of the capture writes an eviction record, and whichever
owner leads continues it:

    requested   held; it is not known yet whether the transaction was applied
    recorded    /tablewire/<cluster>/evicted/<capture_id> = EvictionRecord: the lease has to be revoked
    revoked     held for TTL + margin from here on, by this owner's clock; not at all if the capture is known to be fenced
    over        the record is deleted

A term starts with `load`, before it schedules anything. It cannot know whether or when an earlier
owner revoked a lease, so it revokes it again and holds the capture for the whole time. Every write
is guarded by the revision of the term: a thread that remains from an earlier term of this process
must not evict a capture that the new term counts as alive.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from owner.events.history import History
from owner.owner_config import OwnerConfig
from owner.scheduling.snapshot import Snapshot
from tablewire.errors import ConflictError, EtcdError, NotLeaderError
from tablewire.etcd import keys as etcd_keys
from tablewire.etcd.guarded_write import GuardedWrite
from tablewire.etcd.record_reader import RecordReader
from tablewire.etcd.records import EvictionRecord, encode, now
from tablewire.etcd.session import EtcdSession
from tablewire.etcd.values import Compare, KeyValue, Put, is_absent, is_unchanged
from tablewire.model.ids import CaptureID, CaptureInfo
from tablewire.model.states import CaptureState

_UNHEARD = (CaptureState.SILENT, CaptureState.UNINITIALIZED)  # the latter: never heard in this term

_log = structlog.get_logger("owner.evictions")


@dataclass(slots=True)
class _Eviction:
    """An eviction that is not over. record: None if it is unreadable. recorded: it is in etcd.
    until_s: until when the capture may still write; inf until its lease was revoked."""

    info: CaptureInfo
    record: EvictionRecord | None = None
    silent_s: float = 0.0
    recorded: bool = False
    until_s: float = math.inf

    @property
    def fenced(self) -> bool:
        return self.record is not None and self.record.fenced


class Evictions:
    """The evictions of one term. load: before its first tick; step: the thread "store" (both may
    block on etcd); with_held: the tick's thread."""

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
        """guard: `Election.guard`. clock: seconds, the clock of `with_held`."""
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
        self._evictions: Mapping[CaptureID, _Eviction] = {}  # replaced as a whole: read by the tick's thread
        self._reader = RecordReader(lambda reason: _log.error("unreadable_record", reason=reason))

    def load(self) -> None:
        """Take over the evictions of earlier owners. EtcdError: nothing was loaded, try again."""
        items, _ = self._session.get_prefix(etcd_keys.evicted_prefix(self._cluster))
        for item in items:
            capture = etcd_keys.evicted_of(self._cluster, item.key)
            if capture is None:
                continue
            eviction = _Eviction(CaptureInfo(capture, ""))
            self._read(eviction, item)
            self._evictions = {**self._evictions, capture: eviction}
            _log.info("eviction_taken_over", capture=capture, fenced=eviction.fenced)

    def with_held(self, captures: Mapping[CaptureID, CaptureInfo], now_s: float) -> Mapping[CaptureID, CaptureInfo]:
        """Return these captures, and those that were evicted and may still write."""
        held = {id: one.info for id, one in self._evictions.items() if not one.fenced and one.until_s > now_s}
        return {**held, **captures} if held else captures

    def step(
        self,
        captures: Mapping[CaptureID, CaptureInfo],
        registered: Mapping[CaptureID, KeyValue],
        snapshots: Sequence[Snapshot | None],
    ) -> None:
        """Evict the captures that are due, and continue each eviction. NotLeaderError is raised at
        once, the first EtcdError after all were tried.

        captures: those that count as alive; registered: their keys. snapshots: of every changefeed;
        None: it has no scheduler.
        """
        failures: list[EtcdError] = []
        for capture, silent_s in self._due(captures, snapshots):
            if (info := captures.get(capture)) is None or (key := registered.get(capture)) is None:
                continue
            try:
                self._evict(info, key, silent_s, fenced=_is_known_fenced(capture, snapshots))
            except EtcdError as error:
                failures.append(error)
        for capture, eviction in sorted(self._evictions.items()):
            try:
                self._continue(capture, eviction, capture in registered)
            except EtcdError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    # -- which captures are due

    def _due(
        self, captures: Mapping[CaptureID, CaptureInfo], snapshots: Sequence[Snapshot | None]
    ) -> list[tuple[CaptureID, float]]:
        """Return the captures that have been silent to all schedulers for too long, with the
        seconds. Return none while no capture answers at all: then the fault is more likely ours."""
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

    def _evict(self, info: CaptureInfo, key: KeyValue, silent_s: float, *, fenced: bool) -> None:
        """Delete the capture's key, and with it its permission to write. key: as last seen; if it
        has changed, nothing happens. The capture is held from before its key is deleted, so that no
        tick in between counts it as dead."""
        previous = self._evictions.get(info.id)
        if previous is not None and previous.recorded:
            return  # the watch has not delivered the deletion of the key yet
        record = EvictionRecord(
            id=info.id,
            address=info.address,
            version=info.version,
            labels=dict(info.labels),
            lease=key.lease,
            fenced=fenced,
            requested_at=now(),
        )
        eviction = _Eviction(info, record, silent_s)
        self._evictions = {**self._evictions, info.id: eviction}
        place = etcd_keys.evicted_key(self._cluster, info.id)
        try:
            self._write([Put(place, encode(record))], [key.key], [is_unchanged(key.key, key.mod_revision), is_absent(place)])
        except ConflictError:
            return  # it was changed or deleted in the meantime: `_continue` finds out
        self._report(eviction)

    def _continue(self, capture: CaptureID, eviction: _Eviction, is_registered: bool) -> None:
        """Continue an eviction as far as possible now; see the module's docstring."""
        place = etcd_keys.evicted_key(self._cluster, capture)
        if not eviction.recorded:
            if is_registered:
                return  # the write was not applied, or not yet; it is repeated while the capture is silent
            found = self._session.get(place)
            if found is None:
                self._forget(capture)  # the key was deleted by something else
                return
            if not self._read(eviction, found):
                return
            if eviction.silent_s:
                self._report(eviction)
        if eviction.until_s == math.inf:
            if eviction.record is not None and eviction.record.lease:
                self._session.revoke(eviction.record.lease)
            eviction.until_s = self._clock() + (0.0 if eviction.fenced else self._hold_s)
        if eviction.until_s <= self._clock():
            self._write([], [place])
            self._forget(capture)

    def _report(self, eviction: _Eviction) -> None:
        """Report the eviction: our transaction is known to be applied."""
        eviction.recorded = True
        capture, silent_s = eviction.info.id, eviction.silent_s
        _log.error("capture_evicted", capture=capture, silent_ms=round(silent_s * 1000))
        self._history.add("capture_evicted", subject=capture, why=f"silent for {silent_s:.1f} s although its lease is alive")

    def _read(self, eviction: _Eviction, item: KeyValue) -> bool:
        """Fill the eviction from its record; return False if that is unreadable. Then the lease is
        not known, and the capture is held until an operator deletes the record."""
        record = self._reader.read(EvictionRecord, item)
        if record is None:
            return False
        eviction.info, eviction.record, eviction.recorded = record.info, record, True
        return True

    def _write(self, puts: Sequence[Put], deletes: Sequence[str], pins: Sequence[Compare] = ()) -> None:
        """Write as `Election.guarded_write` does, but in this term only."""
        guard = self._guard()
        if guard.revision != self._owner_revision:
            raise NotLeaderError("another term has begun")
        self._guarded_write(puts, deletes, [*pins, guard])

    def _forget(self, capture: CaptureID) -> None:
        self._evictions = {id: one for id, one in self._evictions.items() if id != capture}


def _is_known_fenced(capture: CaptureID, snapshots: Sequence[Snapshot | None]) -> bool:
    """Return whether the sink of every changefeed would refuse writes of the capture. A changefeed
    without a scheduler (it is paused, or its source was not reached yet) does not know whether its
    executor is fenced."""
    return all(
        snapshot is not None and capture not in snapshot.unfenced and any(view.id == capture for view in snapshot.captures)
        for snapshot in snapshots
    )
