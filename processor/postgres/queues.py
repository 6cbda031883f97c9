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

from processor.postgres.wire import Part
from tablewire.model.ids import TS_MAX, Ts

BACKLOG_US = 1_000_000
"""Changes that the source sends so long after their commit are worked off in large batches: nobody waits for the single one."""


class Budget:
    """Bytes that all queues of one executor hold together."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self._bytes += size

    @property
    def held_bytes(self) -> int:
        return self._bytes

    @property
    def is_exhausted(self) -> bool:
        return self._bytes > self.max_bytes


@dataclass(frozen=True, slots=True)
class ChangeBatch:
    """Parts taken from one lane in order; end_ts: of the last whole transaction, 0 when the parts are the beginning of one."""

    parts: Sequence[Part]
    size: int
    end_ts: Ts
    is_whole: bool
    generation: int
    from_catch_up: bool


class TableQueue:
    """See the module. is_writing: a sink writer takes from it, and may."""

    def __init__(self, max_bytes: int, budget: Budget, cursor: Ts) -> None:
        self.cursor: Ts = cursor
        self.streamed_floor: Ts | None = None
        self.catch_up_position: Ts = 0
        self.catch_up_floor: Ts = TS_MAX
        self.is_writing = False
        self.overflows = 0
        self._max_bytes = max_bytes
        self._budget = budget
        self._lock = threading.Lock()
        self._space = threading.Condition(self._lock)
        self._streamed: deque[Part] = deque()
        self._catch_up: deque[Part] = deque()
        self._streamed_bytes = 0
        self._catch_up_bytes = 0
        self._taken_bytes = 0
        self._is_taken = False  # a batch is out, and be it of no bytes: the end of a transaction in pieces may be empty
        self._is_inside = False  # the beginning of a transaction was taken and confirmed, its end was not taken yet
        self._held_up: tuple[Ts, Ts] = (0, 0)
        """commit_ts and end_ts of the transaction that was last found to end behind the barrier."""
        self._streamed_generation = 0
        self._catch_up_generation = 0
        self._is_closed = False

    # --- state, any thread -------------------------------------------------------------------------------------------

    @property
    def held_bytes(self) -> int:
        return self._streamed_bytes + self._catch_up_bytes + self._taken_bytes

    @property
    def is_joined(self) -> bool:
        """The shared stream alone is enough from the cursor on."""
        floor = self.streamed_floor
        return floor is not None and self.cursor >= floor

    @property
    def is_covered(self) -> bool:
        """Live, or live and a gap that was closed or is being filled, hold all behind the cursor."""
        return self.is_joined or self.cursor >= self.catch_up_floor

    @property
    def is_caught_up(self) -> bool:
        """Everything from the cursor to the shared stream's position has been received."""
        floor = self.streamed_floor
        return floor is not None and (
            self.cursor >= floor or (self.cursor >= self.catch_up_floor and self.catch_up_position >= floor)
        )

    def idle_position(self, shared_position: Ts) -> Ts:
        """How far the table is done. shared_position: of the shared stream, read before this call. While nothing is being
        written, the cursor follows the lane up to the first transaction that waits in it."""
        with self._lock:
            if not self._is_taken and not self._is_inside:
                if self.is_joined:
                    done = self._streamed[0].transaction.commit_ts if self._streamed else shared_position
                    self.cursor = max(self.cursor, done)
                elif self.is_covered:
                    done = self._catch_up[0].transaction.commit_ts if self._catch_up else self.catch_up_position
                    self.cursor = max(self.cursor, done)
            return self.cursor

    @property
    def has_next(self) -> bool:
        """Something waits in the lane that the writer takes from."""
        with self._lock:
            return bool(self._streamed) if self.is_joined else bool(self._catch_up)

    def has_backlog(self, enough_bytes: int) -> bool:
        """Whether what waits is little, and was committed long ago: more of it is on its way."""
        with self._lock:
            lane = self._streamed if self.is_joined else self._catch_up
            held = self._streamed_bytes if self.is_joined else self._catch_up_bytes
            return bool(lane) and held < enough_bytes and lane[-1].transaction.lag_us > BACKLOG_US

    # --- streams -----------------------------------------------------------------------------------------------------

    def attach_streamed(self, position: Ts) -> None:
        """The shared stream gives every transaction behind `position` from now on."""
        with self._lock:
            self._clear_streamed(position)

    def detach_streamed(self) -> None:
        """The shared stream is gone: what it gave stays valid, but nothing follows."""
        with self._lock:
            self._clear_streamed(None)

    def push_streamed(self, parts: Sequence[Part], size: int) -> bool:
        """Adds one whole transaction. False = there is no room and a writer is at work: wait, or call drop_streamed."""
        with self._lock:
            if self._is_closed or self.streamed_floor is None:
                return True
            if self._is_full(size, self._streamed_bytes):
                if self.is_writing and self.is_joined:
                    if self._streamed or self._taken_bytes:
                        return False
                else:
                    self._drop_oldest(size)
                    if self._is_full(size, self._streamed_bytes):
                        self._clear_streamed(parts[-1].end_ts)
                        return True
            self._streamed.extend(parts)
            self._streamed_bytes += size
        self._budget.add(size)
        return True

    def drop_streamed(self, end_ts: Ts) -> None:
        """Gives up all that waits up to and including the transaction that ends at end_ts: the table is behind."""
        with self._lock:
            self.overflows += 1
            self._clear_streamed(end_ts)

    def open_catch_up(self, start_ts: Ts) -> None:
        """A catch-up stream gives every transaction behind start_ts, which is at or before the cursor."""
        with self._lock:
            self._clear_catch_up()
            self.catch_up_floor = start_ts
            self.catch_up_position = start_ts

    def push_catch_up(self, parts: Sequence[Part], size: int) -> bool:
        """Adds a transaction, or the next part of one. False = no room: wait, or close_catch_up. A table that nobody writes gives
        its gap up instead (is_covered turns False)."""
        with self._lock:
            if self._is_closed or self.catch_up_floor == TS_MAX:
                return True
            if parts[-1].transaction.commit_ts < self.cursor:
                return True
            if self._is_full(size, self._catch_up_bytes) and (self._catch_up or self._taken_bytes or not self.is_writing):
                if self.is_writing:
                    return False
                self.overflows += 1
                self._clear_catch_up()
                return True
            self._catch_up.extend(parts)
            self._catch_up_bytes += size
            self._space.notify_all()
        self._budget.add(size)
        return True

    def move_catch_up(self, position: Ts) -> None:
        """Everything at or before `position` has been pushed into the gap."""
        if self.catch_up_floor != TS_MAX:
            self.catch_up_position = max(self.catch_up_position, position)

    def cut_catch_up(self) -> None:
        """The stream broke inside a transaction whose beginning was pushed: its parts are taken out again."""
        with self._lock:
            self._catch_up_generation += 1
            while self._catch_up and not self._catch_up[-1].is_last:
                part = self._catch_up.pop()
                self._catch_up_bytes -= part.size
                self._budget.add(-part.size)

    def close_catch_up(self) -> None:
        """The catch-up stream is gone and the gap was not closed: what it gave is dropped."""
        with self._lock:
            self._clear_catch_up()

    def wait_for_space(self, timeout_s: float) -> None:
        """Until something was taken, at most timeout_s."""
        with self._lock:
            self._space.wait(timeout_s)

    def wait_for_parts(self, timeout_s: float) -> None:
        """Until something was pushed into the gap, at most timeout_s."""
        with self._lock:
            if not self._catch_up:
                self._space.wait(timeout_s)

    # --- the writer --------------------------------------------------------------------------------------------------

    def take(self, barrier_ts: Ts, max_bytes: int, continuing: ChangeBatch | None = None) -> ChangeBatch | None:
        """The next transactions that end at or before barrier_ts, whole ones up to about max_bytes, or the next parts of one that
        is larger than the queue. None = nothing to write now. The batch must be confirmed or given back before the next take.
        continuing: the beginning of a transaction that is still open at the sink; what follows comes from the same lane."""
        with self._lock:
            if continuing is None:
                self._is_inside = False
                self._skip_written()
                self._advance_over_catch_up()
            elif not self.is_current(continuing):
                return None
            from_catch_up = not self.is_joined if continuing is None else continuing.from_catch_up
            lane = self._catch_up if from_catch_up else self._streamed
            parts: list[Part] = []
            size, whole, whole_size = 0, 0, 0
            while lane and size < max_bytes:
                part = lane[0]
                commit_ts = part.transaction.commit_ts
                if commit_ts < self.cursor:
                    self._release(lane.popleft(), from_catch_up)
                    continue
                if self._ends_behind(part, barrier_ts):
                    break
                size += part.size
                parts.append(lane.popleft())
                while not parts[-1].is_last and lane and not self._ends_behind(lane[0], barrier_ts):
                    size += lane[0].size
                    parts.append(lane.popleft())
                if parts[-1].is_last:
                    whole, whole_size = len(parts), size
                elif lane:
                    break  # it has begun before the barrier, and ends behind it: not to be begun, or not to be gone on with
            if parts and not whole and lane:
                lane.extendleft(reversed(parts))
                parts = []
            if not parts:
                if lane:
                    self.is_writing = False  # behind its barrier: no stream may wait for it
                return None
            if whole and whole < len(parts):
                lane.extendleft(reversed(parts[whole:]))
                parts, size = parts[:whole], whole_size
            if from_catch_up:
                self._catch_up_bytes -= size
            else:
                self._streamed_bytes -= size
            self._taken_bytes = size
            self._is_taken = True
            generation = self._catch_up_generation if from_catch_up else self._streamed_generation
            return ChangeBatch(parts, size, parts[-1].end_ts, bool(whole), generation, from_catch_up)

    def confirm(self, batch: ChangeBatch, is_written: bool = True) -> None:
        """The batch is durable (is_written), or it is a part of a transaction that is still open at the sink."""
        with self._lock:
            if is_written:
                self.cursor = max(self.cursor, batch.end_ts)
            self._is_inside = not is_written
            self._taken_bytes = 0
            self._is_taken = False
            self._space.notify_all()
        self._budget.add(-batch.size)

    def give_back(self, batch: ChangeBatch) -> None:
        """The batch was not written. It is taken again, unless its lane was dropped since: then it will be read again."""
        with self._lock:
            self._taken_bytes = 0
            self._is_taken = False
            generation = self._catch_up_generation if batch.from_catch_up else self._streamed_generation
            if generation == batch.generation and not self._is_closed:
                if batch.from_catch_up:
                    self._catch_up.extendleft(reversed(batch.parts))
                    self._catch_up_bytes += batch.size
                else:
                    self._streamed.extendleft(reversed(batch.parts))
                    self._streamed_bytes += batch.size
                return
            self._space.notify_all()
        self._budget.add(-batch.size)

    def lose_transaction(self) -> None:
        """What is in the gap does not follow on the cursor (the beginning of a transaction was rolled back): it is given up."""
        with self._lock:
            self._is_inside = False
            self.overflows += 1
            self._clear_catch_up()

    def skip_to(self, position: Ts) -> None:
        """What ends at or before position is at the sink already: it is not taken (again)."""
        with self._lock:
            self.cursor = max(self.cursor, position)
            self._advance_over_catch_up()

    def is_current(self, batch: ChangeBatch) -> bool:
        """Whether the lane that the batch came from still goes on behind it."""
        return batch.generation == (self._catch_up_generation if batch.from_catch_up else self._streamed_generation)

    def start_at(self, cursor: Ts) -> None:
        """The writer starts behind `cursor`; a gap that does not reach back to it is dropped."""
        with self._lock:
            self.cursor = cursor
            if cursor < self.catch_up_floor:
                self._clear_catch_up()
            self._advance_over_catch_up()

    def close(self) -> None:
        """Drops everything; later pushes are ignored."""
        with self._lock:
            self._is_closed = True
            self._clear_streamed(None)
            self._clear_catch_up()

    # --- inside the lock ---------------------------------------------------------------------------------------------

    def _ends_behind(self, part: Part, barrier_ts: Ts) -> bool:
        """Whether the part's transaction ends behind the barrier, as far as that is known: only the last pieces of a large one
        tell its end. It is remembered, so that the transaction is not begun again when it is read again."""
        commit_ts = part.transaction.commit_ts
        end_ts = part.end_ts
        if not end_ts and self._held_up[0] == commit_ts:
            end_ts = self._held_up[1]
        if end_ts > barrier_ts:
            self._held_up = (commit_ts, end_ts)
        return commit_ts >= barrier_ts or end_ts > barrier_ts

    def _is_full(self, size: int, lane_bytes: int) -> bool:
        """Whether a lane that holds lane_bytes has no room for more; with a gap open, each lane has half of the queue."""
        max_bytes = self._max_bytes if self.catch_up_floor == TS_MAX else self._max_bytes // 2
        return lane_bytes + self._taken_bytes + size > max_bytes or self._budget.is_exhausted

    def _skip_written(self) -> None:
        """A gap that holds nothing behind the cursor is as good as empty: only then can it be left."""
        while self._catch_up and self._catch_up[0].transaction.commit_ts < self.cursor:
            self._release(self._catch_up.popleft(), from_catch_up=True)

    def _advance_over_catch_up(self) -> None:
        floor = self.streamed_floor
        if floor is None or self.cursor >= floor:
            if self.catch_up_floor != TS_MAX:
                self._clear_catch_up()
        elif self._is_inside:
            return  # the rest of the transaction comes from the gap, or nowhere
        elif self.cursor >= self.catch_up_floor and not self._catch_up and not self._is_taken and self.catch_up_position >= floor:
            self.cursor = max(self.cursor, self.catch_up_position)
            self._clear_catch_up()

    def _drop_oldest(self, size: int) -> None:
        self.overflows += 1
        dropped = 0
        while self._streamed and self._is_full(size, self._streamed_bytes):
            part = self._streamed.popleft()
            self._streamed_bytes -= part.size
            self._budget.add(-part.size)
            dropped = part.end_ts
            while self._streamed and self._streamed[0].end_ts == dropped:
                part = self._streamed.popleft()
                self._streamed_bytes -= part.size
                self._budget.add(-part.size)
        if dropped:
            self._streamed_generation += 1
            self.streamed_floor = dropped

    def _release(self, part: Part, from_catch_up: bool) -> None:
        if from_catch_up:
            self._catch_up_bytes -= part.size
        else:
            self._streamed_bytes -= part.size
        self._budget.add(-part.size)

    def _clear_streamed(self, floor: Ts | None) -> None:
        self._budget.add(-self._streamed_bytes)
        self._streamed.clear()
        self._streamed_bytes = 0
        self._streamed_generation += 1
        self.streamed_floor = floor
        self._space.notify_all()

    def _clear_catch_up(self) -> None:
        self._budget.add(-self._catch_up_bytes)
        self._catch_up.clear()
        self._catch_up_bytes = 0
        self._catch_up_generation += 1
        self.catch_up_floor = TS_MAX
        self.catch_up_position = 0
        self._space.notify_all()
