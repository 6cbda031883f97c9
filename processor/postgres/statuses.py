"""Statuses of many tables as columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from processor.postgres.table_work import TableWork
from tablewire.model.progress import StatusColumns
from tablewire.model.spans import Span


def status_columns(tables: Mapping[Span, TableWork], spans: Sequence[Span]) -> StatusColumns:
    """The statuses of these spans as columns."""
    count = len(spans)
    states = np.zeros(count, np.uint8)
    checkpoint_ts, resolved_ts, last_synced_ts = (np.zeros(count, np.uint64) for _ in range(3))
    errors: list[tuple[int, str]] = []
    for at, span in enumerate(spans):
        table = tables.get(span)
        if table is None:
            continue
        if table.error is not None:
            errors.append((at, str(table.error)))
        checkpoint = table.checkpoint()
        states[at] = table.state.code
        checkpoint_ts[at] = checkpoint.checkpoint_ts
        resolved_ts[at] = checkpoint.resolved_ts
        last_synced_ts[at] = checkpoint.last_synced_ts
    return StatusColumns(states, checkpoint_ts, resolved_ts, last_synced_ts, errors)
