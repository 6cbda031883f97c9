"""The sink that counts and discards, for benchmarks. It has no fence and no position: delivery is at most once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from processor.postgres.sinks import Fence, SinkContext, SinkSession, TakeoverResult
from processor.postgres.source.pgoutput import Part
from tablewire.model.ids import Ts
from tablewire.postgres.catalogue import TableSchema


class BlackholeSession(SinkSession):
    """A session that is also its transactions, as it holds nothing."""

    def __init__(self, context: SinkContext) -> None:
        self._context = context

    def take_over(self, schema: TableSchema, fence: Fence, granted_ts: Ts, wants_snapshot: bool) -> TakeoverResult:
        return TakeoverResult(0, False)

    def begin(self, schema: TableSchema, fence: Fence) -> BlackholeSession:
        return self

    def apply(self, parts: Sequence[Part], is_last: bool) -> int:
        return sum(len(part.frames) for part in parts)

    def copy(self, schema: TableSchema, rows: Iterable[bytes], position: Ts) -> None:
        deque(rows, maxlen=0)

    def commit(self) -> None:
        self._context.require_allowed()

    def rollback(self) -> None: ...
