"""Reports: the rows that changed since what the owner has acknowledged, in messages of bounded size.

A report on base b holds every row with stamp > b (base 0: every row). A report that is too large for one message is sent as
several: each has its own number m, the first has base b, each further one the number before its own as base, so that it is
applied only after its predecessor. Only rows of the first may keep an older stamp (they are in a message that builds on b). Rows
of a later chunk get that chunk's number, since an owner that acknowledges an earlier number has not seen them in this report.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from processor.core.span_table import UNREPORTED, Rows, SpanTable
from processor.core.table_life import STATE_CODES, Phase
from tablewire.model.messages import SpanReports, SpanStats
from tablewire.model.spans import SpanBlock

ROW_BYTES = 48
"""Upper bound for a numbered row on the wire: five columns of 8 bytes, number and state."""
STATS_BYTES = 32
NAME_BYTES = 16
"""The table id, and the lengths of the keys."""

_HAS_EPOCH = np.array([phase >= Phase.REPLICATING for phase in Phase])


def make_reports(table: SpanTable, *, base: int, number: int, max_rows: int, max_bytes: int) -> list[SpanReports]:
    """Return the next report, one element for each message, numbered number, number + 1, …; at least one, which may be empty."""
    changed = (table.stamp[: table.size] > base) | (table.stats_stamp[: table.size] > base)
    chunks = _split(table, np.flatnonzero(changed), max_rows, max_bytes)
    reports = []
    for place, rows in enumerate(chunks):
        is_last = place + 1 == len(chunks)
        reports.append(_report(table, rows, base if place == 0 else number + place - 1, base, not is_last))
        _stamp(table, rows, base, number + place, place > 0)
    table.has_changes = False
    return reports


def _report(table: SpanTable, rows: Rows, base: int, stats_base: int, more: bool) -> SpanReports:
    numbers, phases = table.number[rows], table.phase[rows]
    with_stats = np.flatnonzero(table.stats_stamp[rows] > stats_base)
    stats_rows = rows[with_stats]
    return SpanReports(
        base=base,
        numbers=numbers,
        spans=SpanBlock.of([table.spans[row] for row in rows[numbers == 0].tolist()]),
        states=STATE_CODES[phases],
        checkpoint_ts=table.checkpoint_ts[rows],
        resolved_ts=table.resolved_ts[rows],
        last_synced_ts=table.last_synced_ts[rows],
        assignment_epochs=np.where(_HAS_EPOCH[phases], table.epoch[rows], np.uint64(0)),
        errors=tuple(_errors(table, rows)),
        stats=SpanStats(
            rows=with_stats.astype(np.uint32),
            rows_per_s=table.rows_per_s[stats_rows],
            bytes_per_s=table.bytes_per_s[stats_rows],
            puller_resolved_ts=table.puller_resolved_ts[stats_rows],
            in_snapshot=table.in_snapshot[stats_rows],
        ),
        more=more,
    )


def _errors(table: SpanTable, rows: Rows) -> Iterator[tuple[int, str]]:
    """Yield (position in rows, text) of the rows that an error ended; rows are ascending."""
    for row in sorted(table.errors):
        place = int(np.searchsorted(rows, row))
        if place < len(rows) and rows[place] == row:
            yield place, table.errors[row]


def _stamp(table: SpanTable, rows: Rows, base: int, number: int, is_later_chunk: bool) -> None:
    stats = table.stats_stamp[rows]
    if is_later_chunk:
        table.stamp[rows] = table.state_stamp[rows] = number
        table.stats_stamp[rows[stats > base]] = number
    else:
        table.stamp[rows[table.stamp[rows] == UNREPORTED]] = number
        table.state_stamp[rows[table.state_stamp[rows] == 0]] = number
        table.stats_stamp[rows[stats == UNREPORTED]] = number


def _split(table: SpanTable, rows: Rows, max_rows: int, max_bytes: int) -> list[Rows]:
    """Return the rows in pieces of at most max_rows, and of at most about max_bytes unless a single row is larger."""
    if len(rows) == 0:
        return [rows]
    sizes = np.full(len(rows), ROW_BYTES, np.int64)
    sizes[table.stats_stamp[rows] > 0] += STATS_BYTES
    for place in np.flatnonzero(table.number[rows] == 0).tolist():
        span = table.spans[rows[place]]
        sizes[place] += NAME_BYTES + len(span.start_key) + len(span.end_key)
    for place, text in _errors(table, rows):
        sizes[place] += 4 * len(text)  # in UTF-8
    ends = np.cumsum(sizes)
    if len(rows) <= max_rows and ends[-1] <= max_bytes:
        return [rows]
    pieces, start, sent = [], 0, 0
    while start < len(rows):
        end = int(np.searchsorted(ends, sent + max_bytes, side="right"))
        end = min(max(end, start + 1), start + max_rows)
        pieces.append(rows[start:end])
        start, sent = end, int(ends[end - 1])
    return pieces
