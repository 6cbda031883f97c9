"""TableQueue without a server: whatever streams and writers do, nothing is skipped, doubled or reordered."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from processor.postgres.source.pgoutput import Part, Relation, Transaction
from processor.postgres.tables.queues import BACKLOG_US, Budget, ChangeBatch, TableQueue
from tablewire.model.ids import TS_MAX, Ts

RELATION = Relation(1, "public", "t", "d", ())
MAX_BYTES = 1000


def parts_at(end_ts: Ts, size: int = 100, pieces: int = 1) -> list[Part]:
    """A transaction whose commit record is the 5 positions before end_ts."""
    transaction = Transaction(end_ts - 5, 0, end_ts)
    return [
        Part(RELATION, [b"%d" % end_ts], size // pieces, transaction, end_ts, number == pieces - 1) for number in range(pieces)
    ]


def new_queue(cursor: Ts = 0, attached: Ts = 0) -> TableQueue:
    queue = TableQueue(MAX_BYTES, Budget(10 * MAX_BYTES), cursor)
    queue.attach_streamed(attached)
    return queue


def taken(queue: TableQueue, barrier_ts: Ts = TS_MAX) -> list[Ts]:
    """Takes and confirms all that there is."""
    found: list[Ts] = []
    while (batch := queue.take(barrier_ts, 300)) is not None:
        found += [part.end_ts for part in batch.parts if part.is_last]
        queue.confirm(batch)
    return found


def test_barrier_is_never_passed() -> None:
    """What ends behind the barrier waits, and streams do not wait for it."""
    queue = new_queue()
    queue.open_for_writing()
    for end_ts in (100, 200, 300):
        assert queue.push_streamed(parts_at(end_ts), 100)
    assert taken(queue, 250) == [100, 200]
    assert not queue.is_open
    assert queue.idle_position(300) == 295  # where the commit record of the waiting one starts
    assert taken(queue, 300) == [300]
    assert queue.idle_position(400) == 400


def test_empty_end_of_a_transaction_counts_as_taken() -> None:
    """The last piece of a large transaction may hold no change and so no byte: until it is confirmed, nothing is done."""
    queue = new_queue(cursor=10, attached=900)
    queue.open_for_writing()
    queue.open_catch_up(10)
    end = Part(RELATION, [], 0, Transaction(95, 0, 1), 105, True)
    queue.push_catch_up([piece(95, 0, False)], 100)
    begun = queue.take(TS_MAX, 1000)
    assert begun is not None
    queue.confirm(begun, is_written=False)
    assert queue.idle_position(900) <= 95
    queue.push_catch_up([end], 0)
    queue.move_catch_up(105)
    last = queue.take(TS_MAX, 1000, continuing=begun)
    assert last is not None
    assert queue.idle_position(900) <= 95
    queue.confirm(last)
    assert queue.idle_position(900) == 105


def test_little_of_an_old_backlog_is_behind() -> None:
    """Changes that were sent long after their commit are worth waiting for more, until there is enough; fresh ones never."""
    queue = new_queue()
    assert not queue.has_backlog(150)
    for end_ts, lag_us, has_backlog in ((100, 0, False), (200, BACKLOG_US + 1, True), (300, BACKLOG_US + 1, False)):
        transaction = Transaction(end_ts - 5, 0, end_ts, lag_us)
        assert queue.push_streamed([Part(RELATION, [b"x"], 100, transaction, end_ts, True)], 100)
        assert queue.has_backlog(250) is has_backlog


def piece(commit_ts: Ts, end_ts: Ts, is_last: bool) -> Part:
    """A piece of one large transaction; end_ts: 0 in all but the last delivery."""
    return Part(RELATION, [b"x"], 100, Transaction(commit_ts, 0, 1), end_ts, is_last)


def test_transaction_in_pieces_that_ends_behind_the_barrier_is_not_taken() -> None:
    """Neither when all of it is there, nor when its end comes after its beginning was taken; and it is not begun again."""
    queue = new_queue(cursor=10, attached=900)
    queue.open_for_writing()
    queue.open_catch_up(10)
    first, last = piece(95, 0, False), piece(95, 105, True)
    queue.push_catch_up([first], 100)
    queue.push_catch_up([last], 100)
    assert queue.take(100, 1000) is None  # 95 < barrier < 105
    assert not queue.is_open
    queue.open_for_writing()
    whole = queue.take(105, 1000)
    assert whole is not None
    assert whole.parts == [first, last]
    queue.give_back(whole)
    queue = new_queue(cursor=10, attached=900)
    for attempt in range(2):
        queue.open_for_writing()
        queue.open_catch_up(10)
        queue.push_catch_up([first], 100)
        begun = queue.take(100, 1000)
        if attempt:
            assert begun is None
            break
        assert begun is not None
        assert not begun.is_whole
        queue.confirm(begun, is_written=False)
        queue.push_catch_up([last], 100)
        assert queue.take(100, 1000, continuing=begun) is None
        assert not queue.is_open  # by this the writer knows that nothing will follow
        queue.lose_transaction()


def test_full_queue_of_a_writer_says_so_and_others_lose_their_oldest() -> None:
    """A writer's queue asks the stream to wait; a queue without a reader keeps the newest transactions."""
    queue = new_queue()
    queue.open_for_writing()
    for number in range(1, 11):
        assert queue.push_streamed(parts_at(100 * number), 100)
    assert not queue.push_streamed(parts_at(1100), 100)
    queue.pause_writing()
    assert queue.push_streamed(parts_at(1100), 100)
    assert queue.streamed_floor == 100
    assert not queue.is_covered
    queue.start_at(100)
    assert taken(queue)[0] == 200


