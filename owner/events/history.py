"""The history of events in etcd: a bounded number, of which the oldest are deleted.

Any thread of a term may add an event without waiting. The thread "store" writes them in batches, each in one transaction
guarded by leadership. Readers see the events that etcd holds, and can wait for more.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import structlog

from tablewire.errors import ClosedError, ConflictError, EtcdError, NotLeaderError, OperatingError
from tablewire.etcd import keys as etcd_keys
from tablewire.etcd.guarded_write import GuardedWrite
from tablewire.etcd.records import EventRecord, decode, encode, now
from tablewire.etcd.session import EtcdSession
from tablewire.etcd.values import Put, is_absent, is_unchanged
from tablewire.runtime.text import plural
from tablewire.runtime.uris import redact_uri

PENDING_MAX = 1_000
BATCH_MAX = 30
"""etcd allows 128 operations in a transaction; a batch takes up to four for each event: put, delete and their compares."""
STORE_ATTEMPTS = 3
TEXT_LENGTH_MAX = 500

_log = structlog.get_logger("owner.history")


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event in etcd. record: None when it cannot be read."""

    sequence: int
    revision: int
    record: EventRecord | None


class History:
    """The history in one term. `flush` may block on etcd; any thread may call everything else."""

    def __init__(
        self,
        session: EtcdSession,
        cluster: str,
        write: GuardedWrite,
        owner_id: str,
        owner_revision: int,
        events_max: int,
    ) -> None:
        self._session = session
        self._cluster = cluster
        self._write = write
        self._owner_id = owner_id
        self._owner_revision = owner_revision
        self._events_max = events_max
        self._flushing = threading.Lock()
        self._is_loaded = False  # guarded by _flushing
        self._changed = threading.Condition()  # guards the fields below
        self._pending: deque[EventRecord] = deque()
        self._dropped = 0
        self._events: tuple[StoredEvent, ...] | None = None

    # -- any thread ---------------------------------------------------------------------------------------------------

    def add(self, kind: str, **fields: str) -> None:
        """Keep an event until it is stored. fields: of EventRecord. If too many wait, the oldest are
        dropped, which is an event of its own."""
        cleaned: dict[str, Any] = {name: _clean(value) for name, value in fields.items()}
        record = EventRecord(at=now(), kind=kind, owner=self._owner_id, owner_revision=self._owner_revision, **cleaned)
        with self._changed:
            self._pending.append(record)
            if len(self._pending) > PENDING_MAX:
                self._pending.popleft()
                self._dropped += 1

    def add_and_log(self, kind: str, **fields: str) -> None:
        """Add an event that has no other line in the log."""
        _log.info(kind, **{name: _clean(value) for name, value in fields.items() if value})
        self.add(kind, **fields)

    def events_after(self, sequence: int) -> Sequence[StoredEvent] | None:
        """Return the stored events with a higher sequence, oldest first; None before the first `flush`."""
        events = self._events
        return None if events is None else tuple(event for event in events if event.sequence > sequence)

    def wait_after(self, sequence: int, timeout_s: float) -> bool:
        """Wait until there is an event with a higher sequence; False after timeout_s."""

        def is_there() -> bool:
            return bool(self._events) and self._events[-1].sequence > sequence  # type: ignore[index]

        with self._changed:
            return self._changed.wait_for(is_there, timeout_s)

    # -- the thread "store" -------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Store what was added; the first call also reads what etcd holds. NotLeaderError, EtcdError,
        ConflictError: try again later."""
        with self._flushing:
            if not self._is_loaded:
                self._load()
            for _ in range(3 + PENDING_MAX // BATCH_MAX):
                with self._changed:
                    batch = list(islice(self._pending, BATCH_MAX))
                if batch:
                    self._store(batch)
                elif not self._add_dropped():
                    return

    def flush_last(self) -> None:
        """Flush at the end of a term; what cannot be stored now is lost."""
        try:
            self.flush()
        except (NotLeaderError, EtcdError, ConflictError, ClosedError) as error:
            _log.warning("events_not_stored", events=len(self._pending), reason=str(error))

    def _load(self) -> None:
        items, _ = self._session.get_prefix(etcd_keys.events_prefix(self._cluster))
        events = []
        for item in items:
            sequence = etcd_keys.event_sequence_of(self._cluster, item.key)
            if sequence is not None:
                events.append(StoredEvent(sequence, item.mod_revision, _read(item.key, item.value)))
        self._publish(sorted(events, key=lambda event: event.sequence))
        self._is_loaded = True

    def _store(self, batch: Sequence[EventRecord]) -> None:
        for _ in range(STORE_ATTEMPTS):
            events = self._events or ()
            known = [event.record for event in events[-BATCH_MAX:]]
            new = [record for record in batch if record not in known]  # a write whose answer was lost may have stored them
            first = events[-1].sequence + 1 if events else 1
            puts = [Put(etcd_keys.event_key(self._cluster, first + at), encode(record)) for at, record in enumerate(new)]
            old = events[: min(BATCH_MAX, max(0, len(events) + len(new) - self._events_max))]
            old_keys = [etcd_keys.event_key(self._cluster, event.sequence) for event in old]
            compares = [is_absent(put.key) for put in puts]
            compares += [is_unchanged(key, event.revision) for key, event in zip(old_keys, old, strict=True)]
            try:
                revision = self._write(puts, old_keys, compares) if puts else 0
            except ConflictError:
                self._load()
                continue
            except EtcdError:
                self._is_loaded = False  # it is not known what was written
                raise
            with self._changed:
                self._drop_pending(batch)
            stored = [StoredEvent(first + at, revision, record) for at, record in enumerate(new)]
            self._publish([*events[len(old) if puts else 0 :], *stored])
            return
        raise ConflictError("the events are being changed by others")

    def _drop_pending(self, batch: Sequence[EventRecord]) -> None:
        """Drop those of the batch that still wait: the oldest may have been dropped meanwhile."""
        done = {id(record) for record in batch}
        while self._pending and id(self._pending[0]) in done:
            self._pending.popleft()

    def _publish(self, events: Sequence[StoredEvent]) -> None:
        with self._changed:
            self._events = tuple(events)
            self._changed.notify_all()

    def _add_dropped(self) -> bool:
        with self._changed:
            dropped, self._dropped = self._dropped, 0
        if dropped:
            self.add("events_dropped", text=f"{plural(dropped, 'event')} not stored", why="etcd did not take them in time")
        return dropped > 0


def _clean(text: str) -> str:
    """Return the text without secrets, on one line, at most TEXT_LENGTH_MAX long."""
    plain = " ".join(redact_uri(text).split())
    return plain if len(plain) <= TEXT_LENGTH_MAX else f"{plain[: TEXT_LENGTH_MAX - 4]} ..."


def _read(key: str, value: bytes) -> EventRecord | None:
    try:
        return decode(EventRecord, key, value)
    except OperatingError as error:
        _log.warning("unreadable_event", reason=str(error))
        return None
