"""What a table needs of its executor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from tablewire.model.ids import Ts

if TYPE_CHECKING:
    from processor.postgres.table_work import TableWork


class TableServices(Protocol):
    """What a table needs of its executor. Any thread; none of these waits."""

    @property
    def batch_max_bytes(self) -> int: ...

    @property
    def error_after_s(self) -> float: ...

    @property
    def wants_snapshot(self) -> bool: ...

    def submit(self, table: TableWork) -> None:
        """A worker should call `step` soon."""

    def submit_later(self, table: TableWork, delay_s: float) -> None:
        """A worker should call `step` after a while."""

    def changed(self) -> None:
        """A state has changed: the agent should look."""

    def wake(self) -> None:
        """The control thread should look: a table waits for a stream or a copy."""

    def released(self, table: TableWork) -> None:
        """The table stops: its streams may forget it."""

    def shared_position(self) -> Ts:
        """How far the shared stream is."""
