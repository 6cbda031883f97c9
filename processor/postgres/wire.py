"""The logical replication protocol and pgoutput (protocol version 1), as far as it is read here. Pure.

A **frame** is one CopyData message of the stream, kept whole: XLogData (`w`, start 8, end 8, clock 8, then a pgoutput message at
FRAME_HEADER) or a keepalive (`k`, end 8, clock 8, reply 1). Row changes stay frames until the sink's writer needs their values,
so that the stream's thread spends about a microsecond on each. The start position in a frame's header is the position of that
change in the WAL.

A **value** is `length (4 bytes, big endian) + data`, which is what COPY BINARY and binary arrays hold too; NULL is NULL_VALUE,
and None stands for a TOAST value that did not change and was not sent.

Whatever the bytes are, the readers return or raise WireError.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from tablewire.errors import OperatingError
from tablewire.model.ids import Ts

FRAME_HEADER = 25
XLOG_DATA = 0x77  # w
KEEPALIVE = 0x6B  # k
BEGIN = 0x42
COMMIT = 0x43
RELATION = 0x52
INSERT = 0x49
UPDATE = 0x55
DELETE = 0x44
TRUNCATE = 0x54
OLD_KEY = 0x4B
OLD_ROW = 0x4F
NEW_ROW = 0x4E

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
_UNSIGNED_LONG = struct.Struct(">Q")
_SIGNED_LONG = struct.Struct(">q")
_SENT_AT = 17
"""Where an XLogData's clock stands."""


_UNREADABLE = (struct.error, IndexError, ValueError)  # UnicodeDecodeError is a ValueError


class WireError(OperatingError):
    """The bytes are not what the protocol says they are: another server, or a fault on the way."""


@dataclass(frozen=True, slots=True)
class RelationColumn:
    """One column as the stream names it; is_identity: part of the replica identity."""

    name: str
    type_oid: int
    type_modifier: int
    is_identity: bool


@dataclass(frozen=True, slots=True)
class Relation:
    """The shape of a table's rows from here on in the stream."""

    relation_id: int
    schema: str
    name: str
    replica_identity: str
    columns: tuple[RelationColumn, ...]


@dataclass(frozen=True, slots=True)
class Transaction:
    """One source transaction. commit_ts: where its commit record starts: a position p of a transaction boundary lies behind the
    transaction exactly if commit_ts < p. commit_us: microseconds since 1970. lag_us: how long after the commit the source
    sent its beginning, by the source's own clock."""

    commit_ts: Ts
    commit_us: int
    xid: int
    lag_us: int = 0


class Part:
    """Changes of one table by one source transaction, with one shape; usually all of them.

    A transaction whose table changes shape inside gives several parts, and so does one that is handed on before its commit was
    read. is_last: no further part of the same transaction and table follows. end_ts: the end of the commit record, 0 while it is
    not known. size: bytes, with an estimate of Python's own.
    """

    __slots__ = ("end_ts", "frames", "is_last", "relation", "size", "transaction")

    def __init__(
        self,
        relation: Relation,
        frames: Sequence[bytes],
        size: int,
        transaction: Transaction,
        end_ts: Ts,
        is_last: bool,
    ) -> None:
        self.relation = relation
        self.frames = frames
        self.size = size
        self.transaction = transaction
        self.end_ts = end_ts
        self.is_last = is_last


@contextmanager
def _reading(what: str, frame: bytes) -> Iterator[None]:
    """Not around single changes: there it would cost more than the reading."""
    try:
        yield
    except _UNREADABLE as error:
        raise _unreadable(what, frame, error) from None


def _unreadable(what: str, frame: bytes, error: Exception) -> WireError:
    return WireError(f"logical replication: {what} of {len(frame)} bytes cannot be read: {error}")


def read_begin(frame: bytes) -> Transaction:
    with _reading("a begin", frame):
        commit_ts, commit_us, xid = _READ_BEGIN.unpack_from(frame, FRAME_HEADER + 1)
        (sent_us,) = _SIGNED_LONG.unpack_from(frame, _SENT_AT)
    return Transaction(commit_ts, commit_us + EPOCH_2000_US, xid, sent_us - commit_us)


def read_commit_end(frame: bytes) -> Ts:
    """The position right behind the commit record."""
    with _reading("a commit", frame):
        end: int = _READ_COMMIT.unpack_from(frame, FRAME_HEADER + 1)[2]
    return end


def read_keepalive(frame: bytes) -> tuple[Ts, bool]:
    """(everything at or before it has been sent, an answer is wanted)."""
    with _reading("a keepalive", frame):
        end, _, reply = _READ_KEEPALIVE.unpack_from(frame, 1)
    return end, bool(reply)


def frame_position(frame: bytes) -> Ts:
    """The position of a change in the WAL; (position, ordinal within it) identifies it for ever."""
    with _reading("a frame", frame):
        position: int = _UNSIGNED_LONG.unpack_from(frame, 1)[0]
    return position


def status_update(received: Ts, flushed: Ts, clock_us: int, wants_answer: bool = False) -> bytes:
    """A standby status update; clock_us since 1970. wants_answer: the walsender sends a keepalive at once."""
    return _STATUS.pack(b"r", received, flushed, flushed, clock_us - EPOCH_2000_US, wants_answer)


def read_relation(frame: bytes) -> Relation:
    with _reading("a relation", frame):
        return _relation(frame)


def _relation(frame: bytes) -> Relation:
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
    # An empty schema means pg_catalog in the protocol; it cannot be published.
    return Relation(relation_id, schema or "pg_catalog", name, identity, tuple(columns))


def _read_string(frame: bytes, at: int) -> tuple[str, int]:
    end = frame.index(0, at)
    return frame[at:end].decode(), end + 1


def read_truncated(frame: bytes) -> list[bytes]:
    """The relation ids (as the 4 bytes of the wire) of a TRUNCATE."""
    at = FRAME_HEADER + 1
    with _reading("a truncate", frame):
        (count,) = _UNSIGNED.unpack_from(frame, at)
        at += 5
        if len(frame) < at + 4 * count:
            raise ValueError(f"{count} relations do not fit into it")
    return [frame[at + 4 * i : at + 4 * i + 4] for i in range(count)]


def read_row(frame: bytes, at: int) -> tuple[list[Value], int]:
    """The values of the tuple that starts at `at`, and where it ends; IndexError or ValueError when there is none."""
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
    """(INSERT | UPDATE | DELETE | TRUNCATE, the old key or row if it was sent, the new row if there is one)."""
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
