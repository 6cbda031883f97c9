"""The logical replication protocol and pgoutput (protocol version 1), as far as they are used here. Pure.

A **frame** is one CopyData message of the stream, kept whole: XLogData (`w`, start 8, end 8, clock 8,
then a pgoutput message at FRAME_HEADER) or a keepalive (`k`, end 8, clock 8, reply 1). Row changes stay
frames until the sink's writer needs their values, so the stream's thread spends about a microsecond on
each.

A **value** is `length (4 bytes, big endian) + data`, as in COPY BINARY and binary arrays. NULL is
NULL_VALUE; None is a TOAST value that did not change and was not sent.

For any bytes, the readers return a result or raise WireError.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TypeAlias, TypeVar

from tablewire.errors import OperatingError
from tablewire.model.ids import Ts

FRAME_HEADER = 25
XLOG_DATA, NEW_ROW = b"wN"
BEGIN, COMMIT, RELATION, INSERT, UPDATE, DELETE, TRUNCATE, MESSAGE = b"BCRIUDTM"

NULL_VALUE = b"\xff\xff\xff\xff"
EPOCH_2000_US = 946_684_800_000_000
"""PostgreSQL counts microseconds from 2000-01-01; this is that instant since 1970."""

Value: TypeAlias = "bytes | None"

_READ_BEGIN = struct.Struct(">QqI")
_READ_COMMIT = struct.Struct(">BQQq")
_READ_KEEPALIVE = struct.Struct(">QqB")
_STATUS = struct.Struct(">cQQQqB")
_UNSIGNED = struct.Struct(">I")
_SIGNED_PAIR = struct.Struct(">Ii")
_SIGNED_LONG = struct.Struct(">q")
_SENT_AT = 17
"""The offset of the clock in XLogData."""
_UNREADABLE = (struct.error, IndexError, ValueError)  # UnicodeDecodeError is a ValueError
_Result = TypeVar("_Result")


class WireError(OperatingError):
    """The bytes do not follow the protocol: they come from another server, or were damaged."""


@dataclass(frozen=True, slots=True)
class RelationColumn:
    """A column in the stream. is_identity: it is part of the replica identity."""

    name: str
    type_oid: int
    type_modifier: int
    is_identity: bool


@dataclass(frozen=True, slots=True)
class Relation:
    """The shape of a table's rows from this point in the stream on. is_binary: of values whose type has a binary form."""

    relation_id: int
    schema: str
    name: str
    replica_identity: str
    columns: tuple[RelationColumn, ...]
    is_binary: bool = True


@dataclass(frozen=True, slots=True)
class Transaction:
    """A source transaction.

    commit_ts: the start of its commit record; a transaction boundary p is after the transaction exactly
    if commit_ts < p. commit_us: microseconds since 1970. lag_us: the time from the commit until the
    source sent the beginning, by the source's clock.
    """

    commit_ts: Ts
    commit_us: int
    xid: int
    lag_us: int = 0


@dataclass(eq=False, slots=True)
class Part:
    """Changes of one table by one source transaction, with one shape; usually all of them.

    If the table changes shape inside the transaction, there are several parts, and also if the
    transaction is handed on before its commit was read. is_last: the last part of the transaction for
    this table. end_ts: the end of the commit record, 0 until it is known. size: bytes, including an
    estimate of Python's overhead.
    """

    relation: Relation
    frames: Sequence[bytes]
    size: int
    transaction: Transaction
    end_ts: Ts
    is_last: bool


def _reader(what: str) -> Callable[[Callable[[bytes], _Result]], Callable[[bytes], _Result]]:
    """Make a function that reads a frame raise WireError for a malformed one. Not for single changes: it costs too much."""

    def decorate(read: Callable[[bytes], _Result]) -> Callable[[bytes], _Result]:
        @wraps(read)
        def checked(frame: bytes) -> _Result:
            try:
                return read(frame)
            except _UNREADABLE as error:
                raise _unreadable(what, frame, error) from None

        return checked

    return decorate


def _unreadable(what: str, frame: bytes, error: Exception) -> WireError:
    return WireError(f"logical replication: {what} of {len(frame)} bytes cannot be read: {error}")


@_reader("a begin")
def read_begin(frame: bytes) -> Transaction:
    commit_ts, commit_us, xid = _READ_BEGIN.unpack_from(frame, FRAME_HEADER + 1)
    (sent_us,) = _SIGNED_LONG.unpack_from(frame, _SENT_AT)
    return Transaction(commit_ts, commit_us + EPOCH_2000_US, xid, sent_us - commit_us)


@_reader("a commit")
def read_commit_end(frame: bytes) -> Ts:
    """Return the position right after the commit record."""
    end: int = _READ_COMMIT.unpack_from(frame, FRAME_HEADER + 1)[2]
    return end


