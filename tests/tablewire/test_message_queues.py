"""The queues at both ends of an Exchange: what waits for the next batch, and in which order it leaves."""

from __future__ import annotations

import numpy as np

from tablewire.errors import CodecError
from tablewire.model.ids import ChangefeedID
from tablewire.model.messages import DispatchTableRequest, Heartbeat, Message, MessageBody
from tablewire.model.progress import Barrier
from tablewire.model.spans import SpanBlock
from tablewire.model.states import DispatchAction
from tablewire.runtime.message_queues import Outbox

BUSY, QUIET = ChangefeedID("default", "busy"), ChangefeedID("default", "quiet")


class SmallBatch:
    """A builder with room for a fixed number of messages."""

    def __init__(self, room: int) -> None:
        self.room, self.taken = room, list[tuple[str, int]]()

    def add(self, message: Message) -> bool:
        if message.number < 0:
            raise CodecError("cannot be sent")
        if len(self.taken) == self.room:
            return False
        self.taken.append((message.changefeed.id, message.number))
        return True


def message(changefeed: ChangefeedID, body: MessageBody, number: int, revision: int = 1) -> Message:
    return Message("owner", "a", changefeed, revision, 1, 0, number, 0, body)


def dispatch() -> DispatchTableRequest:
    one = np.ones(1, np.uint64)
    return DispatchTableRequest(
        np.ones(1, np.uint32), SpanBlock(np.ones(1, np.int64)), np.array([DispatchAction.REMOVE], np.uint8), one, one, one
    )


def fill(outbox: Outbox, room: int, revision: int = 1) -> list[tuple[str, int]]:
    batch = SmallBatch(room)
    outbox.fill(batch, revision)  # type: ignore[arg-type]
    return batch.taken


def test_a_replaced_heartbeat_is_not_kept_back_by_a_busy_changefeed() -> None:
    """One message fits into a batch; in each tick one changefeed dispatches and another one replaces its heartbeat."""
    outbox, sent = Outbox(64, 2**20), list[tuple[str, int]]()
    for tick in range(1, 21):
        outbox.put([message(BUSY, dispatch(), tick), message(QUIET, Heartbeat(Barrier(5)), tick)])
        sent += fill(outbox, 1)
    assert sum(changefeed == "quiet" for changefeed, _ in sent) >= 9
    assert sum(changefeed == "busy" for changefeed, _ in sent) >= 9
    for name in ("busy", "quiet"):
        numbers = [number for changefeed, number in sent if changefeed == name]
        assert numbers == sorted(numbers)


def test_changefeeds_take_turns_and_keep_their_own_order() -> None:
    """A burst of one changefeed leaves room in the batch for the others; a heartbeat stays behind older dispatches."""
    outbox = Outbox(64, 2**20)
    outbox.put([message(BUSY, dispatch(), number) for number in (1, 2, 3)])
    outbox.put([message(BUSY, Heartbeat(Barrier(5)), 4), message(QUIET, dispatch(), 1), message(QUIET, dispatch(), 2)])
    assert fill(outbox, 3) == [("busy", 1), ("quiet", 1), ("busy", 2)]
    assert fill(outbox, 9) == [("busy", 3), ("quiet", 2), ("busy", 4)]
    assert len(outbox) == 0


def test_only_messages_of_the_revision_are_sent() -> None:
    """Older messages are dropped, newer ones stay, and one that cannot be sent does not cost the others their place."""
    outbox = Outbox(64, 2**20)
    outbox.put([message(BUSY, dispatch(), number, revision) for number, revision in ((1, 1), (2, 2), (-3, 2), (4, 3))])
    assert fill(outbox, 9, revision=2) == [("busy", 2)]
    assert fill(outbox, 9, revision=3) == [("busy", 4)]
    assert len(outbox) == 0
