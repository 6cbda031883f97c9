"""The sink that counts and forgets, for benchmarks. It knows no fence and no position: at most what an executor itself does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from processor.postgres.sinks import Fence, SinkContext, TakeoverResult, WriteNotAllowedError
from processor.postgres.wire import Part
from tablewire.errors import OperatingError
from tablewire.model.ids import TableID, Ts
from tablewire.postgres.catalogue import TableSchema


class BlackholeSink:
    """See the module; any thread."""

    takes_binary = True

    def __init__(self, context: SinkContext) -> None:
        self._context = context

    def session(self) -> BlackholeSession:
        return BlackholeSession(self._context)

    def close(self) -> None:
        """Nothing is held."""


class BlackholeSession:
    """Takes everything."""

    def __init__(self, context: SinkContext) -> None:
        self._context = context

    def take_over(self, schema: TableSchema, fence: Fence, granted_ts: Ts, wants_snapshot: bool) -> TakeoverResult:
        return TakeoverResult(0, False)

    def begin(self, schema: TableSchema, fence: Fence) -> BlackholeTransaction:
        return BlackholeTransaction(self._context)

    def position(self, schema: TableSchema, fence: Fence) -> Ts:
        return 0

    def request_copy(self, schema: TableSchema, fence: Fence, makes_copies: bool) -> None:
        raise OperatingError(f"table {schema.full_name} cannot be copied again into this sink")

    def warm(self) -> None:
        """Nothing to do."""

    def forget(self, table_id: TableID) -> None:
        """Nothing is kept."""

    def reset(self) -> None:
        """Nothing breaks."""

    def cancel(self) -> None:
        """Nothing waits."""

    def cut(self) -> None:
        """There is no connection."""

    def close(self) -> None:
        """Nothing is held."""


class BlackholeTransaction:
    """Counts."""

    def __init__(self, context: SinkContext) -> None:
        self._context = context

    def apply(self, parts: Sequence[Part], is_last: bool) -> int:
        return sum(len(part.frames) for part in parts)

    def copy(self, schema: TableSchema, rows: Iterable[bytes], position: Ts) -> None:
        for _ in rows:
            continue

    def commit(self) -> None:
        if not self._context.may_write():
            raise WriteNotAllowedError("the lease of this processor is in doubt")

    def rollback(self) -> None:
        """Nothing was done."""
