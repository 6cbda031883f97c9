"""Connections to PostgreSQL, and error texts that never contain a password.

`${NAME}` in a URI is expanded before it comes here (tablewire.etcd.records); libpq itself reads
PGPASSWORD, the password file and the service file. All calls block; a connection belongs to the
thread that uses it.
"""

from __future__ import annotations

import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import psycopg
from psycopg import abc, adapt, conninfo, sql

from tablewire.errors import OperatingError
from tablewire.postgres.lsn import parse_lsn
from tablewire.runtime.shutdown import run_thread
from tablewire.runtime.uris import redact_uri

CONNECT_TIMEOUT_S = 5
TCP_USER_TIMEOUT_MS = 10_000
"""A peer that acknowledges nothing for this long is gone; otherwise a cut link keeps a connection for minutes."""
KEEPALIVE_IDLE_S = 5
CLOSE_TIMEOUT_S = 1.0
_FULL_NAME = re.compile(r'("(?:[^"]|"")*"|[^".]*)\.("(?:[^"]|"")*"|[^".]*)', re.DOTALL)
SCHEMES = ("postgresql", "postgres")
_RAW = "SQL_ASCII"
_TEXT_TYPES = ("text", "varchar", "name", "bpchar", '"char"')

SESSION_SETTINGS: Mapping[str, str] = {
    # What ends a statement, a transaction or the session; first, so that they lift the timeout of this statement
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "transaction_timeout": "0",
    "exit_on_error": "off",
    # The text form of values, and how text is read
    "datestyle": "ISO, YMD",
    "intervalstyle": "postgres",
    "timezone": "UTC",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "lc_monetary": "'C'",
    "lc_numeric": "'C'",
    "lc_time": "'C'",
    "xmloption": "content",
    "array_nulls": "on",
    "quote_all_identifiers": "off",
    # The meaning of statements, and what a query returns
    "search_path": "''",
    "row_security": "off",
    "standard_conforming_strings": "on",
    "backslash_quote": "safe_encoding",
    "transform_null_equals": "off",
    "gin_fuzzy_search_limit": "0",
    "default_transaction_isolation": "'read committed'",
    "default_transaction_read_only": "off",
    "default_transaction_deferrable": "off",
    # A walsender of PostgreSQL 18 reports changes that it omits as a warning.
    "client_min_messages": "warning",
}
"""The settings of every session, so that none of a role, a database or a server changes a value, the meaning of a statement, or
ends a copy. With row_security off, a query that a policy would filter is an error. lc_messages is left: no text is compared."""
_SETTING_SINCE: Mapping[str, int] = {"idle_session_timeout": 140000, "transaction_timeout": 170000}
"""The server versions that introduced some of them."""

Connection: TypeAlias = psycopg.Connection[tuple[Any, ...]]
_Result = TypeVar("_Result")


class SourceUnavailableError(OperatingError):
    """The server is unreachable or ended the connection; a retry may succeed."""


class StatementError(OperatingError):
    """The server refused a statement."""


class _LsnLoader(adapt.Loader):
    """Reads a pg_lsn column as a number."""

    def load(self, data: abc.Buffer) -> int:
        return parse_lsn(bytes(data).decode())


class _RawTextLoader(adapt.Loader):
    """Reads text of a connection that neither checks nor converts it."""

    def load(self, data: abc.Buffer) -> str:
        return bytes(data).decode(errors="backslashreplace")


def parse_uri(uri: str) -> dict[str, str]:
    """Return the parameters of a connection URI; raise OperatingError, without the text of the URI, if it is malformed."""
    if uri.partition("://")[0] not in SCHEMES:
        raise OperatingError(f"{redact_uri(uri)}: not a postgresql:// or postgres:// URI")
    path = uri.partition("://")[2].partition("?")[0].partition("/")[2]
    if "@" in path:
        # libpq would take part of the password for the port and the rest for the database, and show both in its errors.
        raise OperatingError(f"{redact_uri(uri)}: not a valid connection URI: '/' and '@' in a password are written %2F and %40")
    try:
        parameters = conninfo.conninfo_to_dict(uri)
    except psycopg.ProgrammingError as error:
        # libpq quotes the part that it did not understand, which may be the password: the cause is dropped on purpose.
        raise OperatingError(f"{redact_uri(uri)}: not a valid connection URI ({type(error).__name__})") from None
    return {key: str(value) for key, value in parameters.items() if value is not None}


def server_name(uri: str) -> str:
    """Return `host:port/dbname` of a URI, for messages."""
    parameters = parse_uri(uri)
    host = parameters.get("host") or parameters.get("hostaddr") or "localhost"
    return f"{host}:{parameters.get('port', '5432')}/{parameters.get('dbname') or parameters.get('user', '')}"


