"""TableQueue: the changes of one table between the streams that read them and the one writer that takes them.

Two lanes, each a run of source transactions in commit order:
 - **streamed**, filled by the processor's shared stream: every transaction of the table in
   (streamed_floor, position of the stream];
 - **catch-up**, filled by a catch-up stream: those in (catch_up_floor, catch_up_position].

cursor: everything at or before it has been written, or was before the start. The writer takes from
the streamed lane as soon as cursor >= streamed_floor, and before that from the catch-up lane. With
catch_up_position >= streamed_floor the catch-up is complete: once its lane is empty, the cursor
jumps to catch_up_position. **Invariant: `take` returns the first transaction of the table after the
cursor, or nothing.**

Bounded in bytes. A lane without a writer never makes a stream wait: the streamed lane drops its
oldest transactions and raises streamed_floor, the catch-up lane is given up; the table must then be
read again from its cursor. Any thread, under the queue's lock; streams may block in `wait_for_space`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from processor.postgres.source.pgoutput import Part
from tablewire.model.ids import TS_MAX, Ts

BACKLOG_US = 1_000_000
"""Changes that the source sends this long after their commit are written in large batches, as their latency does not matter."""


class Budget:
    """Bytes that all queues of one executor hold together."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self.held_bytes += size

    @property
    def is_exhausted(self) -> bool:
        return self.held_bytes > self.max_bytes


class _Lane:
    """A run of parts in commit order. generation: increases when parts are dropped, so that a batch cannot be given back."""

    def __init__(self, budget: Budget) -> None:
        self.parts: deque[Part] = deque()
        self.size = 0
        self.generation = 0
        self._budget = budget

    def push(self, parts: Sequence[Part], size: int) -> None:
        self.parts.extend(parts)
        self.size += size
        self._budget.add(size)

    def drop(self, part: Part) -> None:
        """Account for a part that was removed and will not be written."""
        self.size -= part.size
        self._budget.add(-part.size)

    def drop_written(self, cursor: Ts) -> None:
        while self.parts and self.parts[0].transaction.commit_ts < cursor:
            self.drop(self.parts.popleft())

    def clear(self) -> None:
        self._budget.add(-self.size)
        self.parts.clear()
        self.size = 0
        self.generation += 1


@dataclass(frozen=True, slots=True)
class ChangeBatch:
    """Parts taken from one lane in order. end_ts: of the last whole transaction, 0 if the parts are the beginning of one."""

    parts: Sequence[Part]
    size: int
    end_ts: Ts
    is_whole: bool
    lane: _Lane
    generation: int

    @property
    def is_current(self) -> bool:
        """Whether the lane still continues after this batch."""
        return self.generation == self.lane.generation


