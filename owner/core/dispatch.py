"""The dispatches of one tick, gathered by capture.

Invariant: the number n of a dispatch is recorded in the row at the role of the capture that it is
for, so that only reports with an echo of at least n count for that span.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from owner.core.captures import Capture
from owner.core.tables import TASK_ADD, Rows, Tables
from tablewire.model.columns import U64
from tablewire.model.messages import DispatchTableRequest
from tablewire.model.states import DispatchAction

JOB_IDS_MAX = 256


@dataclass(slots=True)
class OutgoingDispatches:
    """The dispatches of one tick, in the order in which they were decided."""

    entries: dict[int, list[tuple[Rows, DispatchAction]]] = field(default_factory=dict)  # by capture

    def add(self, capture: int, rows: Rows, action: DispatchAction) -> None:
        if len(rows):
            self.entries.setdefault(capture, []).append((rows, action))

    def add_by_capture(self, captures: np.ndarray, rows: Rows, action: DispatchAction) -> None:
        """Send the same action to the capture of each row; captures: shape (len(rows),)."""
        for capture in np.unique(captures).tolist():
            self.add(capture, rows[captures == capture], action)

    def requests(self, tables: Tables, capture: Capture, chunk: int) -> list[DispatchTableRequest]:
        """Return the requests to one capture, of at most `chunk` spans each. If there are two
        actions for a row, the last one counts."""
        entries = self.entries.get(capture.index)
        if not entries:
            return []
        rows = np.concatenate([rows for rows, _ in entries])
        actions = np.concatenate([np.full(len(rows), action, np.uint8) for rows, action in entries])
        if len(entries) > 1:
            _, last = np.unique(rows[::-1], return_index=True)
            keep = np.sort(len(rows) - 1 - last)
            rows, actions = rows[keep], actions[keep]
        # A later report of the same tick may have taken the role from the capture.
        due = actions == DispatchAction.REMOVE
        due |= (actions == DispatchAction.ADD_PREPARE) & (tables.secondary[rows] == capture.index)
        due |= (actions == DispatchAction.ADD_WRITE) & (tables.primary[rows] == capture.index)
        due &= tables.live[rows]
        rows, actions = rows[due], actions[due]
        return [
            _request(tables, rows[start : start + chunk], actions[start : start + chunk], capture.acked)
            for start in range(0, len(rows), chunk)
        ]


def _request(tables: Tables, rows: Rows, actions: np.ndarray, acked: int) -> DispatchTableRequest:
    adds, writes, zero = actions != DispatchAction.REMOVE, actions == DispatchAction.ADD_WRITE, np.uint64(0)
    return DispatchTableRequest(
        numbers=tables.number[rows],
        spans=tables.spans(rows),
        actions=actions,
        checkpoint_ts=np.where(adds, tables.checkpoint_ts[rows], zero),
        resolved_ts=np.where(adds, tables.resolved_ts[rows], zero),
        assignment_epochs=np.where(writes, tables.assignment_epoch[rows], zero),
        acked=acked,
        jobs=_job_ids(tables, rows),
    )


def _job_ids(tables: Tables, rows: Rows) -> U64:
    """Return the job that each dispatch belongs to, 0 = none; empty when no dispatch has a job, or
    when there are too many dispatches for the agent to log them one by one."""
    ids = np.zeros(len(rows), np.uint64)
    if tables.origin and len(rows) <= JOB_IDS_MAX:
        for position, row in enumerate(rows.tolist()):
            origin = tables.origin.get(row)
            if origin is not None and origin.job is not None and tables.task[row] != TASK_ADD:
                ids[position] = origin.job.id
    return ids if ids.any() else ids[:0]