def settings_sql(server_version: int, changes: Mapping[str, str | int]) -> str:
    """Return the statements that set SESSION_SETTINGS with these changes. Pure."""
    settings = {**SESSION_SETTINGS, **changes}
    return "; ".join(f"SET {name} = {value}" for name, value in settings.items() if server_version >= _SETTING_SINCE.get(name, 0))


def connect(
    uri: str,
    *,
    application_name: str,
    replication: bool = False,
    is_raw: bool = False,
    settings: Mapping[str, str | int] | None = None,
) -> Connection:
    """Open a connection in autocommit mode that detects dead peers; raise SourceUnavailableError if that fails.

    The encoding is UTF-8 on both sides, and pg_lsn columns are read as numbers. replication: a
    walsender that also accepts SQL (`replication=database`). is_raw: a server whose encoding is SQL_ASCII
    neither checks nor converts what it sends and receives, so that one row that is not UTF-8 stops
    nothing else; statements with other characters than ASCII must be bytes. settings: changes to
    SESSION_SETTINGS.
    Parameters of the URI override the defaults of the connection, not the settings: these are sent
    as statements, since poolers reject options at the start of a session.
    """
    parameters: dict[str, str] = {
        "connect_timeout": str(CONNECT_TIMEOUT_S),
        "tcp_user_timeout": str(TCP_USER_TIMEOUT_MS),
        "keepalives_idle": str(KEEPALIVE_IDLE_S),
        "keepalives_interval": "2",
        "keepalives_count": "3",
        **parse_uri(uri),
        "application_name": application_name,
        "client_encoding": "UTF8",
    }
    if replication:
        parameters["replication"] = "database"
    try:
        connection = psycopg.connect(conninfo.make_conninfo("", **parameters), autocommit=True)
        try:
            with time_limit(connection, CONNECT_TIMEOUT_S):
                connection.execute(settings_sql(connection.info.server_version, settings or {}).encode())
                if is_raw and connection.info.parameter_status("server_encoding") == _RAW:
                    connection.execute(f"SET client_encoding = '{_RAW}'")
                    for name in _TEXT_TYPES:
                        connection.adapters.register_loader(name, _RawTextLoader)
        except psycopg.Error:
            connection.close()
            raise
    except psycopg.Error as error:
        raise SourceUnavailableError(f"{server_name(uri)}: {error_text(error)}") from None
    connection.adapters.register_loader("pg_lsn", _LsnLoader)
    return connection


def fetch_value(connection: Connection, query: str | sql.Composed, parameters: Sequence[object] = ()) -> Any:
    """Return the first column of the first row, None if the query returns no row."""
    row = connection.execute(query, parameters).fetchone()
    return None if row is None else row[0]


def cut(connection: Connection) -> None:
    """End the connection below the thread that waits on it, which gets an OperationalError at once. Any thread.

    This works even if the server never answers. The owning thread must still close the connection.
    """
    try:
        with socket.socket(fileno=os.dup(connection.pgconn.socket)) as twin:
            twin.shutdown(socket.SHUT_RDWR)
    except (OSError, psycopg.Error):
        return  # it is closed already


