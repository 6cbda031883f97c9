"""Where changes are written: the interface that the table workers use; registry.py finds a sink by its URI.

postgres_sink.py  data and position in one transaction, fenced by the row of the position: exactly once
files.py          JSON lines, at least once, each row identified
blackhole.py      counts and discards, for benchmarks

Each thread has its own SinkSession (with a connection, if the sink needs one). A table is written by one
session at a time. Errors: EpochRefusedError if a newer writer has taken over; SinkUnavailableError if a
retry may succeed; WriteNotAllowedError if the lease of this processor is in doubt; any other
OperatingError is the table's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from processor.postgres.source.pgoutput import Part
from processor.postgres.source.shape_watch import PendingChange, ShapeWatch
from tablewire.errors import OperatingError
from tablewire.model.ids import ChangefeedID, TableID, Ts
from tablewire.postgres.catalogue import TableSchema


class SinkUnavailableError(OperatingError):
    """The sink is unreachable or refused for now; a retry may succeed."""


class WaitsForTableError(SinkUnavailableError):
    """A foreign key at the sink is violated until another table has been written as far as this one."""


class WriteNotAllowedError(OperatingError):
    """may_write returned False right before a commit: nothing was written."""


class ReloadNeededError(OperatingError):
    """Changes are not sufficient to follow the source's table: it must be copied again."""


class LostCommitsError(ReloadNeededError):
    """The sink does not hold what it had confirmed."""


@dataclass(frozen=True, slots=True, order=True)
class Fence:
    """The right to write: compared as a whole; the greatest that a sink has seen wins.

    incarnation: distinguishes a changefeed from an earlier one of the same name.
    """

    incarnation: int
    changefeed_epoch: int
    assignment_epoch: int


@dataclass(frozen=True, slots=True)
class TakeoverResult:
    """What a takeover found. position: how far the sink is, 0 if unknown. needs_snapshot: it was never filled."""

    position: Ts
    needs_snapshot: bool


class ConflictCounter:
    """Counts conflicts of all sessions, since the executor was made. Any thread."""

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()

    def add(self, number: int) -> None:
        with self._lock:
            self.total += number


@dataclass(frozen=True, slots=True)
class SinkContext:
    """What a sink must know of its executor.

    writer: a word that identifies this process at the sink. shapes: of all tables of the executor.
    """

    changefeed: ChangefeedID
    writer: str
    may_write: Callable[[], bool]
    shapes: ShapeWatch | None = None
    conflicts: ConflictCounter = field(default_factory=ConflictCounter)

    def require_allowed(self) -> None:
        if not self.may_write():
            raise WriteNotAllowedError("the lease of this processor is in doubt")


class SinkTransaction(Protocol):
    """A fenced unit of work on one table. After an error, or without `commit`, `rollback` must be called."""

    def apply(self, parts: Sequence[Part], is_last: bool) -> int:
        """Write the changes in order; return the number of rows. is_last: the end of the last part is the new position."""
        ...

    def copy(self, schema: TableSchema, rows: Iterable[bytes], position: Ts) -> None:
        """Fill the table from the chunks of a COPY stream of its columns; changes follow after `position`."""
        ...

    def commit(self) -> None: ...

    def rollback(self) -> None: ...


class SinkSession:
    """What one thread writes with. A sink without connections and positions implements only the first two methods.

    takes_copy_text: a first copy that cannot be binary has the text format of COPY; otherwise always the
    binary format, with text values then.
    """

    takes_copy_text = False

    def take_over(self, schema: TableSchema, fence: Fence, granted_ts: Ts, wants_snapshot: bool) -> TakeoverResult:
        """Make `fence` the table's writer in place of any other; raise EpochRefusedError if there was a greater one.

        A table that the sink has never seen starts at granted_ts, after a snapshot if that is wanted.
        """
        raise NotImplementedError

    def begin(self, schema: TableSchema, fence: Fence) -> SinkTransaction:
        raise NotImplementedError

    def position(self, schema: TableSchema, fence: Fence) -> Ts:
        """Return how far the table is at the sink, for a writer that does not know whether its last commit succeeded.

        Wait for the end of what the sink is still doing. 0: unknown. EpochRefusedError: another writer has taken over.
        """
        return 0

    def request_copy(self, schema: TableSchema, fence: Fence, makes_copies: bool) -> None:
        """Record that the table must be copied again before anything else is written to it.

        In a changefeed without first copies: that it must not be written until an operator decides.
        """
        raise OperatingError(f"table {schema.full_name} cannot be copied again into this sink")

    def follow(self, schema: TableSchema, fence: Fence, pending: PendingChange) -> None:
        """Have the table follow a change of shape that was found at the source; all rows up to its position are written.

        Raise ReloadNeededError if only a copy can.
        """

    def warm(self) -> None:
        """Do early what the first use would wait for; change nothing at the sink, and ignore errors."""

    def forget(self, table_id: TableID) -> None:
        """Drop what is cached for a table that is no longer written here."""

    def cancel(self) -> None:
        """Cancel what the session waits for at the sink; `cut` if that fails. Takes seconds at most. Any thread."""

    def cut(self) -> None:
        """End the connection below the session's thread, which gets an error at once, even if the sink hangs. Any thread."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Sink:
    """A sink. takes_binary: values may be binary; otherwise all of them are text. session: returns a new session.

    follows_shapes: it stores the shapes of tables, and follows their changes. identity: of the database,
    which marks of replicated writes are compared with (tablewire/postgres/identity.py); empty if changes
    cannot come back from there. It may raise SourceUnavailableError.
    """

    takes_binary: bool
    session: Callable[[], SinkSession]
    close: Callable[[], None] = lambda: None
    identity: Callable[[], str] = lambda: ""
    follows_shapes: bool = False
