"""owner changefeed statistics"""

from __future__ import annotations

from typing import Any

import click

from owner.cli.changefeed import changefeed_argument
from owner.cli.json_objects import to_object
from owner.cli.options import Session, remote
from owner.cli.output import counts, size
from owner.cli.table import LIST_TIMEOUT_S, ROWS_FOR_PEOPLE
from tablewire.v1 import admin_pb2 as pb

_TOTAL = ("changefeed", "state", "spans", "rows_per_s", "bytes_per_s", "lag", "retained_bytes", "stalls")
_TABLE = ("table_id", "table", "start_key", "end_key", "primary", "rows_per_s", "bytes_per_s", "checkpoint_ts", "stall_reason")


@click.command("statistics")
@remote
@changefeed_argument
@click.option(
    "--limit",
    type=click.IntRange(min=0, max=2**32 - 1),
    default=None,
    metavar="ROWS",
    help=f"At most so many tables, 0 for all.  [default: {ROWS_FOR_PEOPLE}; all with -o json]",
)
def statistics(session: Session, changefeed: str, limit: int | None) -> None:
    """How much each table writes and how far it lags, the busiest first, and all together.

    Rates are what executors told last (about once in scheduler.stats_interval_ms). A lag is the distance from where the source
    is to the checkpoint (PostgreSQL: bytes of WAL). Of an initial copy it is known that it goes on (stall reason `snapshot`),
    and not how much of it is done.
    """
    total = session.ask("QueryChangefeed", pb.ChangefeedRequest(changefeed=changefeed), reads=True)
    request = pb.ListTablesRequest(changefeed=total.changefeed)
    chunks = session.client.stream("ListTables", request, session.timeout_s(LIST_TIMEOUT_S), reads=True) if total.running else ()
    rows = sorted((row for chunk in chunks for row in chunk.tables), key=lambda row: (-row.bytes_per_s, row.checkpoint_ts))
    if session.output.is_json:
        shape = to_object(total)
        answer = {name: shape[name] for name in _TOTAL}
        session.output.json({**answer, "tables": [_as_json(row, total) for row in rows[: limit or None]]})
        return
    _show(session, total, rows, ROWS_FOR_PEOPLE if limit is None else limit)


def _show(session: Session, total: pb.Changefeed, rows: list[pb.TableRow], limit: int) -> None:
    output = session.output
    output.pairs(
        (
            ("changefeed", total.changefeed),
            ("state", total.state),
            ("rows/s", number(total, "rows_per_s")),
            ("bytes/s", size_per_s(total)),
            ("lag", total.lag if total.HasField("lag") else None),
            ("retained at source", size(total.retained_bytes if total.HasField("retained_bytes") else None)),
            ("spans", total.spans if total.running else "not running"),
            ("not steady", counts(total.stalls)),
        )
    )
    if not total.running:
        return
    output.line("")
    output.table(
        ("TABLE", "#ROWS/S", "#BYTES/S", "#LAG", "#CHECKPOINT", "CAPTURE", "STALL"),
        (
            (
                row.table or row.table_id,
                number(row, "rows_per_s"),
                size_per_s(row),
                lag_of(row, total),
                row.checkpoint_ts or None,
                row.primary,
                row.stall_reason,
            )
            for row in rows[: limit or None]
        ),
    )
    if limit and len(rows) > limit:
        output.note(f"only {limit} of {len(rows)} spans are shown; --limit 0 shows all")


def _as_json(row: pb.TableRow, total: pb.Changefeed) -> dict[str, Any]:
    shape = to_object(row)
    return {**{name: shape[name] for name in _TABLE}, "lag": lag_of(row, total)}


def lag_of(row: pb.TableRow, total: pb.Changefeed) -> int | None:
    """None while the source's position, or the table's, is not known."""
    return max(0, total.source_ts - row.checkpoint_ts) if total.source_ts and row.checkpoint_ts else None


def number(message: pb.TableRow | pb.Changefeed, field: str) -> str | None:
    return f"{getattr(message, field):,.0f}" if message.HasField(field) else None


def size_per_s(message: pb.TableRow | pb.Changefeed) -> str | None:
    return size(round(message.bytes_per_s)) if message.HasField("bytes_per_s") else None
