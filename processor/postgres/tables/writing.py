"""Writes a batch of a table's queue in one transaction at the sink."""

from __future__ import annotations

from collections.abc import Callable

from processor.postgres.sinks import SinkTransaction, SinkUnavailableError
from processor.postgres.tables.queues import ChangeBatch, TableQueue
from tablewire.model.ids import Ts


def write_batch(
    queue: TableQueue,
    transaction: SinkTransaction,
    batch: ChangeBatch,
    take_following: Callable[[ChangeBatch], ChangeBatch | None],
) -> tuple[int, int, Ts]:
    """Write, commit and confirm the batch; return (rows, their bytes in the queue, the end of the last transaction).

    take_following: waits for what follows a batch that is only the beginning of a source transaction,
    which is written too. On an error the sink's transaction is rolled back, and the batch is given back;
    what cannot be given back is read again from the cursor.
    """
    rows, size = 0, batch.size
    held: ChangeBatch | None = batch
    is_split = False
    try:
        rows += transaction.apply(batch.parts, batch.is_whole)
        while not batch.is_whole:
            queue.confirm(batch, is_written=False)
            held, is_split = None, True
            held = take_following(batch)
            if held is None:
                raise SinkUnavailableError("the stream ended inside a transaction")
            batch = held
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
    return rows, size, batch.end_ts
