"""The streams without a server: what they hand on when queues are full and connections break at the worst moment."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterable, Sequence

import pytest

from processor.postgres.readers.catch_up import CatchUpStream
from processor.postgres.readers.shared_stream import SharedStream
from processor.postgres.readers.stream import (
    GATHER_FRAMES,
    GATHER_MAX_S,
    ChangeStream,
    StreamContext,
    StreamTable,
    gather_pause_s,
)
from processor.postgres.source.pgoutput import FRAME_HEADER
from processor.postgres.source.replication import StreamLostError
from processor.postgres.tables.queues import Budget, TableQueue
from tablewire.errors import OperatingError
from tablewire.model.ids import TS_MAX, Ts
from tests.processor.postgres.replication_kit import wait_until


def frame(body: bytes) -> bytes:
    return b"w" + struct.pack(">QQq", 0, 0, 0) + body


def relation(number: int) -> bytes:
    name = b"t%d\0" % number
    return frame(
        b"R" + struct.pack(">I", number) + b"public\0" + name + b"f" + struct.pack(">H", 1) + b"\1id\0" + b"\0\0\0\x17" * 2
    )


def transaction(commit_ts: Ts, end_ts: Ts, sizes: dict[int, int]) -> list[bytes]:
    """Return one insert of the given number of bytes into each of these tables."""
    rows = [frame(b"I" + struct.pack(">I", n) + b"N\0\1b" + struct.pack(">I", size) + bytes(size)) for n, size in sizes.items()]
    begin = frame(b"B" + struct.pack(">QqI", commit_ts, 0, 1))
    return [begin, *rows, frame(b"C" + struct.pack(">BQQq", 0, commit_ts, end_ts, 0))]


class Connection:
    """Gives these frames; confirm fails when the test sets it."""

    def __init__(self, frames: Iterable[bytes], is_lost_at_confirm: bool = False) -> None:
        self.frames = list(frames)
        self.is_lost_at_confirm = is_lost_at_confirm
        self.warning = ""

    def get_copy_data(self, _: int) -> tuple[int, memoryview]:
        if not self.frames:
            return 0, memoryview(b"")
        return len(self.frames[0]), memoryview(self.frames.pop(0))

    def confirm(self, _: Ts) -> None:
        if self.is_lost_at_confirm:
            raise StreamLostError("the network is cut")

    def raise_warnings(self) -> None:
        if self.warning:
            raise OperatingError(self.warning)

    def interrupt(self) -> None:
        return


class Table:
    def __init__(self, table_id: int, queue: TableQueue, is_writing: bool) -> None:
        self.table_id = table_id
        self.queue = queue
        self.needs_solo = False
        self.needs_text = False
        if is_writing:
            queue.open_for_writing()

    def notify(self) -> None:
        return

    def fail(self, error: Exception) -> None:
        raise error


def refuse(purpose: str) -> Connection:
    raise StreamLostError(purpose)


def read(stream: ChangeStream, connection: Connection) -> None:
    stream._connection = connection  # type: ignore[assignment]
    while connection.frames:
        stream._read_turn(connection)  # type: ignore[arg-type]


def context(budget: Budget, queue_max_bytes: int) -> StreamContext:
    return StreamContext(refuse, "p", 0, True, 15.0, queue_max_bytes, budget, lambda _: None, lambda: "own")  # type: ignore[arg-type]


def shared_stream(budget: Budget, queue_max_bytes: int, tables: Sequence[Table]) -> SharedStream:
    stream = SharedStream(context(budget, queue_max_bytes))
    stream.position = 100
    for table in tables:
        stream.attach(table)
    stream._duties()
    return stream


def commits(queue: TableQueue) -> list[Ts]:
    """Takes and confirms everything: the commits it held, in order."""
    found: list[Ts] = []
    while (batch := queue.take(TS_MAX, 1 << 20)) is not None:
        found += [part.transaction.commit_ts for part in batch.parts]
        queue.confirm(batch)
    return found


def meanwhile(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_emptied_queue_reads_the_transaction_in_delivery_again() -> None:
    """A queue that is emptied in the middle of a delivery had got that transaction: it must not count as done there."""
    budget = Budget(10_000)
    idle = Table(1, TableQueue(8_000, budget, 100), False)
    busy = Table(2, TableQueue(8_000, budget, 100), True)
    stream = shared_stream(budget, 8_000, [idle, busy])

    def write() -> None:
        wait_until(lambda: idle.queue.overflows, "the idle queue is emptied", 5.0)
        commits(busy.queue)

    writer = meanwhile(write)
    first = transaction(110, 120, {1: 4500, 2: 4000})
    read(stream, Connection([relation(1), relation(2), *first, *transaction(130, 140, {1: 2500, 2: 10})]))
    writer.join()
    assert stream.position == 140
    idle.queue.start_at(120)  # what its former writer had done
    assert not idle.queue.is_covered
    assert idle.queue.idle_position(stream.position) == 120


@pytest.mark.parametrize("kind", ["shared", "catch-up"])
def test_connection_lost_between_two_tables_doubles_nothing(kind: str) -> None:
    """The first table has the transaction, the second waits for room when the stream breaks: it is given only once to each."""
    budget = Budget(1 << 30)
    first = Table(1, TableQueue(1 << 20, budget, 100), True)
    second = Table(2, TableQueue(10_000, budget, 100), True)
    stream: ChangeStream
    if kind == "shared":
        stream = shared_stream(budget, 10_000, [first, second])
    else:
        for table in (first, second):
            table.queue.attach_streamed(1_000)

        def ended(stream: CatchUpStream, slow: Sequence[StreamTable]) -> None:
            return

        stream = CatchUpStream(context(budget, 10_000), [first, second], False, ended)
    again = transaction(130, 140, {1: 4, 2: 4000})
    relations = [relation(1), relation(2)]
    before = transaction(110, 120, {2: 8000 if kind == "shared" else 4000})
    with pytest.raises(StreamLostError):
        read(stream, Connection([*relations, *before, *again], is_lost_at_confirm=True))
    stream._reset()
    taken = commits(second.queue)
    read(stream, Connection([*relations, *again]))
    assert commits(first.queue) == [130]
    assert taken + commits(second.queue) == [110, 130]
    assert stream.position == 140


def test_new_queue_of_a_table_gets_what_the_old_one_got() -> None:
    """A table that leaves and comes back while the stream is broken has not seen the transaction that comes again."""
    budget = Budget(1 << 30)
    first = Table(1, TableQueue(1 << 20, budget, 100), True)
    second = Table(2, TableQueue(5_000, budget, 100), True)
    stream = shared_stream(budget, 5_000, [first, second])
    again = transaction(130, 140, {1: 4, 2: 4000})
    relations = [relation(1), relation(2)]
    with pytest.raises(StreamLostError):
        read(stream, Connection([*relations, *transaction(110, 120, {2: 4000}), *again], is_lost_at_confirm=True))
    stream._reset()
    returned = Table(1, TableQueue(1 << 20, budget, 120), True)
    stream.detach(first)
    stream.attach(returned)
    stream._duties()
    commits(second.queue)
    read(stream, Connection([*relations, *again]))
    assert commits(returned.queue) == [130]


def test_catch_up_ends_for_a_writer_whose_gap_was_given_up() -> None:
    """Its queue takes nothing from this stream: only when the stream lets go of it can another one begin."""
    budget = Budget(1 << 30)
    table = Table(1, TableQueue(5_000, budget, 100), True)
    table.queue.attach_streamed(1_000)

    def ended(stream: CatchUpStream, slow: Sequence[StreamTable]) -> None:
        return

    stream = CatchUpStream(context(budget, 5_000), [table], False, ended)
    assert stream._duties()
    table.queue.close_catch_up()
    assert not stream._duties()


def test_wide_transaction_stays_within_the_budget() -> None:
    """Many tables, none of them large: the largest are given up, and read again by streams of their own."""
    budget = Budget(16 << 20)
    tables = [Table(number, TableQueue(8 << 20, budget, 100), True) for number in range(1, 33)]
    stream = shared_stream(budget, 8 << 20, tables)
    sizes = {table.table_id: (1 << 20) + table.table_id for table in tables}
    read(stream, Connection([*map(relation, sizes), *transaction(130, 140, sizes)]))
    assert budget.held_bytes <= 16 << 20
    given_up = [table for table in tables if not table.queue.is_covered]
    kept = [table for table in tables if table.queue.is_covered]
    assert given_up
    assert kept
    assert all(table.queue.streamed_floor == 140 and not commits(table.queue) for table in given_up)
    assert all(commits(table.queue) == [130] for table in kept)


def test_position_stays_when_the_source_warned() -> None:
    """The warning may come with the frames themselves: nothing behind it counts as read."""
    budget = Budget(1 << 30)
    table = Table(1, TableQueue(1 << 20, budget, 100), True)
    stream = shared_stream(budget, 1 << 20, [table])
    connection = Connection([relation(1), *transaction(130, 140, {1: 4})])
    connection.warning = "a publication was skipped"
    with pytest.raises(OperatingError, match="skipped"):
        read(stream, connection)
    assert stream.position == 100
    assert not commits(table.queue)


@pytest.mark.parametrize(
    ("frames", "lag_us", "pause_s"),
    [
        (1, 0, 0.0),
        (1, -5_000_000, 0.0),
        (1, 9_000, 0.0),
        (1, 10_000, 0.000_2),
        (GATHER_FRAMES - 1, 3_600_000_000, GATHER_MAX_S),
        (GATHER_FRAMES, 3_600_000_000, 0.0),
        (0, 3_600_000_000, 0.0),
    ],
)
def test_only_a_stream_that_is_behind_lets_changes_gather(frames: int, lag_us: int, pause_s: float) -> None:
    """For a fiftieth of its lag and half a millisecond at most; never after a turn that found many, or before the first."""
    assert gather_pause_s(frames, lag_us) == pytest.approx(pause_s)


def test_a_stream_knows_how_far_the_source_is_behind() -> None:
    """By the clock of the source: from each begin, until a keepalive says that there is nothing more."""
    queue = TableQueue(1 << 20, Budget(1 << 30), 100)
    stream = shared_stream(Budget(1 << 30), 1 << 20, [Table(1, queue, True)])
    begin, *rest = transaction(110, 120, {1: 4})
    sent_us = 70_000
    late = b"w" + struct.pack(">QQq", 0, 0, sent_us) + begin[FRAME_HEADER:]
    read(stream, Connection([relation(1), late, *rest]))
    assert stream._lag_us == sent_us
    read(stream, Connection([b"k" + struct.pack(">QqB", 130, sent_us, 0)]))
    assert stream._lag_us == 0
