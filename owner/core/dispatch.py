"""What one tick sends: dispatches gathered by capture, then numbered and written into messages.

Invariant: the number n of a dispatch is noted in the row at the role of the capture that it is for, so that only reports with an
echo of at least n count for that span (rule 5 of the numbers).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from owner.core.captures import Capture
from owner.core.tables import Rows, Tables
from tablewire.model.messages import DispatchTableRequest
from tablewire.model.states import DispatchAction


@dataclass(slots=True)
class OutgoingDispatches:
    """The dispatches of one tick in the order in which they were decided: capture index -> (rows, action)."""

    entries: dict[int, list[tuple[Rows, DispatchAction]]] = field(default_factory=dict)

    def add(self, capture: int, rows: Rows, action: DispatchAction) -> None:
        if len(rows):
            self.entries.setdefault(capture, []).append((rows, action))

    def add_by_capture(self, captures: np.ndarray, rows: Rows, action: DispatchAction) -> None:
        """The same action to the capture of each row; captures: shape (len(rows),)."""
        for capture in np.unique(captures).tolist():
            self.add(capture, rows[captures == capture], action)

    def requests(self, tables: Tables, capture: Capture, chunk: int) -> list[DispatchTableRequest]:
        """The requests to one capture, of at most `chunk` spans each. A row that was decided twice keeps its last action."""
        entries = self.entries.get(capture.index)
        if not entries:
            return []
        rows = np.concatenate([rows for rows, _ in entries])
        actions = np.concatenate([np.full(len(rows), action, np.uint8) for rows, action in entries])
        if len(entries) > 1:
            _, last = np.unique(rows[::-1], return_index=True)
            keep = np.sort(len(rows) - 1 - last)
            rows, actions = rows[keep], actions[keep]
        # What one report led to may be void by the next one of the same tick: only who has the role is asked.
        due = actions == DispatchAction.REMOVE
        due |= (actions == DispatchAction.ADD_PREPARE) & (tables.secondary[rows] == capture.index)
        due |= (actions == DispatchAction.ADD_WRITE) & (tables.primary[rows] == capture.index)
        due &= tables.live[rows]
        rows, actions = rows[due], actions[due]
        return [
            _request(tables, rows[start : start + chunk], actions[start : start + chunk]) for start in range(0, len(rows), chunk)
        ]


def _request(tables: Tables, rows: Rows, actions: np.ndarray) -> DispatchTableRequest:
    adds = actions != DispatchAction.REMOVE
    writes = actions == DispatchAction.ADD_WRITE
    zero = np.uint64(0)
    return DispatchTableRequest(
        numbers=tables.number[rows],
        spans=tables.spans(rows),
        actions=actions,
        checkpoint_ts=np.where(adds, tables.checkpoint_ts[rows], zero),
        resolved_ts=np.where(adds, tables.resolved_ts[rows], zero),
        assignment_epochs=np.where(writes, tables.assignment_epoch[rows], zero),
    )


def note_number(tables: Tables, capture: int, numbers: np.ndarray, n: int) -> None:
    """These spans were dispatched to the capture in its message n."""
    rows = tables.rows_of_numbers(numbers)
    primary = tables.primary[rows] == capture
    secondary = tables.secondary[rows] == capture
    tables.primary_dispatch[rows[primary]] = n
    tables.secondary_dispatch[rows[secondary]] = n
    for row in rows[~(primary | secondary)].tolist():
        holder = tables.undetermined.get(row, {}).get(capture)
        if holder is not None:
            holder.dispatch = n
