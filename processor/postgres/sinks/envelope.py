"""Changes as JSON lines in an envelope like Debezium's. Pure.

{"op": "c" | "u" | "d" | "r" (first copy) | "t" (truncate), "before": {...} | null, "after": {...} | null,
 "source": {"lsn": "16/B374D848", "ordinal": 0, "txid": 731, "ts_ms": ..., "schema": "public", "table": "t"}, "ts_ms": ...}

(lsn, ordinal) identifies a change of a table forever: lsn is the position of the source's commit record,
ordinal counts the table's changes in that transaction; in a first copy lsn is the position of the
snapshot and ordinal counts rows. A change that was written twice has the same pair both times. Columns
whose value did not change and was not sent are omitted from "after" and listed in "unchanged". Values:
booleans, integers and finite floats as such, everything else as PostgreSQL's text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from processor.postgres.source.pgoutput import DELETE, INSERT, NULL_VALUE, TRUNCATE, Part, Relation, Value, read_change
from tablewire.model.ids import Ts
from tablewire.postgres.catalogue import TableSchema
from tablewire.postgres.lsn import format_lsn

_COPY_HEAD_BYTES = 19


def _boolean(text: str) -> object:
    return text in ("t", "true")


def _float(text: str) -> object:
    number = float(text)
    return number if math.isfinite(number) else text


_READERS: Mapping[int, Callable[[str], object]] = {
    16: _boolean,
    **dict.fromkeys((20, 21, 23, 26), int),
    **dict.fromkeys((700, 701), _float),
}
"""By type id: bool, integers and oid, floats."""


def change_lines(parts: Sequence[Part], first_ordinal: int, now_ms: int) -> Iterator[bytes]:
    """Yield a line for each change of these parts. first_ordinal: of the first one, if its transaction began earlier."""
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
        readers = [_READERS.get(column.type_oid, str) for column in part.relation.columns]
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
    """Yield a line for each row of a COPY BINARY stream whose columns were all cast to text."""
    readers = [_READERS.get(column.type_oid, str) for column in schema.columns]
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
    """Yield the values of each row; a chunk holds whole rows."""
    for chunk in chunks:
        at = _COPY_HEAD_BYTES if chunk.startswith(b"PGCOPY\n") else 0
        while at < len(chunk):
            count = int.from_bytes(chunk[at : at + 2], "big", signed=True)  # -1: the end of the stream
            at += 2
            row: list[Value] = []
            for _ in range(count):
                end = at + 4 + max(0, int.from_bytes(chunk[at : at + 4], "big", signed=True))
                row.append(chunk[at:end])
                at = end
            if count >= 0:
                yield row


def _json_value(reader: Callable[[str], object], value: Value) -> object:
    if value is None or value == NULL_VALUE:
        return None
    return reader(value[4:].decode())


def _line(change: Mapping[str, object], source: Mapping[str, object], now_ms: int) -> bytes:
    text = json.dumps({**change, "source": source, "ts_ms": now_ms}, ensure_ascii=False, separators=(",", ":"))
    return text.encode() + b"\n"
