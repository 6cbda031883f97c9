"""What happened in the cluster, kept in etcd: a bounded number of events, the oldest of which go.

Anybody in a term may `note` one, on any thread and without waiting; the thread "store" writes them, each batch in one write that
is guarded by the leadership. Readers see what stands in etcd, and can wait for more. What happens in bulk is counted and told
in one event, so that the number of events does not grow with the tables.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import structlog

from tablewire.errors import ClosedError, ConflictError, EtcdError, NotLeaderError, OperatingError
from tablewire.etcd import keys as etcd_keys
from tablewire.etcd.guarded_write import GuardedWrite
from tablewire.etcd.records import EventRecord, decode, encode, now
from tablewire.etcd.session import EtcdSession, Put, is_absent, is_unchanged
from tablewire.runtime.uris import redact_uri

PENDING_MAX = 1_000
BATCH_MAX = 30
"""etcd takes 128 operations in one write: so many new ones, and as many that go."""
STORE_ATTEMPTS = 3
TEXT_LENGTH_MAX = 500
QUIET_S = 2.0
"""Counts are told when nothing was added for so long ..."""
COUNTING_S_MAX = 30.0
"""... or after so long."""

_log = structlog.get_logger("owner.history")


@dataclass(frozen=True, slots=True)
class Event:
    """One that stands in etcd. record: None when it cannot be read."""

    sequence: int
    revision: int
    record: EventRecord | None


@dataclass(slots=True)
class _Counting:
    """What is being counted for one changefeed. since_s, last_s: when the first and the last was added."""

    since_s: float
    last_s: float
    counts: Counter[str]


class History:
    """One term's view of the events. note, count, events_after, wait_after: any thread. flush: may block on etcd."""

    def __init__(
        self,
        session: EtcdSession,
        cluster: str,
        write: GuardedWrite,
        owner_id: str,
        owner_revision: int,
        events_max: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session = session
        self._cluster = cluster
        self._write = write
        self._owner_id = owner_id
        self._owner_revision = owner_revision
        self._events_max = events_max
        self._clock = clock
        self._pending: deque[EventRecord] = deque()
        self._dropped = 0
        self._counting: dict[str, _Counting] = {}
        self._events: tuple[Event, ...] | None = None
        self._is_loaded = False
        self._changed = threading.Condition()
        """Of everything above."""
        self._flushing = threading.Lock()

    # -- any thread ---------------------------------------------------------------------------------------------------

    def note(
        self, kind: str, *, changefeed: str = "", subject: str = "", text: str = "", why: str = "", by: str = "", job: str = ""
    ) -> None:
        """Remembers an event until it is stored. When too many wait for that, the oldest are dropped, and that is told."""
        record = EventRecord(
            at=now(),
            kind=kind,
            owner=self._owner_id,
            owner_revision=self._owner_revision,
            changefeed=changefeed,
            subject=_clean(subject),
            text=_clean(text),
            why=_clean(why),
            by=_clean(by),
            job=job,
        )
        with self._changed:
            self._pending.append(record)
            if len(self._pending) > PENDING_MAX:
                self._pending.popleft()
                self._dropped += 1

    def tell(self, kind: str, **fields: str) -> None:
        """`note`, and a line in the log, for what has none of its own."""
        _log.info(kind, **{name: _clean(value) for name, value in fields.items() if value})
        self.note(kind, **fields)

    def count(self, changefeed: str, counts: Mapping[str, int]) -> None:
        """Adds to what is told as one event when it is over. counts: spans that came to a place, by why."""
        now_s = self._clock()
        with self._changed:
            counting = self._counting.setdefault(changefeed, _Counting(now_s, now_s, Counter()))
            counting.last_s = now_s
            counting.counts.update(counts)

    def events_after(self, sequence: int) -> Sequence[Event] | None:
        """Those that stand in etcd with a higher sequence, oldest first; None while they have not been read yet."""
        events = self._events
        return None if events is None else tuple(event for event in events if event.sequence > sequence)

    def wait_after(self, sequence: int, timeout_s: float) -> bool:
        """Waits until there is one with a higher sequence; False when timeout_s are over before."""

        def is_there() -> bool:
            events = self._events
            return events is not None and len(events) > 0 and events[-1].sequence > sequence

        with self._changed:
            return self._changed.wait_for(is_there, timeout_s)

    # -- the thread "store" -------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Stores what was noted; reads what is there the first time. NotLeaderError, EtcdError, ConflictError: try it later."""
        with self._flushing:
            if not self._is_loaded:
                self._load()
            self._tell_counts()
            for _ in range(3 + PENDING_MAX // BATCH_MAX):
                with self._changed:
                    batch = list(islice(self._pending, BATCH_MAX))
                if batch:
                    self._store(batch)
                elif not self._tell_dropped():
                    return

    def flush_last(self) -> None:
        """At the end of a term that ends as it was asked to: what cannot be stored now is lost."""
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
                events.append(Event(sequence, item.mod_revision, _read(item.key, item.value)))
        self._publish(sorted(events, key=lambda event: event.sequence))
        self._is_loaded = True

    def _store(self, batch: Sequence[EventRecord]) -> None:
        for _ in range(STORE_ATTEMPTS):
            events = self._events or ()
            known = [event.record for event in events[-BATCH_MAX:]]
            new = [record for record in batch if record not in known]  # an unanswered write may have stored them
            first = events[-1].sequence + 1 if events else 1
            puts = [Put(etcd_keys.event_key(self._cluster, first + at), encode(record)) for at, record in enumerate(new)]
            old = events[: min(BATCH_MAX, max(0, len(events) + len(new) - self._events_max))]
            olds = [etcd_keys.event_key(self._cluster, event.sequence) for event in old]
            pins = [is_absent(put.key) for put in puts]
            pins += [is_unchanged(key, event.revision) for key, event in zip(olds, old, strict=True)]
            try:
                revision = self._write(puts, olds, pins) if puts else 0
            except ConflictError:
                self._load()
                continue
            except EtcdError:
                self._is_loaded = False  # nobody knows what is there: read it again first
                raise
            stored = [Event(first + at, revision, record) for at, record in enumerate(new)]
            with self._changed:
                self._drop_pending(batch)
            self._publish([*events[len(old) if puts else 0 :], *stored])
            return
        raise ConflictError("the events are being changed by others")

    def _drop_pending(self, batch: Sequence[EventRecord]) -> None:
        """Those of the batch that are still waiting: the oldest may have been dropped meanwhile."""
        done = {id(record) for record in batch}
        while self._pending and id(self._pending[0]) in done:
            self._pending.popleft()

    def _publish(self, events: Sequence[Event]) -> None:
        with self._changed:
            self._events = tuple(events)
            self._changed.notify_all()

    def _tell_counts(self) -> None:
        now_s = self._clock()
        with self._changed:
            over = [
                changefeed
                for changefeed, counting in self._counting.items()
                if now_s - counting.last_s >= QUIET_S or now_s - counting.since_s >= COUNTING_S_MAX
            ]
            told = [(changefeed, self._counting.pop(changefeed)) for changefeed in over]
        for changefeed, counting in told:
            spans = sum(counting.counts.values())
            why = ", ".join(f"{why} {count}" for why, count in counting.counts.most_common())
            self.note(
                "spans_placed", changefeed=changefeed, text=f"{spans} spans began to replicate where they were placed", why=why
            )

    def _tell_dropped(self) -> bool:
        with self._changed:
            dropped, self._dropped = self._dropped, 0
        if dropped:
            self.note("events_dropped", text=f"{dropped} events were not stored", why="etcd did not take them in time")
        return dropped > 0


def _clean(text: str) -> str:
    """Without secrets, on one line, bounded."""
    plain = " ".join(redact_uri(text).split())
    return plain if len(plain) <= TEXT_LENGTH_MAX else f"{plain[: TEXT_LENGTH_MAX - 4]} ..."


def _read(key: str, value: bytes) -> EventRecord | None:
    try:
        return decode(EventRecord, key, value)
    except OperatingError as error:
        _log.warning("unreadable_event", reason=str(error))
        return None