class _Watchdog:
    """The deadlines of all connections of this process, on one thread: a Timer for each would be a thread for each."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._deadlines: dict[object, tuple[float, Connection]] = {}
        self._next_check = math.inf
        self._is_started = False

    def add(self, connection: Connection, limit_s: float) -> object:
        token, deadline = object(), time.monotonic() + limit_s
        with self._condition:
            self._deadlines[token] = (deadline, connection)
            if not self._is_started:
                self._is_started = True
                run_thread("postgres-deadlines", self._run)
            if deadline < self._next_check:
                self._condition.notify()
        return token

    def remove(self, token: object) -> bool:
        """Return whether the connection was not cut, and will not be."""
        with self._condition:
            return self._deadlines.pop(token, None) is not None

    def _run(self) -> None:
        with self._condition:
            while True:
                now = time.monotonic()
                for token, (deadline, connection) in list(self._deadlines.items()):
                    if deadline <= now:
                        del self._deadlines[token]
                        cut(connection)
                self._next_check = min((deadline for deadline, _ in self._deadlines.values()), default=math.inf)
                self._condition.wait(None if self._next_check == math.inf else self._next_check - now)


_watchdog = _Watchdog()


@contextmanager
def time_limit(connection: Connection, limit_s: float) -> Iterator[None]:
    """Cut the connection and raise OperationalError if the block takes longer: a hanging server ignores its own timeouts."""
    token = _watchdog.add(connection, limit_s)
    try:
        yield
    except psycopg.Error:
        if not _watchdog.remove(token):
            raise psycopg.OperationalError(f"the server did not answer within {limit_s:g} s") from None
        raise
    finally:
        _watchdog.remove(token)


class ReconnectingConnection:
    """A connection that is opened when it is first used, and again after it was lost. Any thread, one at a time.

    settings: changes to SESSION_SETTINGS. set_up is called with each new connection. limit_s: how long
    set_up and one call of `run` may take together; set it above the timeouts of the server, so that it
    only ends what a hanging server cannot. A call of `run` may have another limit.
    """

    def __init__(
        self,
        uri: str,
        *,
        application_name: str,
        limit_s: float,
        settings: Mapping[str, str | int] | None = None,
        set_up: Callable[[Connection], object] = lambda _: None,
    ) -> None:
        self._uri = uri
        self._application_name = application_name
        self._settings = settings
        self._set_up = set_up
        self._limit_s = limit_s
        self._connection: Connection | None = None
        self._lock = threading.Lock()
        self._is_closed = False

    def run(self, what: str, work: Callable[[Connection], _Result], limit_s: float | None = None) -> _Result:
        """Return work(connection); repeat it once, on a new connection, if an earlier call opened this one and it is lost.

        Raise SourceUnavailableError if the connection fails, StatementError for another error of
        the server; the text begins with the server and "cannot <what>".
        """
        with self._lock:
            try:
                return self._run(what, work, self._limit_s if limit_s is None else limit_s)
            finally:
                if self._is_closed:
                    self._drop()

    def _run(self, what: str, work: Callable[[Connection], _Result], limit_s: float) -> _Result:
        if self._is_closed:
            raise SourceUnavailableError(f"{server_name(self._uri)}: the connection is closed")
        is_new = self._connection is None
        connection = self._connection = self._connection or self._connect()
        try:
            with time_limit(connection, limit_s):
                if is_new:
                    self._set_up(connection)
                return work(connection)
        except psycopg.Error as error:
            is_lost = connection.closed or is_connection_loss(error)
            self._drop()
            if not is_lost or is_new or self._is_closed:
                kind = SourceUnavailableError if is_lost else StatementError
                raise kind(f"{server_name(self._uri)}: cannot {what}: {error_text(error)}") from None
        return self._run(what, work, limit_s)

    def _connect(self) -> Connection:
        return connect(self._uri, application_name=self._application_name, settings=self._settings)

    def close(self) -> None:
        """Close for good. A running call is cut after CLOSE_TIMEOUT_S; one that is connecting ends by itself."""
        self._is_closed = True
        if not self._lock.acquire(timeout=CLOSE_TIMEOUT_S):
            if (connection := self._connection) is not None:
                cut(connection)
            if not self._lock.acquire(timeout=CLOSE_TIMEOUT_S):
                return
        try:
            self._drop()
        finally:
            self._lock.release()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def error_text(error: psycopg.Error) -> str:
    """Return the message of the server (or libpq) with its detail, on one line and without passwords."""
    diagnostic = error.diag
    text = diagnostic.message_primary or next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    if diagnostic.message_detail:
        text = f"{text} ({diagnostic.message_detail})"
    return redact_uri(" ".join(text.split()))


def policy_hint(error: psycopg.Error, side: str) -> str:
    """Return what to do if the error is that row-level security would hide rows of a table; empty for other errors.

    side: source or sink. The server's text is in its own language, so the function that raised the error is compared.
    """
    if error.sqlstate != "42501" or error.diag.source_function != "check_enable_rls":
        return ""
    return f": give the role of the {side} BYPASSRLS, or, if it owns the table, ALTER TABLE ... NO FORCE ROW LEVEL SECURITY"


def is_connection_loss(error: psycopg.Error) -> bool:
    """Return whether the error ended the connection, or the server is starting or shutting down: a retry may succeed."""
    code = error.sqlstate
    if code is None:
        return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return code.startswith(("08", "57P"))


def quoted(*names: str) -> str:
    """Return the SQL identifier of these names, joined by dots."""
    return sql.Identifier(*names).as_string(None)


def full_table_name(schema: str, name: str) -> str:
    """Return `schema.name` for messages and keys; a part with a dot or a quote is quoted, so that names are unique."""
    return ".".join(quoted(part) if "." in part or '"' in part else part for part in (schema, name))


def split_table_name(full_name: str) -> tuple[str, str] | None:
    """Return schema and name of what `full_table_name` returned; None for what it cannot have returned."""
    if (match := _FULL_NAME.fullmatch(full_name)) is None:
        return None
    schema, name = (part[1:-1].replace('""', '"') if part.startswith('"') else part for part in match.groups())
    return schema, name
