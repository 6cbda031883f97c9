"""Whether spans cover their tables."""

from __future__ import annotations

from tablewire.model.spans import SpanBlock


def uncovered_tables(spans: SpanBlock) -> dict[int, str]:
    """Tables whose spans leave a hole or overlap, and where; spans sorted. A table of one whole
    span is covered."""
    if not spans.start_keys:
        return {}
    wrong: dict[int, str] = {}
    table, end = None, b""
    for span in spans:
        if span.table_id != table:
            if table is not None and end != b"":
                wrong.setdefault(table, f"nothing covers it from {end.hex()} on")
            table = span.table_id
            if span.start_key != b"":
                wrong.setdefault(table, f"nothing covers it before {span.start_key.hex()}")
        elif end == b"" or span.start_key != end:
            wrong.setdefault(table, f"its spans do not meet at {span.start_key.hex() or 'the start'}")
        end = span.end_key
    if table is not None and end != b"":
        wrong.setdefault(table, f"nothing covers it from {end.hex()} on")
    return wrong


def overlaps(start: bytes, end: bytes, other_start: bytes, other_end: bytes) -> bool:
    """Whether two ranges of one table share a key."""
    return (end == b"" or other_start < end) and (other_end == b"" or start < other_end)
