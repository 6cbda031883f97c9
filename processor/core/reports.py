"""A report: what changed since what the owner has acknowledged, from the columns, in messages of bounded size.

A report on base b holds every row with stamp > b (base 0: every row). A report that is too large for one message goes out as
several: each has its own number m, the first has base b, each further one the number before its own as base, so that it is
applied only after its predecessor. Only the rows of the first may keep an older stamp (they are in a message that stands on b);
those of a later chunk get that chunk's number, since a peer that acknowledges an earlier number has not seen them in this report.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from processor.core.span_table import NEWS, Rows, SpanTable
from processor.core.table_life import STATE_CODES, Phase
from tablewire.model.messages import SpanReports, SpanStats
from tablewire.model.spans import SpanBlock

ROW_BYTES = 48
"""Upper bound of what a numbered row takes on the wire: five columns of 8 bytes, number and state."""
STATS_BYTES = 32
NAME_BYTES = 16
"""The table id, and the lengths of the keys."""

_WITH_EPOCH = np.array([phase >= Phase.REPLICATING for phase in Phase])


def make_reports(table: SpanTable, *, base: int, number: int, max_rows: int, max_bytes: int) -> list[SpanReports]:
    """The next report, one element a message, numbered number, number + 1, …; at least one, which may be empty."""
    size = table.size
    stats_due = table.stats_stamp[:size] > base
    rows = np.flatnonzero((table.stamp[:size] > base) | stats_due)
    chunks = _split(table, rows, max_rows, max_bytes)
    reports = []
    for place, chunk in enumerate(chunks):
        reports.append(_report(table, chunk, base if place == 0 else number + place - 1, base, place + 1 < len(chunks)))
        _note(table, chunk, base, number + place, place > 0)
    table.has_news = False
    return reports


def _report(table: SpanTable, rows: Rows, base: int, stats_base: int, more: bool) -> SpanReports:
    numbers, phases = table.number[rows], table.phase[rows]
    spans = table.spans
    with_stats = np.flatnonzero(table.stats_stamp[rows] > stats_base)
    stats_rows = rows[with_stats]
    return SpanReports(
        base=base,
        numbers=numbers,
        spans=SpanBlock.of([spans[row] for row in rows[numbers == 0].tolist()]),
        states=STATE_CODES[phases],
        checkpoint_ts=table.checkpoint_ts[rows],
        resolved_ts=table.resolved_ts[rows],
        last_synced_ts=table.last_synced_ts[rows],
        assignment_epochs=np.where(_WITH_EPOCH[phases], table.epoch[rows], np.uint64(0)),
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
    """(position in rows, text) of the rows that an error ended; rows are ascending."""
    for row in sorted(table.errors):
        place = int(np.searchsorted(rows, row))
        if place < len(rows) and rows[place] == row:
            yield place, table.errors[row]


def _note(table: SpanTable, rows: Rows, base: int, number: int, is_later_chunk: bool) -> None:
    stamps, told, stats = table.stamp[rows], table.told[rows], table.stats_stamp[rows]
    if is_later_chunk:
        table.stamp[rows] = table.told[rows] = number
        table.stats_stamp[rows] = np.where(stats > base, np.uint64(number), stats)
    else:
        table.stamp[rows] = np.where(stamps == NEWS, np.uint64(number), stamps)
        table.told[rows] = np.where(told == 0, np.uint64(number), told)
        table.stats_stamp[rows] = np.where(stats == NEWS, np.uint64(number), stats)


def _split(table: SpanTable, rows: Rows, max_rows: int, max_bytes: int) -> list[Rows]:
    """The rows in pieces of at most max_rows, and of at most about max_bytes unless a single row is larger."""
    sizes = np.full(len(rows), ROW_BYTES, np.int64)
    sizes += np.where(table.stats_stamp[rows] > 0, STATS_BYTES, 0)
    unnamed = np.flatnonzero(table.number[rows] == 0)
    for place, row in zip(unnamed.tolist(), rows[unnamed].tolist(), strict=True):
        span = table.spans[row]
        sizes[place] += NAME_BYTES + len(span.start_key) + len(span.end_key)
    for place, text in _errors(table, rows):
        sizes[place] += 4 * len(text)  # in UTF-8
    if len(rows) <= max_rows and int(sizes.sum()) <= max_bytes:
        return [rows]
    ends = np.cumsum(sizes)
    pieces, start, sent = [], 0, 0
    while start < len(rows):
        end = int(np.searchsorted(ends, sent + max_bytes, side="right"))
        end = min(max(end, start + 1), start + max_rows)
        pieces.append(rows[start:end])
        start, sent = end, int(ends[end - 1])
    return pieces
