"""The queues at both ends of an Exchange: an Outbox of what waits for the next batch, and a Transport for each changefeed.

The owner has an Outbox for each processor (`owner.exchange`), a processor has one for its owner (`processor.service`). Both
ends route what arrives to the Transports of their Schedulers or Agents. Every queue is bounded for each sender and changefeed,
and keeps the newest messages: the protocol restates what was dropped.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeAlias

from tablewire.errors import ClosedError, CodecError
from tablewire.model.ids import ChangefeedID
from tablewire.model.messages import Heartbeat, HeartbeatResponse, Message
from tablewire.runtime.fair_queue import BoundedFairQueue, Entry
from tablewire.wire.bodies import rows_of
from tablewire.wire.codec import BatchBuilder

MAX_INBOX_MESSAGES: Final = 1_024
"""From one sender to one changefeed. A report in chunks must fit whole, or it would never arrive whole."""
MAX_INBOX_ROWS: Final = 2**22

Run: TypeAlias = tuple[ChangefeedID, int]
"""A changefeed and its epoch."""


class Outbox:
    """Messages that wait for the next batch to one receiver. Any thread.

    Of the heartbeats of one changefeed only the newest waits, and so of its heartbeat responses; of its other messages the newest
    `max_messages` with at most `max_rows` rows.
    """

    def __init__(self, max_messages: int, max_rows: int) -> None:
        self._queue: BoundedFairQueue[Message] = BoundedFairQueue(max_messages, max_rows)
        self._lock = threading.Lock()
        self._fill_lock = threading.Lock()
        self._batches = 0
        self._served: dict[ChangefeedID, int] = {}  # the last batch that took a message of the changefeed
        self.accepted = 0
        """How many messages were put in."""
        self.dropped = 0
        """How many messages were pushed out by newer ones; replaced heartbeats do not count."""

    def __len__(self) -> int:
        with self._lock:
            return len(self._queue)

    def put(self, messages: Iterable[Message]) -> None:
        with self._lock:
            for message in messages:
                is_heartbeat = isinstance(message.body, Heartbeat | HeartbeatResponse)
                key = (is_heartbeat, message.changefeed, message.changefeed_epoch)
                pushed_out = self._queue.put(key, message, rows_of(message), max_items=1 if is_heartbeat else None)
                self.accepted += 1
                self.dropped += 0 if is_heartbeat else pushed_out

    def fill(self, builder: BatchBuilder, owner_revision: int) -> list[tuple[Message, CodecError]]:
        """Move messages of this owner_revision into a batch until it is full.

        Those of one changefeed go in their order; changefeeds take turns, so that a busy one does not delay the others.
        Messages of an older revision are dropped, those of a newer one stay. Return the messages that can never be sent, with
        the reason; they are dropped as well.
        """
        unsendable: list[tuple[Message, CodecError]] = []
        done = []
        with self._fill_lock:  # two handlers that answer at a time must not send a message twice
            self._batches += 1
            with self._lock:
                entries = self._queue.entries()
            for entry in self._in_turns(entries):  # encoding takes time: not under the lock that `put` needs
                if entry.item.owner_revision > owner_revision:
                    continue
                try:
                    if entry.item.owner_revision == owner_revision and not builder.add(entry.item):
                        break
                except CodecError as error:
                    unsendable.append((entry.item, error))
                done.append(entry)
                self._served[entry.item.changefeed] = self._batches
            with self._lock:
                self._queue.remove(done)
        return unsendable

    def _in_turns(self, entries: Sequence[Entry[Message]]) -> list[Entry[Message]]:
        """Order entries: the first of each changefeed, then the second of each; the changefeed served longest ago leads."""
        turns: Counter[ChangefeedID] = Counter()

        def turn(entry: Entry[Message]) -> tuple[int, int]:
            changefeed = entry.item.changefeed
            turns[changefeed] += 1
            return turns[changefeed], self._served.get(changefeed, 0)

        return sorted(entries, key=turn)

    def forget(self, changefeed: ChangefeedID, changefeed_epoch: int) -> None:
        """Drop what is queued for this run of the changefeed."""
        with self._lock:
            self._served.pop(changefeed, None)
            self._queue.remove_keys(lambda key: key[1:] == (changefeed, changefeed_epoch))  # type: ignore[index]

    def clear(self) -> None:
        with self._lock:
            self._queue.take_all()


class ChangefeedTransport:
    """The Transport of one run of a changefeed at one end of the Exchange. Any thread; nothing blocks."""

    def __init__(
        self, run: Run, send: Callable[[Sequence[Message]], None], forget: Callable[[ChangefeedTransport], None]
    ) -> None:
        self.run = run
        self._send, self._forget = send, forget
        self._lock = threading.Lock()
        self._inbox: BoundedFairQueue[Message] = BoundedFairQueue(MAX_INBOX_MESSAGES, MAX_INBOX_ROWS)
        self._closed = False
        self.dropped = 0
        """How many messages were pushed out of the inbox by newer ones of the same sender."""

    def send(self, messages: Sequence[Message]) -> None:
        if self._closed:
            raise ClosedError(f"the transport of {self.run[0]} is closed")
        self._send(messages)

    def recv(self) -> Sequence[Message]:
        with self._lock:
            return self._inbox.take_all()

    def close(self) -> None:
        """Drop what is queued in both directions. Idempotent."""
        if not self._closed:
            self._closed = True
            self._forget(self)
            self.recv()

    def deliver(self, message: Message) -> None:
        with self._lock:
            self.dropped += self._inbox.put(message.sender, message, rows_of(message))


class ChangefeedTransports:
    """The open Transports at one end of the Exchange, by run. Any thread.

    send: takes what a Transport sends. forget(changefeed, epoch): drops what is queued for a run whose Transport was closed.
    """

    def __init__(self, send: Callable[[Sequence[Message]], None], forget: Callable[[ChangefeedID, int], None]) -> None:
        self._send, self._forget = send, forget
        self._lock = threading.Lock()
        self._open: dict[Run, ChangefeedTransport] = {}

    def open(self, changefeed: ChangefeedID, changefeed_epoch: int) -> ChangefeedTransport:
        """Return a new Transport with an empty inbox; an older one of the same run is closed first."""
        run = (changefeed, changefeed_epoch)
        older = self._open.get(run)
        if older is not None:
            older.close()
        opened = ChangefeedTransport(run, self._send, self._closed)
        with self._lock:
            self._open[run] = opened
        return opened

    def deliver(self, messages: Iterable[Message]) -> list[Message]:
        """Put messages into the inboxes of their runs and return those that had one."""
        delivered = []
        with self._lock:
            for message in messages:
                transport = self._open.get((message.changefeed, message.changefeed_epoch))
                if transport is not None:
                    transport.deliver(message)
                    delivered.append(message)
        return delivered

    def _closed(self, transport: ChangefeedTransport) -> None:
        with self._lock:
            if self._open.get(transport.run) is transport:
                del self._open[transport.run]
        self._forget(*transport.run)
