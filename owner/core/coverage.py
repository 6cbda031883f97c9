"""Whether spans cover their tables."""

from __future__ import annotations

from itertools import groupby, pairwise

from tablewire.model.spans import SpanBlock


def uncovered_tables(spans: SpanBlock) -> dict[int, str]:
    """Return the tables whose spans leave a hole or overlap, and where. spans: sorted."""
    wrong: dict[int, str] = {}
    if not spans.start_keys:
        return wrong  # every span is a whole table
    for table, group in groupby(spans, key=lambda span: span.table_id):
        parts = list(group)
        apart = [after for before, after in pairwise(parts) if not before.end_key or before.end_key != after.start_key]
        if parts[0].start_key:
            wrong[table] = f"nothing covers it before {parts[0].start_key.hex()}"
        elif apart:
            wrong[table] = f"its spans do not meet at {apart[0].start_key.hex() or 'the start'}"
        elif parts[-1].end_key:
            wrong[table] = f"nothing covers it from {parts[-1].end_key.hex()} on"
    return wrong


def overlaps(start: bytes, end: bytes, other_start: bytes, other_end: bytes) -> bool:
    """Return whether two ranges of one table share a key."""
    return (end == b"" or other_start < end) and (other_end == b"" or start < other_end)
