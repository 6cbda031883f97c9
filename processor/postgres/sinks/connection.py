"""A connection to a PostgreSQL sink, used through psycopg's `pq` layer: pipelines of prepared statements with binary values that
came from the source as they are, and COPY streams.

One thread owns it; `cancel` is for any thread. Every wait is on the socket, so that other threads run meanwhile, and is bounded
by the server's statement_timeout and by CLIENT_TIMEOUT_S. Errors are psycopg's; `sink_error` says what they mean for a table.
"""

from __future__ import annotations

import select
import time
from collections.abc import Iterable, Sequence

import psycopg
from psycopg import pq

from processor.postgres.sinks import SinkUnavailableError
from tablewire.errors import OperatingError
from tablewire.postgres.catalogue import TableSchema, describe_named_table
from tablewire.postgres.connections import connect, cut, error_text, is_connection_loss, time_limit

CLIENT_TIMEOUT_S = 120.0
"""Longer than the server's own limits: only a server that does not keep them is given up by this."""
COPY_TIMEOUT_S = 24 * 3600.0
"""The same for the first copy of a table, whose statements have no limit at the server."""
SETUP_TIMEOUT_S = 10.0
"""For the settings of a new connection."""
CANCEL_TIMEOUT_S = 2.0
PREPARED_MAX = 500
IDLE_TRANSACTION_TIMEOUT_MS = 60_000
LOCK_TIMEOUT_MS = 10_000
RETRY_CODES = frozenset(
    {
        "40001",  # serialization failure
        "40P01",  # deadlock
        "55P03",  # lock not available in time
        "57014",  # cancelled, by a timeout or an operator
        "25P03",  # idle in transaction for too long
        "53000",
        "53100",  # disk full
        "53200",  # out of memory
        "53300",  # too many connections
        "53400",
        "58030",  # an I/O error
        "25006",  # read-only: a failover may be under way
    }
)

Statement = tuple[str, Sequence["bytes | None"]]
"""SQL and its values in binary format (without their length)."""


def sink_error(error: psycopg.Error, where: str) -> OperatingError:
    """What an error of the sink means: SinkUnavailableError if another try may go well."""
    text = f"{where}: {error_text(error)}"
    if is_connection_loss(error) or error.sqlstate in RETRY_CODES:
        return SinkUnavailableError(text)
    return OperatingError(text)


