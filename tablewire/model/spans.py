"""Spans: half-open key ranges of tables, one by one and as columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tablewire.model.columns import I64, Columns
from tablewire.model.ids import TableID


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A half-open key range. Empty keys are unbounded: a whole table is `Span(table_id)`."""

    table_id: TableID
    start_key: bytes = b""
    end_key: bytes = b""

    def __str__(self) -> str:
        if not self.start_key and not self.end_key:
            return str(self.table_id)
        return f"{self.table_id}[{self.start_key.hex() or '-'},{self.end_key.hex() or '-'})"


@dataclass(frozen=True, slots=True, eq=False)
class SpanBlock(Columns, Sequence[Span]):
    """Spans as columns.

    start_keys and end_keys hold one byte string for each span, or both are () when every span is a
    whole table.
    """

    table_ids: I64
    start_keys: tuple[bytes, ...] = ()
    end_keys: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, spans: Sequence[Span]) -> SpanBlock:
        """Return the spans as a block, in their order."""
        if isinstance(spans, SpanBlock):
            return spans
        table_ids = np.fromiter((span.table_id for span in spans), dtype=np.int64, count=len(spans))
        if any(span.start_key or span.end_key for span in spans):
            return cls(table_ids, tuple(s.start_key for s in spans), tuple(s.end_key for s in spans))
        return cls(table_ids)

    def __len__(self) -> int:
        return len(self.table_ids)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return SpanBlock(self.table_ids[index], self.start_keys[index], self.end_keys[index])
        if self.start_keys:
            return Span(int(self.table_ids[index]), self.start_keys[index], self.end_keys[index])
        return Span(int(self.table_ids[index]))

    def __iter__(self) -> Iterator[Span]:
        table_ids = self.table_ids.tolist()
        if self.start_keys:
            return map(Span, table_ids, self.start_keys, self.end_keys)
        return map(Span, table_ids)