def test_gap_is_closed_and_left() -> None:
    """The writer goes through the gap, skips what live has twice, and continues with the streamed changes."""
    queue = new_queue(cursor=100, attached=300)
    queue.open_for_writing()
    queue.open_catch_up(50)
    for end_ts in (400, 500):
        queue.push_streamed(parts_at(end_ts), 100)
    for end_ts in (80, 100, 200, 300, 400):
        queue.push_catch_up(parts_at(end_ts), 100)
        queue.move_catch_up(end_ts)
    assert queue.is_caught_up
    assert taken(queue) == [200, 300, 400, 500]
    assert queue.is_joined


def test_gap_that_opens_after_its_stream_has_ended_is_read_again() -> None:
    """A table without a writer was caught up, so its catch-up stream has ended; then its streamed lane lost its oldest."""
    queue = new_queue(cursor=10, attached=900)
    queue.open_catch_up(10)
    queue.move_catch_up(900)
    queue.end_catch_up()
    assert queue.is_covered
    for end_ts in range(1000, 1000 + 100 * (MAX_BYTES // 100 + 1), 100):
        queue.push_streamed(parts_at(end_ts), 100)
    queue.open_for_writing()
    assert taken(queue) == []
    assert not queue.is_covered


def test_gap_of_what_was_written_before_is_left() -> None:
    """A writer that starts behind all that the gap holds continues with the streamed changes at once, without another push."""
    queue = new_queue(cursor=100, attached=300)
    queue.open_catch_up(100)
    for end_ts in (200, 290):
        queue.push_catch_up(parts_at(end_ts), 100)
    queue.move_catch_up(300)
    queue.push_streamed(parts_at(500), 100)
    queue.start_at(290)
    queue.open_for_writing()
    assert taken(queue) == [500]


def test_empty_gap_moves_the_cursor() -> None:
    """A gap without transactions of the table is closed by the stream's position alone."""
    queue = new_queue(cursor=100, attached=300)
    queue.open_catch_up(100)
    queue.move_catch_up(250)
    assert not queue.is_caught_up
    queue.move_catch_up(310)
    assert queue.is_caught_up
    assert queue.idle_position(900) >= 310
    assert queue.is_joined


def test_batch_of_a_dropped_lane_is_not_taken_again() -> None:
    """A batch that comes back after its lane was dropped is read again by a stream, not from here."""
    queue = new_queue()
    queue.open_for_writing()
    queue.push_streamed(parts_at(100), 100)
    batch = queue.take(TS_MAX, 300)
    assert batch is not None
    queue.drop_streamed(200)
    queue.give_back(batch)
    assert queue.take(TS_MAX, 300) is None
    assert not queue.is_covered
    assert queue.held_bytes == 0


def set_open(queue: TableQueue, is_open: bool) -> None:
    if is_open:
        queue.open_for_writing()
    else:
        queue.pause_writing()


actions = st.lists(
    st.tuples(
        st.sampled_from(["push", "push", "push", "take", "confirm", "give back", "drop", "gap", "gap push", "gap push", "stop"]),
        st.integers(1, 400),
    ),
    max_size=120,
)


@settings(max_examples=300, deadline=None)
@given(actions, st.booleans())
def test_nothing_is_skipped_doubled_or_reordered(steps: list[tuple[str, int]], is_writing: bool) -> None:
    """A source with one transaction every 100 positions; the written ones are always a prefix of it."""
    budget = Budget(3 * MAX_BYTES)
    queue = TableQueue(MAX_BYTES, budget, 0)
    queue.attach_streamed(0)
    set_open(queue, is_writing)
    live_end, gap_end = 0, TS_MAX
    written: list[Ts] = []
    batch: ChangeBatch | None = None
    for action, size in steps:
        if action == "push":
            if queue.push_streamed(parts_at(live_end + 100, size, 2), size // 2 * 2):
                live_end += 100
        elif action == "take" and batch is None:
            batch = queue.take(TS_MAX, 500)
            set_open(queue, is_writing)
        elif action == "confirm" and batch is not None:
            written += [part.end_ts for part in batch.parts if part.is_last]
            queue.confirm(batch)
            batch = None
        elif action == "give back" and batch is not None:
            queue.give_back(batch)
            batch = None
        elif action == "drop":
            queue.drop_streamed(live_end)
        elif action == "gap" and batch is None and not queue.is_covered:
            gap_end = queue.cursor // 100 * 100
            queue.open_catch_up(gap_end)
        elif action == "gap push" and gap_end < live_end:
            if queue.push_catch_up(parts_at(gap_end + 100, size), size):
                gap_end += 100
                queue.move_catch_up(gap_end)
        elif action == "stop":
            position = queue.idle_position(live_end)
            assert position <= live_end
            assert all(end_ts in written for end_ts in range(100, position + 1, 100))
        assert written == list(range(100, 100 * len(written) + 1, 100))
        assert budget.held_bytes == queue.held_bytes
    # Whatever has happened: with the gap filled, everything arrives without another push.
    if batch is not None:
        written += [part.end_ts for part in batch.parts if part.is_last]
        queue.confirm(batch)
    queue.open_for_writing()
    for _ in range(1000):
        if not queue.is_covered:
            gap_end = queue.cursor // 100 * 100
            queue.open_catch_up(gap_end)
        found = taken(queue)
        written += found
        if not found and queue.is_joined:
            break
        if gap_end < live_end and queue.push_catch_up(parts_at(gap_end + 100), 100):
            gap_end += 100
            queue.move_catch_up(gap_end)
    assert written == list(range(100, live_end + 1, 100))
    assert budget.held_bytes == queue.held_bytes == 0