class SinkConnection:
    """See the module."""

    def __init__(self, uri: str, application_name: str, statement_timeout_ms: int) -> None:
        self.connection = connect(uri, application_name=application_name)
        self.connection.prepare_threshold = None  # prepared statements are kept here, by name
        self.patience_s = CLIENT_TIMEOUT_S
        """How long one wait for the server may last."""
        self._pgconn = self.connection.pgconn
        self._poll = select.poll()
        self._poll.register(self._pgconn.socket, select.POLLIN)
        self._poll_write = select.poll()
        self._poll_write.register(self._pgconn.socket, select.POLLIN | select.POLLOUT)
        self._prepared: dict[str, bytes] = {}
        self._names = 0
        try:
            with time_limit(self.connection, SETUP_TIMEOUT_S):
                self._set_up(statement_timeout_ms)
        except psycopg.Error:
            self.connection.close()
            raise

    def _set_up(self, statement_timeout_ms: int) -> None:
        self.connection.execute(
            (
                f"SET search_path = ''; SET statement_timeout = {statement_timeout_ms};"
                f" SET lock_timeout = {LOCK_TIMEOUT_MS};"
                f" SET idle_in_transaction_session_timeout = {IDLE_TRANSACTION_TIMEOUT_MS};"
                # Batches join small sets of keys with tables of any size, whose statistics say nothing about the batch.
                " SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off; SET jit = off;"
                " SET timezone = 'UTC'; SET plan_cache_mode = force_generic_plan"
            ).encode()
        )
        # A position that the sink has confirmed must be durable; a stronger setting than "on" is left alone.
        self.connection.execute(
            b"SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
        )
        self._become_replica()

    def _become_replica(self) -> None:
        """Triggers and foreign keys fired at the source already; switching them off needs a privilege that may be missing."""
        try:
            self.connection.execute(b"SET session_replication_role = replica")
        except psycopg.errors.InsufficientPrivilege:
            return

    @property
    def is_broken(self) -> bool:
        return self._pgconn.status != pq.ConnStatus.OK

    def run(self, statements: Sequence[Statement]) -> list[pq.abc.PGresult]:
        """The statements in one pipeline, in order; a result each. The first error is raised, nothing behind it has run."""
        if len(self._prepared) > PREPARED_MAX:
            self._forget_prepared()
        pgconn = self._pgconn
        pgconn.enter_pipeline_mode()
        expected: list[bool] = []
        for sql, values in statements:
            name = self._prepared.get(sql)
            if name is None:
                self._names += 1
                name = self._prepared[sql] = b"s%d" % self._names
                pgconn.send_prepare(name, sql.encode())
                expected.append(False)
            pgconn.send_query_prepared(name, values, [1] * len(values), result_format=0)
            expected.append(True)
        pgconn.pipeline_sync()
        results, error = self._collect(expected)
        pgconn.exit_pipeline_mode()
        if error is not None:
            self._prepared.clear()  # what stood behind the error was not prepared; `rollback` frees the others
            raise error
        return results

    def _collect(self, expected: Sequence[bool]) -> tuple[list[pq.abc.PGresult], psycopg.Error | None]:
        self._flush()
        results: list[pq.abc.PGresult] = []
        error: psycopg.Error | None = None
        for is_statement in expected:
            result = self._next_result()
            if result is None:
                raise psycopg.OperationalError("the connection is lost")
            if result.status == pq.ExecStatus.FATAL_ERROR and error is None:
                error = psycopg.errors.error_from_result(result)
            if is_statement:
                results.append(result)
            self._next_result()
        end = self._next_result()
        if end is None or end.status != pq.ExecStatus.PIPELINE_SYNC:
            error = error or psycopg.OperationalError("the connection is lost")
        return results, error

    def rollback(self) -> None:
        """Ends the open transaction, and forgets every prepared statement: it may not know all of them any more."""
        self._prepared.clear()
        self.execute("ROLLBACK; DEALLOCATE ALL")

    def execute(self, sql: str) -> list[pq.abc.PGresult]:
        """One or more statements without values; a result each. The first error is raised."""
        self._pgconn.send_query(sql.encode())
        self._flush()
        return self._results()

    def copy_in(self, sql: str, chunks: Iterable[bytes]) -> list[pq.abc.PGresult]:
        """Statements of which the last is COPY … FROM STDIN, then its data; the results of all."""
        pgconn = self._pgconn
        pgconn.send_query(sql.encode())
        self._flush()
        results: list[pq.abc.PGresult] = []
        while True:
            result = self._next_result()
            if result is None:
                raise psycopg.OperationalError("COPY did not start")
            if result.status == pq.ExecStatus.COPY_IN:
                break
            if result.status == pq.ExecStatus.FATAL_ERROR:
                self._results()
                raise psycopg.errors.error_from_result(result)
            results.append(result)
        try:
            for chunk in chunks:
                while not pgconn.put_copy_data(chunk):
                    self._flush()
                self._flush()
        except BaseException as error:
            if not self.is_broken:
                self._end_copy(type(error).__name__.encode())
                try:
                    self._results()
                except psycopg.Error as failure:
                    if isinstance(error, psycopg.Error):
                        raise failure from None  # the server's own reason for a COPY that broke
            raise
        self._end_copy(None)
        return [*results, *self._results()]

    def cancel(self) -> None:
        """Ends the statement that is running, if there is one; a server that cannot be asked loses the connection. Any thread."""
        if self.connection.closed:
            return
        try:
            self.connection.cancel_safe(timeout=CANCEL_TIMEOUT_S)
        except psycopg.Error:
            cut(self.connection)

    def describe(self, schema: str, name: str) -> TableSchema | None:
        """The table of this name here, None when there is none."""
        with time_limit(self.connection, self.patience_s):
            return describe_named_table(self.connection, schema, name)

    def close(self) -> None:
        self.connection.close()

    def _end_copy(self, reason: bytes | None) -> None:
        while not self._pgconn.put_copy_end(reason):
            self._flush()
        self._flush()

    def _forget_prepared(self) -> None:
        self._prepared.clear()
        self.execute("DEALLOCATE ALL")

    def _results(self) -> list[pq.abc.PGresult]:
        results: list[pq.abc.PGresult] = []
        error: psycopg.Error | None = None
        while (result := self._next_result()) is not None:
            if result.status == pq.ExecStatus.FATAL_ERROR and error is None:
                error = psycopg.errors.error_from_result(result)
            results.append(result)
        if error is not None:
            raise error
        return results

    def _flush(self) -> None:
        pgconn = self._pgconn
        deadline = time.monotonic() + self.patience_s
        while pgconn.flush():
            for _, event in self._poll_write.poll(1000):
                if event & ~select.POLLOUT:
                    pgconn.consume_input()
            self._check(deadline)

    def _next_result(self) -> pq.abc.PGresult | None:
        pgconn = self._pgconn
        deadline = time.monotonic() + self.patience_s
        while pgconn.is_busy():
            if self._poll.poll(1000):
                pgconn.consume_input()
            else:
                self._check(deadline)
        return pgconn.get_result()

    def _check(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            self.close()
            raise psycopg.OperationalError(f"the sink did not answer for {self.patience_s:g} s")
