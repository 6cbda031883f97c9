"""Which spans a table should have."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from tablewire.types import I64, SpanBlock

HASH_BYTES = 8


class Splitter(Protocol):
    """Pure and deterministic: the same ids give the same spans, whoever owns the changefeed."""

    def split(self, table_ids: I64) -> SpanBlock:
        """The spans that cover these tables without a hole or an overlap. table_ids: sorted, unique."""
        ...


class WholeTables:
    """One span a table."""

    def split(self, table_ids: I64) -> SpanBlock:
        return SpanBlock(table_ids)


class HashRanges:
    """`parts` spans a table, equal ranges of an 8-byte big-endian hash of the key. The executor has to know the same hash."""

    def __init__(self, parts: int) -> None:
        """parts: 1 to 65,536 (ValueError)."""
        if not 1 <= parts <= 65_536:
            raise ValueError(f"parts must be between 1 and 65536, not {parts}")
        step = 2 ** (8 * HASH_BYTES) // parts
        inner = [(part * step).to_bytes(HASH_BYTES, "big") for part in range(1, parts)]
        self._starts = (b"", *inner)
        self._ends = (*inner, b"")

    def split(self, table_ids: I64) -> SpanBlock:
        parts = len(self._starts)
        if parts == 1:
            return SpanBlock(table_ids)
        return SpanBlock(np.repeat(table_ids, parts), self._starts * len(table_ids), self._ends * len(table_ids))


def uncovered_tables(spans: SpanBlock) -> dict[int, str]:
    """Tables whose spans leave a hole or overlap, and where; spans sorted. A table of one whole span is covered."""
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
