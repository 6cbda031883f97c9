"""Which spans a table should have."""

from __future__ import annotations

from typing import Protocol

from tablewire.types import I64, SpanBlock


class Splitter(Protocol):
    """Pure and deterministic: the same ids give the same spans, whoever owns the changefeed."""

    def split(self, table_ids: I64) -> SpanBlock:
        """The spans that cover these tables without a hole or an overlap. table_ids: sorted, unique."""
        ...


class WholeTables:
    """One span a table."""

    def split(self, table_ids: I64) -> SpanBlock:
        return SpanBlock(table_ids)
