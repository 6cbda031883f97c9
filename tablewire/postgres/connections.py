"""Connections to PostgreSQL, and error texts that never hold a password.

URIs come here with their `${NAME}` already expanded (tablewire.etcd.records); libpq itself adds PGPASSWORD, the passfile and the
service file. Blocking; any thread; a connection belongs to the thread that uses it.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

import psycopg
from psycopg import conninfo

from tablewire.errors import OperatingError
from tablewire.runtime.uris import redact_uri

CONNECT_TIMEOUT_S = 5
TCP_USER_TIMEOUT_MS = 10_000
"""A peer that acknowledges nothing for this long is gone; without it a cut link holds a connection for minutes."""
KEEPALIVE_IDLE_S = 5
SCHEMES = ("postgresql", "postgres")

Connection: TypeAlias = psycopg.Connection[tuple[object, ...]]
_Result = TypeVar("_Result")


class SourceUnavailableError(OperatingError):
    """The server did not answer or ended the connection: worth another try."""


class StatementError(OperatingError):
    """The server refused a statement."""


def parse_uri(uri: str) -> dict[str, str]:
    """The parameters of a connection URI, OperatingError (without the URI's text) if it cannot be parsed."""
    if uri.partition("://")[0] not in SCHEMES:
        raise OperatingError(f"{redact_uri(uri)}: not a postgresql:// URI")
    path = uri.partition("://")[2].partition("?")[0].partition("/")[2]
    if "@" in path:
        # libpq would take a part of the password for the port and the rest for the database, and show both in its errors.
        raise OperatingError(f"{redact_uri(uri)}: not a valid connection URI: '/' and '@' in a password are written %2F and %40")
    try:
        parameters = conninfo.conninfo_to_dict(uri)
    except psycopg.ProgrammingError as error:
        # libpq quotes the part that it did not understand, which may be the password: the cause is dropped on purpose.
        raise OperatingError(f"{redact_uri(uri)}: not a valid connection URI ({_class_of(error)})") from None
    return {key: str(value) for key, value in parameters.items() if value is not None}


def server_name(uri: str) -> str:
    """`host:port/dbname` of a URI, for texts."""
    parameters = parse_uri(uri)
    host = parameters.get("host") or parameters.get("hostaddr") or "localhost"
    return f"{host}:{parameters.get('port', '5432')}/{parameters.get('dbname') or parameters.get('user', '')}"


def connect(uri: str, *, application_name: str, replication: bool = False) -> Connection:
    """A new connection in autocommit, UTF-8 on both sides, with dead-peer detection; SourceUnavailableError if there is none.

    replication: a walsender that also takes SQL (`replication=database`). What the URI itself sets wins over our defaults.
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
        return psycopg.connect(conninfo.make_conninfo("", **parameters), autocommit=True)
    except psycopg.Error as error:
        raise SourceUnavailableError(f"{server_name(uri)}: {error_text(error)}") from None


def cut(connection: Connection) -> None:
    """Ends the connection under whoever waits on it: they get an OperationalError at once, even if the server never answers. Any
    thread; the connection must still be closed by its own."""
    try:
        with socket.socket(fileno=os.dup(connection.pgconn.socket)) as twin:
            twin.shutdown(socket.SHUT_RDWR)
    except (OSError, psycopg.Error):
        return  # it is closed already


@contextmanager
def time_limit(connection: Connection, limit_s: float) -> Iterator[None]:
    """Cuts the connection when the block takes longer. A server that hangs keeps none of the limits that it was given itself."""
    lock = threading.Lock()
    is_over = False

    def end() -> None:
        with lock:
            if not is_over:
                cut(connection)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            is_over = True


class ReconnectingConnection:
    """A connection that is opened when it is first used, and again after it was lost. One thread; `cut` is for any.

    set_up is called with each new connection. limit_s: how long set_up and one piece of work may take together; set it above
    the server's own limits, so that it only ends what a server that hangs no longer can.
    """

    def __init__(self, uri: str, *, application_name: str, set_up: Callable[[Connection], object], limit_s: float) -> None:
        self._uri = uri
        self._application_name = application_name
        self._set_up = set_up
        self._limit_s = limit_s
        self._connection: Connection | None = None
        self._is_cut = False

    def run(self, what: str, work: Callable[[Connection], _Result]) -> _Result:
        """Return work(connection); run it once more, on a new connection, when an earlier call opened this one and it is lost.

        Raise SourceUnavailableError when the connection fails, StatementError for another error of the server; their text
        begins with the server and "cannot <what>".
        """
        is_new = self._connection is None
        connection = self._connection = self._connection or connect(self._uri, application_name=self._application_name)
        try:
            with time_limit(connection, self._limit_s):
                if is_new:
                    self._set_up(connection)
                return work(connection)
        except psycopg.Error as error:
            is_lost = connection.closed or is_connection_loss(error)
            if is_lost or is_new:
                self.close()
            if not is_lost or is_new or self._is_cut:
                kind = SourceUnavailableError if is_lost else StatementError
                raise kind(f"{server_name(self._uri)}: cannot {what}: {error_text(error)}") from None
        return self.run(what, work)

    def cut(self) -> None:
        """End the work that is running; it is not tried again."""
        self._is_cut = True
        if (connection := self._connection) is not None:
            cut(connection)

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def error_text(error: psycopg.Error) -> str:
    """One line: what the server (or libpq) said, with its detail, without passwords."""
    diagnostic = error.diag
    text = diagnostic.message_primary or next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    if diagnostic.message_detail:
        text = f"{text} ({' '.join(diagnostic.message_detail.split())})"
    return redact_uri(" ".join(text.split()))


def is_connection_loss(error: psycopg.Error) -> bool:
    """Whether the error ended the connection, or the server is going away or starting: another try may go well."""
    code = error.sqlstate
    if code is None:
        return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return code.startswith(("08", "57P"))


def quote_name(name: str) -> str:
    """A quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def quote_table(schema: str, name: str) -> str:
    return f"{quote_name(schema)}.{quote_name(name)}"


def full_table_name(schema: str, name: str) -> str:
    """`schema.name` for people and as a key: a part that holds a dot or a quote is quoted, so that no two tables share one."""
    return ".".join(quote_name(part) if "." in part or '"' in part else part for part in (schema, name))


def quote_text(text: str) -> str:
    """A quoted SQL string that does not depend on standard_conforming_strings."""
    escaped = text.replace("\\", "\\\\").replace("'", "''")
    return f"E'{escaped}'" if "\\" in text else f"'{escaped}'"


def _class_of(error: Exception) -> str:
    return type(error).__name__
