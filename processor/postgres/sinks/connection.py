"""A connection to a PostgreSQL sink.

Changes go through psycopg's `pq` layer: pipelines of prepared statements, whose binary values come from
the source unchanged, and COPY streams. One thread owns a connection; `cancel` is for any thread. Every
wait releases the interpreter, and is bounded by the server's statement_timeout and by CLIENT_TIMEOUT_S.
Errors are psycopg's; `sink_error` translates them.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import psycopg
from psycopg import pq, sql

from processor.postgres.sinks import SinkUnavailableError, WaitsForTableError
from tablewire.errors import OperatingError
from tablewire.postgres.connections import (
    Connection,
    connect,
    cut,
    error_text,
    is_connection_loss,
    policy_hint,
    time_limit,
)
from tablewire.postgres.sink_checkpoint import SYNCHRONOUS_COMMIT

CLIENT_TIMEOUT_S = 120.0
"""Longer than the timeouts of the server: it only ends what a hanging server cannot."""
COPY_TIMEOUT_S = 7 * 24 * 3600.0
"""The same for a whole first copy of a table, whose statements have no timeout at the server."""
SETUP_TIMEOUT_S = 10.0
"""For the settings of a new connection."""
CANCEL_TIMEOUT_S = 2.0
PREPARED_MAX = 500
IDLE_TRANSACTION_TIMEOUT_MS = 60_000
LOCK_TIMEOUT_MS = 10_000
# Batches join small sets of keys with tables of any size, whose statistics say nothing about the batch.
_PLANNER_SETTINGS: Mapping[str, str | int] = {
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
    "plan_cache_mode": "force_generic_plan",
}
RETRY_CODES = frozenset(
    {
        "40001",  # serialization failure
        "40P01",  # deadlock
        "55P03",  # lock not available in time
        "57014",  # canceled, by a timeout or an operator
        "25P03",  # idle in transaction for too long
        "25006",  # read-only: a failover may be in progress
        *("53000", "53100", "53200", "53300", "53400"),  # no disk space, memory or connection left
        "58030",  # an I/O error
    }
)
POOLER_CODES = frozenset({"42P05", "26000"})
"""A prepared statement of ours exists already, or no longer: this is not the session that we have prepared it in."""

_Result = TypeVar("_Result")
Statement = tuple[str, Sequence["bytes | None"]]
"""SQL and its values in binary format, without their length."""


class RowCountError(OperatingError):
    """A statement affected another number of rows than the change of the source did."""

    def __init__(self, statement: str, expected: int, affected: int) -> None:
        super().__init__(f"the sink changed {affected} rows instead of {expected}: {statement[:200]}")


def sink_error(error: psycopg.Error, where: str) -> OperatingError:
    """Return the error of a table: SinkUnavailableError if a retry may succeed."""
    text = f"{where}: {error_text(error)}{policy_hint(error, 'sink')}{_encoding_hint(error)}"
    if isinstance(error, psycopg.errors.ForeignKeyViolation):
        return WaitsForTableError(
            f"{text}; if no other table that is being replicated will change that, drop the foreign key at the sink, or allow the"
            " role of the sink URI to set session_replication_role"
        )
    if error.sqlstate in POOLER_CODES:
        text += (
            "; the sink URI seems to lead to a connection pooler that gives each transaction another session: connect to the"
            " server itself, or through a pooler in session mode"
        )
    return SinkUnavailableError(text) if is_retried(error) else OperatingError(text)


def is_retried(error: psycopg.Error) -> bool:
    """Return whether the same work may succeed later."""
    return is_connection_loss(error) or error.sqlstate in RETRY_CODES


def _encoding_hint(error: psycopg.Error) -> str:
    if not isinstance(error, psycopg.errors.CharacterNotInRepertoire | psycopg.errors.UntranslatableCharacter):
        return ""
    return ": correct the value at the source, then have its tables copied again (owner changefeed resync)"


class SinkConnection:
    """See the module."""

    def __init__(self, uri: str, application_name: str, statement_timeout_ms: int) -> None:
        timeouts = {
            "statement_timeout": statement_timeout_ms,
            "lock_timeout": LOCK_TIMEOUT_MS,
            "idle_in_transaction_session_timeout": IDLE_TRANSACTION_TIMEOUT_MS,
        }
        settings = {**_PLANNER_SETTINGS, **timeouts}
        self.connection = connect(uri, application_name=application_name, is_raw=True, settings=settings)
        self.connection.prepare_threshold = None  # `run` prepares its statements by name
        self.timeout_s = CLIENT_TIMEOUT_S
        """How long one wait for the server, or one COPY, may last."""
        self._pgconn = self.connection.pgconn
        self._poll = select.poll()
        self._poll.register(self._pgconn.socket, select.POLLIN)
        self._poll_write = select.poll()
        self._poll_write.register(self._pgconn.socket, select.POLLIN | select.POLLOUT)
        self.pending: list[Statement] = []
        self._expected: list[int] = []
        self._prepared: dict[str, bytes] = {}
        self._names = 0
        try:
            with time_limit(self.connection, SETUP_TIMEOUT_S):
                self._set_up()
        except psycopg.Error:
            self.connection.close()
            raise

    def _set_up(self) -> None:
        self.connection.execute(SYNCHRONOUS_COMMIT)
        # Triggers and foreign keys fired at the source already; switching them off needs a privilege that may be missing.
        with suppress(psycopg.errors.InsufficientPrivilege):
            self.connection.execute("SET session_replication_role = replica")

    @property
    def is_broken(self) -> bool:
        return self._pgconn.status != pq.ConnStatus.OK

    def add(self, *statements: Statement) -> None:
        """Run the statements with the next `flush`, or before anything else is run."""
        self.pending += statements
        self._expected += [-1] * len(statements)

    def add_counted(self, statements: Sequence[Statement], rows: Sequence[int]) -> None:
        """Add statements that must affect that many rows each; -1: any number."""
        self.pending += statements
        self._expected += rows

    def flush(self) -> list[pq.abc.PGresult]:
        """Run all statements that were added in one pipeline; return a result for each.

        Raise the first error; nothing after it has run. Raise RowCountError if a count differs.
        """
        if not self.pending:
            return []
        pending, expected = self.pending, self._expected
        self.pending, self._expected = [], []
        results = self._run(pending)
        for (text, _), count, result in zip(pending, expected, results, strict=True):
            if count >= 0 and result.command_tuples != count:
                raise RowCountError(text, count, result.command_tuples or 0)
        return results

    def rollback(self) -> None:
        """End the open transaction, and drop all prepared statements: after an error some may not exist."""
        self._prepared.clear()
        self.pending.clear()
        self._expected.clear()
        self.execute("ROLLBACK; DEALLOCATE ALL")

    def rollback_to(self, savepoint: str) -> None:
        """Undo what came after the savepoint."""
        self.pending.clear()
        self._expected.clear()
        self.execute(f"ROLLBACK TO SAVEPOINT {savepoint}")

    def execute(self, statements: str) -> None:
        """Run one or more statements without values; raise the first error."""
        self.flush()
        with time_limit(self.connection, self.timeout_s):
            self._pgconn.send_query(statements.encode())
            self._require_success()

    def query(self, query: str | sql.Composed, values: Sequence[object] | Mapping[str, object] = ()) -> list[tuple[Any, ...]]:
        """Run one or more statements with values, which psycopg quotes; return the rows of the last one."""
        text = query.encode() if isinstance(query, str) else query
        cursor = self.call(lambda connection: psycopg.ClientCursor(connection).execute(text, values or None))
        while cursor.nextset():
            continue
        return cursor.fetchall() if cursor.description is not None else []

    def copy_in(self, statement: str, chunks: Iterable[bytes]) -> int:
        """Send the chunks to a COPY; return the number of rows that it added."""
        self.flush()
        with time_limit(self.connection, self.timeout_s):
            self._pgconn.send_query(statement.encode())
            self._flush()
            if (result := self._next_result()) is None:
                raise psycopg.OperationalError("the connection is lost")
            if result.status != pq.ExecStatus.COPY_IN:
                self._require_success(result)
            try:
                for chunk in chunks:
                    while not self._pgconn.put_copy_data(chunk):
                        self._flush()
                    self._flush()
            except BaseException as error:
                with suppress(psycopg.Error):
                    self._end_copy(type(error).__name__.encode())
                raise
            return self._end_copy(None)

    def cancel(self) -> None:
        """Cancel the running statement, if there is one; cut the connection if that is not possible. Any thread."""
        if self.connection.closed:
            return
        try:
            self.connection.cancel_safe(timeout=CANCEL_TIMEOUT_S)
        except psycopg.Error:
            cut(self.connection)

    def call(self, work: Callable[[Connection], _Result]) -> _Result:
        """Return work(connection), which runs for at most timeout_s."""
        self.flush()
        with time_limit(self.connection, self.timeout_s):
            return work(self.connection)

    def close(self) -> None:
        self.connection.close()

    def _run(self, statements: Sequence[Statement]) -> list[pq.abc.PGresult]:
        if len(self._prepared) > PREPARED_MAX:
            self._prepared.clear()
            self.execute("DEALLOCATE ALL")
        pgconn = self._pgconn
        pgconn.enter_pipeline_mode()
        expected: list[str | None] = []  # what is prepared; None for a statement that runs
        for text, values in statements:
            if (name := self._prepared.get(text)) is None:
                self._names += 1
                name = self._prepared[text] = b"s%d" % self._names
                pgconn.send_prepare(name, text.encode())
                expected.append(text)
            pgconn.send_query_prepared(name, values, [1] * len(values), result_format=0)
            expected.append(None)
        pgconn.pipeline_sync()
        with time_limit(self.connection, self.timeout_s):
            results, error = self._collect(expected)
        pgconn.exit_pipeline_mode()
        if error is not None:
            raise error
        return results

    def _collect(self, expected: Sequence[str | None]) -> tuple[list[pq.abc.PGresult], psycopg.Error | None]:
        self._flush()
        results: list[pq.abc.PGresult] = []
        error: psycopg.Error | None = None
        for prepared in expected:
            if (result := self._next_result()) is None:
                raise psycopg.OperationalError("the connection is lost")
            if result.status == pq.ExecStatus.FATAL_ERROR and error is None:
                error = psycopg.errors.error_from_result(result)
            if prepared is None:
                results.append(result)
            elif result.status != pq.ExecStatus.COMMAND_OK:
                self._prepared.pop(prepared, None)
            self._next_result()
        end = self._next_result()
        if end is None or end.status != pq.ExecStatus.PIPELINE_SYNC:
            error = error or psycopg.OperationalError("the connection is lost")
        return results, error

    def _end_copy(self, reason: bytes | None) -> int:
        while not self._pgconn.put_copy_end(reason):
            self._flush()
        return self._require_success()

    def _require_success(self, *first: pq.abc.PGresult) -> int:
        """Read all remaining results; raise the first error; return the number of rows of the last one."""
        self._flush()
        rows = 0
        for result in [*first, *iter(self._next_result, None)]:
            if result.status == pq.ExecStatus.FATAL_ERROR:
                raise psycopg.errors.error_from_result(result)
            rows = result.command_tuples or 0
        return rows

    def _flush(self) -> None:
        while self._pgconn.flush():
            for _, event in self._poll_write.poll():
                if event & ~select.POLLOUT:
                    self._pgconn.consume_input()

    def _next_result(self) -> pq.abc.PGresult | None:
        while self._pgconn.is_busy():
            self._poll.poll()
            self._pgconn.consume_input()
        return self._pgconn.get_result()
