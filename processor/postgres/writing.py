"""Writes one batch of a table's queue in one transaction at the sink."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from processor.postgres.queues import ChangeBatch, TableQueue
from processor.postgres.sinks import SinkTransaction, SinkUnavailableError
from tablewire.model.ids import Ts


@dataclass(frozen=True, slots=True)
class Written:
    """What is durable now: rows, their bytes in the queue, and the end of the last transaction."""

    rows: int
    size: int
    end_ts: Ts


def write_batch(
    queue: TableQueue,
    transaction: SinkTransaction,
    batch: ChangeBatch,
    take_following: Callable[[ChangeBatch], ChangeBatch | None],
) -> Written:
    """Applies the batch, commits, and confirms it in the queue. A batch that is only the beginning of a source transaction is
    followed to its end (take_following waits for it). On any error the sink's transaction is rolled back, what can be taken again
    is given back, and what cannot is read again from the cursor."""
    rows = 0
    size = batch.size
    held: ChangeBatch | None = batch
    is_split = False
    try:
        rows += transaction.apply(batch.parts, batch.is_whole)
        while not batch.is_whole:
            queue.confirm(batch, is_written=False)
            held, is_split = None, True
            following = take_following(batch)
            if following is None:
                raise SinkUnavailableError("the stream ended inside a transaction")
            batch = held = following
            size += batch.size
            rows += transaction.apply(batch.parts, batch.is_whole)
        transaction.commit()
    except BaseException:
        if held is not None:
            queue.give_back(held)
        if is_split:
            queue.lose_transaction()
        transaction.rollback()
        raise
    queue.confirm(batch)
    return Written(rows, size, batch.end_ts)