class TableQueue:
    """See the module. It is either open for a writer, or paused: then no stream waits for it."""

    def __init__(self, max_bytes: int, budget: Budget, cursor: Ts) -> None:
        self._cursor: Ts = cursor
        self._streamed_floor: Ts | None = None
        self._catch_up_position: Ts = 0
        self._catch_up_floor: Ts = TS_MAX
        self._is_catch_up_over = False
        self._is_open = False
        self._overflows = 0
        self._max_bytes = max_bytes
        self._budget = budget
        self._lock = threading.Lock()
        self._space = threading.Condition(self._lock)
        self._streamed = _Lane(budget)
        self._catch_up = _Lane(budget)
        self._taken_bytes = 0
        self._is_taken = False  # a batch is taken, even one of no bytes: the last piece of a transaction may be empty
        self._is_inside = False  # the beginning of a transaction was taken and confirmed, its end was not taken yet
        self._held_up: tuple[Ts, Ts] = (0, 0)
        """commit_ts and end_ts of the transaction that was last found to end after the barrier."""
        self._is_closed = False

    # --- state, any thread -------------------------------------------------------------------------------------------

    @property
    def cursor(self) -> Ts:
        """Everything at or before it has been written, or was before the start."""
        return self._cursor

    @property
    def received_position(self) -> Ts:
        """Up to where a catch-up stream has read, or the writer has written."""
        return max(self._catch_up_position, self._cursor)

    @property
    def overflows(self) -> int:
        """How often something was dropped that must be read again."""
        return self._overflows

    @property
    def is_open(self) -> bool:
        """A sink writer takes from it, and may write."""
        return self._is_open

    @property
    def streamed_floor(self) -> Ts | None:
        """From where on the shared stream delivers to it; None: it does not yet."""
        return self._streamed_floor

    @property
    def held_bytes(self) -> int:
        return self._streamed.size + self._catch_up.size + self._taken_bytes

    @property
    def is_joined(self) -> bool:
        """The shared stream alone is sufficient from the cursor on."""
        return self._streamed_floor is not None and self._cursor >= self._streamed_floor

    @property
    def is_covered(self) -> bool:
        """The lanes hold everything after the cursor, or a catch-up stream is filling in what is missing."""
        return self.is_joined or self._cursor >= self._catch_up_floor

    @property
    def is_caught_up(self) -> bool:
        """Everything from the cursor to the shared stream's position has been received."""
        floor = self._streamed_floor
        if floor is None:
            return False
        return self._cursor >= floor or (self._cursor >= self._catch_up_floor and self._catch_up_position >= floor)

    def idle_position(self, shared_position: Ts) -> Ts:
        """Return up to where everything is written. shared_position: of the shared stream, read before this call.

        While nothing is being written, the cursor advances to the first transaction that waits.
        """
        with self._lock:
            if not self._is_taken and not self._is_inside and self.is_covered:
                end = shared_position if self.is_joined else self._catch_up_position
                self._cursor = max(self._cursor, self._lane.parts[0].transaction.commit_ts if self._lane.parts else end)
            return self._cursor

    @property
    def has_next(self) -> bool:
        with self._lock:
            return bool(self._lane.parts)

    def has_backlog(self, enough_bytes: int) -> bool:
        """Return whether less than enough_bytes wait, and were committed long ago, so that more will follow soon."""
        with self._lock:
            lane = self._lane
            return bool(lane.parts) and lane.size < enough_bytes and lane.parts[-1].transaction.lag_us > BACKLOG_US

    # --- streams -----------------------------------------------------------------------------------------------------

    def attach_streamed(self, position: Ts) -> None:
        """Expect every transaction after `position` from the shared stream."""
        with self._lock:
            self._clear_streamed(position)

    def push_streamed(self, parts: Sequence[Part], size: int) -> bool:
        """Add one whole transaction. False: there is no room and a writer is working; wait, or call drop_streamed."""
        with self._lock:
            if self._is_closed or self._streamed_floor is None:
                return True
            if self._is_full(size, self._streamed):
                if self._is_open and self.is_joined:
                    if self._streamed.parts or self._taken_bytes:
                        return False
                else:
                    self._drop_oldest(size)
                    if self._is_full(size, self._streamed):
                        self._clear_streamed(parts[-1].end_ts)
                        return True
            self._streamed.push(parts, size)
            return True

    def drop_streamed(self, end_ts: Ts) -> None:
        """Drop everything up to the transaction that ends at end_ts; it must be read again."""
        with self._lock:
            self._overflows += 1
            self._clear_streamed(end_ts)

    def open_catch_up(self, start_ts: Ts) -> None:
        """Expect every transaction after start_ts, which is at or before the cursor, from a catch-up stream."""
        with self._lock:
            self._clear_catch_up()
            self._catch_up_floor = self._catch_up_position = start_ts
            self._is_catch_up_over = False

    def push_catch_up(self, parts: Sequence[Part], size: int) -> bool:
        """Add a transaction, or the next part of one. False: there is no room; wait, or call close_catch_up.

        A table without a writer gives its catch-up lane up instead (is_covered becomes False).
        """
        with self._lock:
            if self._is_closed or self._catch_up_floor == TS_MAX or parts[-1].transaction.commit_ts < self._cursor:
                return True
            if self._is_full(size, self._catch_up) and (self._catch_up.parts or self._taken_bytes or not self._is_open):
                if self._is_open:
                    return False
                self._overflows += 1
                self._clear_catch_up()
                return True
            self._catch_up.push(parts, size)
            self._space.notify_all()
            return True

    def move_catch_up(self, position: Ts) -> None:
        """Record that everything at or before `position` has been pushed by the catch-up stream."""
        if self._catch_up_floor != TS_MAX:
            self._catch_up_position = max(self._catch_up_position, position)

    def end_catch_up(self) -> None:
        """Record that no stream fills the catch-up lane: it is dropped when it does not reach the streamed lane."""
        with self._lock:
            self._is_catch_up_over = True
            self._drop_short_catch_up()

    def cut_catch_up(self) -> None:
        """Remove the parts of an incomplete transaction: the stream broke inside it."""
        with self._lock:
            lane = self._catch_up
            lane.generation += 1
            while lane.parts and not lane.parts[-1].is_last:
                lane.drop(lane.parts.pop())

    def close_catch_up(self) -> None:
        """Drop what the catch-up stream has pushed: it ended before it reached the shared stream."""
        with self._lock:
            self._clear_catch_up()

    def wait_for_space(self, timeout_s: float) -> None:
        """Wait until something was taken, for at most timeout_s."""
        with self._lock:
            self._space.wait(timeout_s)

    def wait_for_parts(self, timeout_s: float) -> None:
        """Wait until something was pushed into the catch-up lane, for at most timeout_s."""
        with self._lock:
            if not self._catch_up.parts:
                self._space.wait(timeout_s)

    # --- the writer --------------------------------------------------------------------------------------------------

    def open_for_writing(self) -> None:
        """Begin, or continue, to have a writer: streams may wait for it."""
        self._is_open = True

    def pause_writing(self) -> None:
        """Have no stream wait for the writer: it stops, or does something else first."""
        self._is_open = False

    def take(self, barrier_ts: Ts, max_bytes: int, continuing: ChangeBatch | None = None) -> ChangeBatch | None:
        """Return the next transactions that end at or before barrier_ts: whole ones up to about max_bytes, or the next parts of
        one that is larger than the queue; None if there is nothing to write now. A transaction whose rows may have another
        shape begins a new batch.

        The batch must be confirmed or given back before the next call. continuing: the beginning of a
        transaction that is still open at the sink; its continuation comes from the same lane.
        """
        with self._lock:
            if continuing is None:
                self._is_inside = False
                self._catch_up.drop_written(self._cursor)
                self._advance_over_catch_up()
            elif not continuing.is_current:
                return None
            lane = self._lane if continuing is None else continuing.lane
            lane.drop_written(self._cursor)
            parts, is_whole = self._next_parts(lane, barrier_ts, max_bytes)
            if not parts:
                if lane.parts:
                    self._is_open = False  # it waits for its barrier: no stream may wait for it
                return None
            for _ in parts:
                lane.parts.popleft()
            size = sum(part.size for part in parts)
            lane.size -= size
            self._taken_bytes = size
            self._is_taken = True
            return ChangeBatch(parts, size, parts[-1].end_ts, is_whole, lane, lane.generation)

    def confirm(self, batch: ChangeBatch, is_written: bool = True) -> None:
        """Release the batch: it is durable (is_written), or a part of a transaction that is still open at the sink."""
        with self._lock:
            if is_written:
                self._cursor = max(self._cursor, batch.end_ts)
            self._is_inside = not is_written
            self._taken_bytes = 0
            self._is_taken = False
            self._space.notify_all()
        self._budget.add(-batch.size)

    def give_back(self, batch: ChangeBatch) -> None:
        """Put back a batch that was not written, unless its lane was dropped meanwhile and must be read again."""
        with self._lock:
            self._taken_bytes = 0
            self._is_taken = False
            if batch.is_current and not self._is_closed:
                batch.lane.parts.extendleft(reversed(batch.parts))
                batch.lane.size += batch.size
                return
            self._space.notify_all()
        self._budget.add(-batch.size)

    def lose_transaction(self) -> None:
        """Give the catch-up lane up, as it does not follow the cursor: the beginning of a transaction was rolled back."""
        with self._lock:
            self._is_inside = False
            self._overflows += 1
            self._clear_catch_up()

    def skip_to(self, position: Ts) -> None:
        """Skip what ends at or before position, as the sink has it already."""
        with self._lock:
            self._cursor = max(self._cursor, position)
            self._advance_over_catch_up()

    def start_at(self, cursor: Ts) -> None:
        """Start the writer after `cursor`; drop a catch-up lane that begins later."""
        with self._lock:
            self._cursor = cursor
            if cursor < self._catch_up_floor:
                self._clear_catch_up()
            self._advance_over_catch_up()

    def close(self) -> None:
        """Take and keep nothing from here on."""
        with self._lock:
            self._is_closed = True
            self._is_open = False
            self._clear_streamed(None)
            self._clear_catch_up()

    # --- inside the lock ---------------------------------------------------------------------------------------------

    @property
    def _lane(self) -> _Lane:
        return self._streamed if self.is_joined else self._catch_up

    def _next_parts(self, lane: _Lane, barrier_ts: Ts, max_bytes: int) -> tuple[list[Part], bool]:
        parts: list[Part] = []
        whole = size = 0
        for part in lane.parts:
            is_enough = size >= max_bytes or (bool(parts) and part.relation is not parts[-1].relation)
            if (is_enough and whole == len(parts)) or self._ends_after(part, barrier_ts):
                break
            parts.append(part)
            size += part.size
            if part.is_last:
                whole = len(parts)
        if whole:
            return parts[:whole], True
        # A transaction whose next part ends after the barrier is neither begun nor continued.
        return ([], False) if len(parts) < len(lane.parts) else (parts, False)

    def _ends_after(self, part: Part, barrier_ts: Ts) -> bool:
        """Return whether the part's transaction ends after the barrier, as far as is known.

        Only the last pieces of a large transaction contain its end. The end is remembered, so that the
        transaction is not begun again when it is read again.
        """
        commit_ts = part.transaction.commit_ts
        end_ts = part.end_ts
        if not end_ts and self._held_up[0] == commit_ts:
            end_ts = self._held_up[1]
        if end_ts > barrier_ts:
            self._held_up = (commit_ts, end_ts)
        return commit_ts >= barrier_ts or end_ts > barrier_ts

    def _is_full(self, size: int, lane: _Lane) -> bool:
        """Return whether the lane has no room for `size`; while a table catches up, each lane has half of the queue."""
        max_bytes = self._max_bytes if self._catch_up_floor == TS_MAX else self._max_bytes // 2
        return lane.size + self._taken_bytes + size > max_bytes or self._budget.is_exhausted

    def _advance_over_catch_up(self) -> None:
        """Leave the catch-up lane if it is empty and complete."""
        if self._streamed_floor is None or self.is_joined:
            if self._catch_up_floor != TS_MAX:
                self._clear_catch_up()
        elif self._is_inside:
            return  # the rest of the transaction is only in the catch-up lane
        elif self.is_caught_up and not self._catch_up.parts and not self._is_taken:
            self._cursor = max(self._cursor, self._catch_up_position)
            self._clear_catch_up()

    def _drop_oldest(self, size: int) -> None:
        self._overflows += 1
        lane = self._streamed
        while lane.parts and self._is_full(size, lane):
            self._streamed_floor = lane.parts[0].end_ts
            while lane.parts and lane.parts[0].end_ts == self._streamed_floor:
                lane.drop(lane.parts.popleft())
            lane.generation += 1
        self._drop_short_catch_up()

    def _clear_streamed(self, floor: Ts | None) -> None:
        self._streamed.clear()
        self._streamed_floor = floor
        self._space.notify_all()
        self._drop_short_catch_up()

    def _drop_short_catch_up(self) -> None:
        if self._is_catch_up_over and self._catch_up_floor != TS_MAX and not self.is_caught_up:
            self._clear_catch_up()

    def _clear_catch_up(self) -> None:
        self._catch_up.clear()
        self._catch_up_floor = TS_MAX
        self._catch_up_position = 0
        self._space.notify_all()
