"""Where a table continues that is taken over: after its position at the sink, or with a copy. Pure."""

from __future__ import annotations

from processor.postgres.sinks import positions
from processor.postgres.sinks.positions import PositionRow
from tablewire.errors import OperatingError
from tablewire.model.ids import Ts
from tablewire.postgres.catalogue import TableSchema

_FILLED = (positions.SNAPSHOT_DONE, positions.SNAPSHOT_SKIPPED)


def decide_start(
    row: PositionRow, schema: TableSchema, is_same: bool, start_ts: Ts, wants_snapshot: bool, why_copy: str
) -> tuple[Ts, str]:
    """Return the position and the state of the first copy of a table that is taken over.

    row: as it was found; is_same: it is of this very table in this life of the changefeed. start_ts:
    where a new table starts. why_copy: why the sink's table is not the one that was written, empty if it
    is. Raise OperatingError if a copy is needed and this changefeed makes none.
    """
    if not is_same:
        # Another table of that name, or another life of the changefeed: the existing rows are of no use.
        return start_ts, positions.SNAPSHOT_RELOAD if wants_snapshot else positions.SNAPSHOT_SKIPPED
    if row.snapshot == positions.SNAPSHOT_LOST:
        raise OperatingError(
            f"table {schema.full_name} must be copied again, for the sink has lost commits of it, but this changefeed makes"
            " no first copies: remove its row in tablewire.positions to continue without what is missing"
        )
    if positions.was_unpublished(row, schema) and row.snapshot in _FILLED:
        # It left the publication and came back: what was written meanwhile will never arrive as changes.
        if not wants_snapshot:
            raise OperatingError(
                f"table {schema.full_name} was outside of the changefeed's tables for a while (or its publication was changed"
                " by hand), and what was written to it then is not at the sink: remove its row in tablewire.positions to"
                " continue without it, or create a changefeed with a first copy"
            )
        return row.position, positions.SNAPSHOT_RELOAD
    if why_copy:
        if not wants_snapshot:
            raise OperatingError(
                f"table {schema.full_name}: {why_copy}, but this changefeed makes no first copies: remove its row in"
                " tablewire.positions to continue with the rows that the table has now"
            )
        return row.position, positions.SNAPSHOT_RELOAD
    return row.position, row.snapshot
