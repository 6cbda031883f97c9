"""A report: what changed since what the owner has acknowledged, from the columns, in messages of bounded size.

A report on base b holds every row with stamp > b (base 0: every row). A report that is too large for one message goes out as
several: each has its own number m, the first has base b, each further one the number before its own as base, so that it is
applied only after its predecessor. Only the rows of the first may keep an older stamp (they are in a message that stands on b);
those of a later chunk get that chunk's number, since a peer that acknowledges an earlier number has not seen them in this report.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from processor.core.span_table import NEWS, Holdings, Rows
from processor.core.table_life import STATE_CODES, Phase
from tablewire.model.messages import SpanReports, SpanStats
from tablewire.model.spans import SpanBlock

ROW_BYTES = 48
"""Upper bound of what a numbered row takes on the wire: five columns of 8 bytes, number and state."""
STATS_BYTES = 32
NAME_BYTES = 16
"""The table id, and the lengths of the keys."""

_WITH_EPOCH = np.array([phase >= Phase.REPLICATING for phase in Phase])


def make_reports(holdings: Holdings, *, base: int, number: int, max_rows: int, max_bytes: int) -> list[SpanReports]:
    """The next report, one element a message, numbered number, number + 1, …; at least one, which may be empty."""
    size = holdings.size
    stats_due = holdings.stats_stamp[:size] > base
    rows = np.flatnonzero((holdings.stamp[:size] > base) | stats_due)
    chunks = _split(holdings, rows, max_rows, max_bytes)
    reports = []
    for place, chunk in enumerate(chunks):
        reports.append(_report(holdings, chunk, base if place == 0 else number + place - 1, base, place + 1 < len(chunks)))
        _note(holdings, chunk, base, number + place, place > 0)
    holdings.has_news = False
    return reports


def _report(holdings: Holdings, rows: Rows, base: int, stats_base: int, more: bool) -> SpanReports:
    numbers, phases = holdings.number[rows], holdings.phase[rows]
    spans = holdings.spans
    with_stats = np.flatnonzero(holdings.stats_stamp[rows] > stats_base)
    stats_rows = rows[with_stats]
    return SpanReports(
        base=base,
        numbers=numbers,
        spans=SpanBlock.of([spans[row] for row in rows[numbers == 0].tolist()]),
        states=STATE_CODES[phases],
        checkpoint_ts=holdings.checkpoint_ts[rows],
        resolved_ts=holdings.resolved_ts[rows],
        last_synced_ts=holdings.last_synced_ts[rows],
        assignment_epochs=np.where(_WITH_EPOCH[phases], holdings.epoch[rows], np.uint64(0)),
        errors=tuple(_errors(holdings, rows)),
        stats=SpanStats(
            rows=with_stats.astype(np.uint32),
            rows_per_s=holdings.rows_per_s[stats_rows],
            bytes_per_s=holdings.bytes_per_s[stats_rows],
            puller_resolved_ts=holdings.puller_resolved_ts[stats_rows],
            in_snapshot=holdings.in_snapshot[stats_rows],
        ),
        more=more,
    )


def _errors(holdings: Holdings, rows: Rows) -> Iterator[tuple[int, str]]:
    """(position in rows, text) of the rows that an error ended; rows are ascending."""
    for row in sorted(holdings.errors):
        place = int(np.searchsorted(rows, row))
        if place < len(rows) and rows[place] == row:
            yield place, holdings.errors[row]


def _note(holdings: Holdings, rows: Rows, base: int, number: int, is_later_chunk: bool) -> None:
    stamps, told, stats = holdings.stamp[rows], holdings.told[rows], holdings.stats_stamp[rows]
    if is_later_chunk:
        holdings.stamp[rows] = holdings.told[rows] = number
        holdings.stats_stamp[rows] = np.where(stats > base, np.uint64(number), stats)
    else:
        holdings.stamp[rows] = np.where(stamps == NEWS, np.uint64(number), stamps)
        holdings.told[rows] = np.where(told == 0, np.uint64(number), told)
        holdings.stats_stamp[rows] = np.where(stats == NEWS, np.uint64(number), stats)


def _split(holdings: Holdings, rows: Rows, max_rows: int, max_bytes: int) -> list[Rows]:
    """The rows in pieces of at most max_rows, and of at most about max_bytes unless a single row is larger."""
    sizes = np.full(len(rows), ROW_BYTES, np.int64)
    sizes += np.where(holdings.stats_stamp[rows] > 0, STATS_BYTES, 0)
    unnamed = np.flatnonzero(holdings.number[rows] == 0)
    for place, row in zip(unnamed.tolist(), rows[unnamed].tolist(), strict=True):
        span = holdings.spans[row]
        sizes[place] += NAME_BYTES + len(span.start_key) + len(span.end_key)
    for place, text in _errors(holdings, rows):
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
