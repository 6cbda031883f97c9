"""owner changefeed statistics"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from owner.cli.json_objects import to_object
from owner.cli.options import Session, remote
from owner.cli.output import counts, number, optional, size
from owner.cli.parameters import LIST_TIMEOUT_S, ROWS_SHOWN_MAX, changefeed_argument, limit_option
from tablewire.runtime.text import plural

if TYPE_CHECKING:
    from tablewire.v1 import admin_pb2 as pb

_TOTAL = ("changefeed", "state", "spans", "rows_per_s", "bytes_per_s", "lag", "retained_bytes", "stalls")
_TABLE = ("table_id", "table", "start_key", "end_key", "primary", "rows_per_s", "bytes_per_s", "checkpoint_ts", "stall_reason")


@click.command("statistics")
@remote
@changefeed_argument
@limit_option("tables")
def statistics(session: Session, changefeed: str, limit: int | None) -> None:
    """Show the write rate and the lag of each table, busiest first, and of the whole changefeed.

    Rates are as last reported by the executors (about once in scheduler.stats_interval_ms). A lag is the distance from the
    source's position to the checkpoint (PostgreSQL: bytes of WAL). The stall reason `snapshot` marks an initial copy; its
    progress is not known.
    """
    total = session.ask("QueryChangefeed", changefeed=changefeed)
    rows: list[pb.TableRow] = []
    if total.running:
        chunks = session.client.stream("ListTables", session.timeout_s(LIST_TIMEOUT_S), changefeed=total.changefeed)
        rows = sorted((row for chunk in chunks for row in chunk.tables), key=lambda row: (-row.bytes_per_s, row.checkpoint_ts))
    if session.output.is_json:
        found = to_object(total)
        tables = [_as_json(row, total) for row in rows[: limit or None]]
        session.output.json({**{name: found[name] for name in _TOTAL}, "tables": tables})
    else:
        _show(session, total, rows, ROWS_SHOWN_MAX if limit is None else limit)


def _show(session: Session, total: pb.Changefeed, rows: list[pb.TableRow], limit: int) -> None:
    output = session.output
    output.pairs(
        (
            ("changefeed", total.changefeed),
            ("state", total.state),
            ("rows/s", number(optional(total, "rows_per_s"))),
            ("bytes/s", size(optional(total, "bytes_per_s"))),
            ("lag", optional(total, "lag")),
            ("retained at source", size(optional(total, "retained_bytes"))),
            ("tables", total.spans if total.running else "not running"),
            ("not steady", counts(total.stalls)),
        )
    )
    if not total.running:
        return
    output.line("")
    output.table(
        (
            ("TABLE", lambda row: row.table or row.table_id),
            ("#ROWS/S", lambda row: number(optional(row, "rows_per_s"))),
            ("#BYTES/S", lambda row: size(optional(row, "bytes_per_s"))),
            ("#LAG", lambda row: _lag(row, total)),
            ("#CHECKPOINT", lambda row: row.checkpoint_ts or None),
            ("PROCESSOR", "primary"),
            ("STALL", "stall_reason"),
        ),
        rows[: limit or None],
    )
    if limit and len(rows) > limit:
        output.note(f"only {limit} of {plural(len(rows), 'table')} are shown; --limit 0 shows all")


def _as_json(row: pb.TableRow, total: pb.Changefeed) -> dict[str, Any]:
    found = to_object(row)
    return {**{name: found[name] for name in _TABLE}, "lag": _lag(row, total)}


def _lag(row: pb.TableRow, total: pb.Changefeed) -> int | None:
    """Return the lag of a table; None if the position of the source or of the table is unknown."""
    return max(0, total.source_ts - row.checkpoint_ts) if total.source_ts and row.checkpoint_ts else None
