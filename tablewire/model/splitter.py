"""Which spans a table should have: the shapes that a source may choose from. Pure; any thread.

Source and executor of a changefeed have to agree: the executor must know which rows belong to a span, by the same hash or order.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from tablewire.model.columns import I64
from tablewire.model.spans import SpanBlock

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