@_reader("a keepalive")
def read_keepalive(frame: bytes) -> tuple[Ts, bool]:
    """Return (the position up to which everything has been sent, whether a reply is requested)."""
    end, _, reply = _READ_KEEPALIVE.unpack_from(frame, 1)
    return end, bool(reply)


def status_update(received: Ts, flushed: Ts, clock_us: int, wants_answer: bool = False) -> bytes:
    """Return a standby status update. clock_us: since 1970. wants_answer: the walsender sends a keepalive at once."""
    return _STATUS.pack(b"r", received, flushed, flushed, clock_us - EPOCH_2000_US, wants_answer)


@_reader("a relation")
def read_relation(frame: bytes) -> Relation:
    at = FRAME_HEADER + 1
    (relation_id,) = _UNSIGNED.unpack_from(frame, at)
    schema, at = _read_string(frame, at + 4)
    name, at = _read_string(frame, at)
    identity = chr(frame[at])
    count = int.from_bytes(frame[at + 1 : at + 3], "big")
    at += 3
    columns = []
    for _ in range(count):
        flags = frame[at]
        column, at = _read_string(frame, at + 1)
        type_oid, modifier = _SIGNED_PAIR.unpack_from(frame, at)
        at += 8
        columns.append(RelationColumn(column, type_oid, modifier, bool(flags & 1)))
    # In the protocol an empty schema means pg_catalog, which cannot be published.
    return Relation(relation_id, schema or "pg_catalog", name, identity, tuple(columns))


def _read_string(frame: bytes, at: int) -> tuple[str, int]:
    end = frame.index(0, at)
    return frame[at:end].decode(), end + 1


@_reader("a truncate")
def read_truncated(frame: bytes) -> list[bytes]:
    """Return the relation ids of a TRUNCATE, as the 4 bytes of the wire."""
    (count,) = _UNSIGNED.unpack_from(frame, FRAME_HEADER + 1)
    at = FRAME_HEADER + 6
    if len(frame) < at + 4 * count:
        raise ValueError(f"{count} relations do not fit into it")
    return [frame[at + 4 * i : at + 4 * i + 4] for i in range(count)]


@_reader("a truncate")
def read_truncate_flags(frame: bytes) -> int:
    """Return the options of a TRUNCATE: 1 for CASCADE, 2 for RESTART IDENTITY."""
    return frame[FRAME_HEADER + 5]


@_reader("a message")
def read_message(frame: bytes) -> tuple[bool, str, bytes]:
    """Return (whether it is part of a transaction, its prefix, its content) of a logical message."""
    is_transactional = bool(frame[FRAME_HEADER + 1])
    prefix, at = _read_string(frame, FRAME_HEADER + 10)
    (size,) = _UNSIGNED.unpack_from(frame, at)
    content = frame[at + 4 : at + 4 + size]
    if len(content) < size:
        raise ValueError("its content is longer than the frame")
    return is_transactional, prefix, content


def read_row(frame: bytes, at: int) -> tuple[list[Value], int]:
    """Return the values of the tuple that starts at `at`, and where it ends; raise IndexError or ValueError if there is none."""
    count = frame[at] << 8 | frame[at + 1]
    at += 2
    values: list[Value] = []
    append = values.append
    from_bytes = int.from_bytes
    for _ in range(count):
        kind = frame[at]
        if kind == 98 or kind == 116:  # b, t
            end = at + 5 + from_bytes(frame[at + 1 : at + 5], "big")
            append(frame[at + 1 : end])
            at = end
        elif kind == 110:  # n
            append(NULL_VALUE)
            at += 1
        elif kind == 117:  # u
            append(None)
            at += 1
        else:
            raise ValueError(f"a value of kind {kind}")
    if at > len(frame):
        raise ValueError("a value is longer than the frame")
    return values, at


def read_change(frame: bytes) -> tuple[int, list[Value] | None, list[Value] | None]:
    """Return (INSERT | UPDATE | DELETE | TRUNCATE, the old key or row if it was sent, the new row if there is one)."""
    try:
        kind = frame[FRAME_HEADER]
        at = FRAME_HEADER + 5
        if kind == INSERT:
            return kind, None, read_row(frame, at + 1)[0]
        if kind == DELETE:
            return kind, read_row(frame, at + 1)[0], None
        if kind == UPDATE:
            old: list[Value] | None = None
            if frame[at] != NEW_ROW:
                old, at = read_row(frame, at + 1)
            return kind, old, read_row(frame, at + 1)[0]
        return kind, None, None
    except _UNREADABLE as error:
        raise _unreadable("a change", frame, error) from None
