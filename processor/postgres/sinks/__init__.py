"""Where changes go: the Protocols that the table workers drive, and the sinks by the scheme of their URI.

postgres.py  data and position in one transaction, fenced by the position's row: exactly once
files.py     JSON lines, at least once, each row identified
blackhole.py counts and forgets, for benchmarks

One SinkSession a thread (a connection, if the sink has such a thing). A table is written by one session at a time. Errors:
EpochRefusedError when a newer writer has taken over; SinkUnavailableError for what may go well at another try;
WriteNotAllowedError when this processor's lease is in doubt; any other OperatingError is the table's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from processor.postgres.wire import Part
from tablewire.errors import OperatingError
from tablewire.model.ids import ChangefeedID, TableID, Ts
from tablewire.postgres.catalogue import TableSchema


class SinkUnavailableError(OperatingError):
    """The sink did not answer, or refused for now: worth another try."""


class WriteNotAllowedError(OperatingError):
    """may_write said no right before a commit: nothing was written."""


class ReloadNeededError(OperatingError):
    """What the table holds at the source cannot be followed by changes any more: it must be copied again."""


class LostCommitsError(ReloadNeededError):
    """The sink does not hold what it had confirmed."""


@dataclass(frozen=True, slots=True, order=True)
class Fence:
    """Who may write: compared as a whole, the greatest that a sink has seen wins. incarnation tells a changefeed from an
    earlier one of the same name."""

    incarnation: int
    changefeed_epoch: int
    assignment_epoch: int


@dataclass(frozen=True, slots=True)
class TakeoverResult:
    """What a takeover found. position: how far the sink is, 0 when it does not know. needs_snapshot: it was never filled."""

    position: Ts
    needs_snapshot: bool


class SinkTransaction(Protocol):
    """One fenced unit of work on one table. After an error, or without `commit`, `rollback` must be called."""

    def apply(self, parts: Sequence[Part], is_last: bool) -> int:
        """Writes the changes in order; the number of rows. is_last: nothing follows, and the end of the last part is the new
        position."""
        ...

    def copy(self, schema: TableSchema, rows: Iterable[bytes], position: Ts) -> None:
        """Fills the table from the chunks of a COPY BINARY stream of its columns; `position` is where changes go on."""
        ...

    def commit(self) -> None: ...

    def rollback(self) -> None: ...


class SinkSession(Protocol):
    """What one thread writes with."""

    def take_over(self, schema: TableSchema, fence: Fence, granted_ts: Ts, wants_snapshot: bool) -> TakeoverResult:
        """Makes `fence` the table's writer, whoever was; EpochRefusedError when a greater one has been. A table that the sink
        has never seen starts at granted_ts, after a snapshot if that is wanted."""
        ...

    def begin(self, schema: TableSchema, fence: Fence) -> SinkTransaction: ...

    def position(self, schema: TableSchema, fence: Fence) -> Ts:
        """How far the table is at the sink, for a writer whose last commit may or may not have happened: it waits for the
        end of what is still under way there. 0: the sink does not know. EpochRefusedError: another one has taken over."""
        ...

    def request_copy(self, schema: TableSchema, fence: Fence, makes_copies: bool) -> None:
        """Notes that the table must be copied again before anything else is written to it; in a changefeed that makes no copies,
        that it stands still until an operator says otherwise."""
        ...

    def warm(self) -> None:
        """Does early what the first use would have to wait for; changes nothing at the sink, and fails silently."""
        ...

    def forget(self, table_id: TableID) -> None:
        """The table is not written here any more: caches may go."""
        ...

    def reset(self) -> None:
        """After an error: a broken connection is given up, the next call makes a new one."""
        ...

    def cancel(self) -> None:
        """Asks the sink to end what the session waits for; `cut` if it cannot be asked. Any thread; waits for at most seconds."""
        ...

    def cut(self) -> None:
        """Ends the connection under the session's thread, which gets an error at once, even from a sink that hangs. Any
        thread."""
        ...

    def close(self) -> None: ...


class Sink(Protocol):
    """All sessions of one executor share it. takes_binary: values may come in binary form, else everything comes as text."""

    @property
    def takes_binary(self) -> bool: ...

    def session(self) -> SinkSession: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class SinkContext:
    """What a sink must know of its executor. writer: a word that names this process at the sink."""

    changefeed: ChangefeedID
    writer: str
    may_write: Callable[[], bool]
