"""Changes as JSON lines in an envelope like Debezium's. Pure.

{"op": "c" | "u" | "d" | "r" (first copy) | "t" (truncate), "before": {...} | null, "after": {...} | null,
 "source": {"lsn": "16/B374D848", "ordinal": 0, "txid": 731, "ts_ms": ..., "schema": "public", "table": "t"}, "ts_ms": ...}

(lsn, ordinal) identifies a change of a table for ever: lsn is where the source's commit record starts, ordinal counts the table's
changes in that transaction; in a first copy lsn is the snapshot's position and ordinal counts rows. A change that was written
twice has both the same. Columns whose value did not change and was not sent are left out of "after" and named in "unchanged".
Values: booleans, whole numbers and finite floats as such, everything else as PostgreSQL's text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from processor.postgres.wire import (
    DELETE,
    INSERT,
    NULL_VALUE,
    TRUNCATE,
    Part,
    Relation,
    Value,
    read_change,
)
from tablewire.model.ids import Ts
from tablewire.postgres.catalogue import TableSchema
from tablewire.postgres.lsn import format_lsn

_BOOL_OID = 16
_INTEGER_OIDS = frozenset((20, 21, 23, 26))
_FLOAT_OIDS = frozenset((700, 701))
_COPY_HEAD_BYTES = 19


def _boolean(text: str) -> object:
    return text in ("t", "true")


def _float(text: str) -> object:
    number = float(text)
    return number if math.isfinite(number) else text


def _reader(type_oid: int) -> Callable[[str], object]:
    if type_oid == _BOOL_OID:
        return _boolean
    if type_oid in _INTEGER_OIDS:
        return int
    return _float if type_oid in _FLOAT_OIDS else str


def change_lines(parts: Sequence[Part], first_ordinal: int, now_ms: int) -> Iterator[bytes]:
    """A line for each change of these parts. first_ordinal: of the first one, when its transaction began earlier."""
    transaction = None
    ordinal = first_ordinal
    for part in parts:
        if transaction is not None and part.transaction is not transaction:
            ordinal = 0
        transaction = part.transaction
        source = {
            "lsn": format_lsn(transaction.commit_ts),
            "ordinal": 0,
            "txid": transaction.xid,
            "ts_ms": transaction.commit_us // 1000,
            "schema": part.relation.schema,
            "table": part.relation.name,
        }
        readers = [_reader(column.type_oid) for column in part.relation.columns]
        for frame in part.frames:
            source["ordinal"] = ordinal
            yield _line(_change(part.relation, readers, frame), source, now_ms)
            ordinal += 1


def _change(relation: Relation, readers: Sequence[Callable[[str], object]], frame: bytes) -> dict[str, object]:
    kind, old, new = read_change(frame)
    if kind == TRUNCATE:
        return {"op": "t", "before": None, "after": None}
    names = [column.name for column in relation.columns]
    before = None
    if old is not None:
        keys_only = relation.replica_identity != "f"
        shown = [at for at, column in enumerate(relation.columns) if column.is_identity or not keys_only]
        before = {names[at]: _json_value(readers[at], old[at]) for at in shown}
    if kind == DELETE:
        return {"op": "d", "before": before, "after": None}
    assert new is not None
    after = {names[at]: _json_value(readers[at], value) for at, value in enumerate(new) if value is not None}
    change: dict[str, object] = {"op": "c" if kind == INSERT else "u", "before": before, "after": after}
    if len(after) < len(new):
        change["unchanged"] = [names[at] for at, value in enumerate(new) if value is None]
    return change


def copy_lines(schema: TableSchema, chunks: Iterable[bytes], position: Ts, now_ms: int) -> Iterator[bytes]:
    """A line for each row of a COPY BINARY stream whose columns were all cast to text."""
    readers = [_reader(column.type_oid) for column in schema.columns]
    names = [column.name for column in schema.columns]
    source: dict[str, object] = {
        "lsn": format_lsn(position),
        "ordinal": 0,
        "txid": None,
        "ts_ms": now_ms,
        "schema": schema.schema,
        "table": schema.name,
        "snapshot": True,
    }
    for ordinal, row in enumerate(_copied_rows(chunks)):
        source["ordinal"] = ordinal
        after = {name: _json_value(reader, value) for name, reader, value in zip(names, readers, row, strict=True)}
        yield _line({"op": "r", "before": None, "after": after}, source, now_ms)


def _copied_rows(chunks: Iterable[bytes]) -> Iterator[list[Value]]:
    data = b""
    is_headless = False
    for chunk in chunks:
        data += chunk
        at = 0
        if not is_headless:
            if len(data) < _COPY_HEAD_BYTES:
                continue
            at, is_headless = _COPY_HEAD_BYTES + int.from_bytes(data[15:19], "big"), True
        while (found := _copied_row(data, at)) is not None:
            row, at = found
            yield row
        data = data[at:]


def _copied_row(data: bytes, at: int) -> tuple[list[Value], int] | None:
    """The row that starts at `at` and where it ends; None when it is not all there, or is the end mark."""
    count = int.from_bytes(data[at : at + 2], "big", signed=True)
    if len(data) < at + 2 or count < 0:
        return None
    at += 2
    row: list[Value] = []
    for _ in range(count):
        head = data[at : at + 4]
        if len(head) < 4:
            return None
        if head == NULL_VALUE:
            row.append(NULL_VALUE)
            at += 4
            continue
        end = at + 4 + int.from_bytes(head, "big")
        if len(data) < end:
            return None
        row.append(data[at:end])
        at = end
    return row, at


def _json_value(reader: Callable[[str], object], value: Value) -> object:
    if value is None or value == NULL_VALUE:
        return None
    return reader(value[4:].decode())


def _line(change: Mapping[str, object], source: Mapping[str, object], now_ms: int) -> bytes:
    text = json.dumps({**change, "source": source, "ts_ms": now_ms}, ensure_ascii=False, separators=(",", ":"))
    return text.encode() + b"\n"
