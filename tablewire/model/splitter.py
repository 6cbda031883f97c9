"""Splitters: how a source divides its tables into spans. Pure; any thread.

The executor of the same plug-in must know which rows belong to a span, by the same hash or order.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from tablewire.model.columns import I64
from tablewire.model.spans import SpanBlock

HASH_BYTES = 8


class Splitter(Protocol):
    """Deterministic: the same ids give the same spans in every process."""

    def split(self, table_ids: I64) -> SpanBlock:
        """Return spans that cover these tables without gap or overlap. table_ids: sorted, unique."""
        ...


class WholeTables:
    """One span for each table."""

    def split(self, table_ids: I64) -> SpanBlock:
        return SpanBlock(table_ids)


class HashRanges:
    """`parts` spans for each table: equal ranges of an 8-byte big-endian hash of the key."""

    def __init__(self, parts: int) -> None:
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
