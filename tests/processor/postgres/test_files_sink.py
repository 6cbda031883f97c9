"""The files sink without servers: the identity of a change is the same however often it is written."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from processor.postgres.sinks import Fence, SinkContext, WriteNotAllowedError
from processor.postgres.sinks.files import FilesSession
from processor.postgres.source.pgoutput import Part, Relation, RelationColumn, Transaction
from tablewire.model.ids import ChangefeedID
from tablewire.postgres.catalogue import TableSchema

SCHEMA = TableSchema(7, "public", "t", "d", True, ("id",), ("id",), ())
RELATION = Relation(7, "public", "t", "d", (RelationColumn("id", 23, -1, True),))
FENCE = Fence(1, 1, 1)


def part(transaction: Transaction, ids: list[int], is_last: bool = True) -> Part:
    """Inserts of these ids."""
    head = b"w" + bytes(24) + b"I" + struct.pack(">I", 7) + b"N\0\1t"
    frames = [head + struct.pack(">I", len(str(i))) + str(i).encode() for i in ids]
    return Part(RELATION, frames, 100, transaction, transaction.commit_ts + 10, is_last)


def identities(folder: Path) -> list[tuple[str, int, int]]:
    """(lsn, ordinal, id) of each line, in order."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((folder / "public.t").glob("[0-9]*.jsonl")))
    rows = [json.loads(line) for line in text.splitlines()]
    return [(row["source"]["lsn"], row["source"]["ordinal"], row["after"]["id"]) for row in rows]


class Writer:
    """A session of a sink in this folder; may_write as the test sets it."""

    def __init__(self, folder: Path) -> None:
        self.may_write = True
        context = SinkContext(ChangefeedID("default", "f"), "writer", lambda: self.may_write)
        self.session = FilesSession(folder, context, 1 << 20)
        self.session.take_over(SCHEMA, FENCE, 0, False)

    def write(self, *pieces: list[Part]) -> None:
        transaction = self.session.begin(SCHEMA, FENCE)
        for piece in pieces:
            transaction.apply(piece, piece is pieces[-1])
        transaction.commit()


def test_transaction_that_is_written_again_keeps_its_ordinals(tmp_path: Path) -> None:
    """The lease is in doubt at the commit; the same batch comes again later."""
    writer = Writer(tmp_path)
    transaction = Transaction(0x100, 0, 1)
    parts = [part(transaction, [1, 2, 3])]
    first = writer.session.begin(SCHEMA, FENCE)
    first.apply(parts, True)
    writer.may_write = False
    with pytest.raises(WriteNotAllowedError):
        first.commit()
    first.rollback()
    assert identities(tmp_path) == []
    writer.may_write = True
    writer.write(parts)
    assert identities(tmp_path) == [("0/100", 0, 1), ("0/100", 1, 2), ("0/100", 2, 3)]


def test_transaction_in_pieces_counts_on(tmp_path: Path) -> None:
    """Ordinals go on from piece to piece of one transaction, and start again with the next one."""
    writer = Writer(tmp_path)
    large, next_one = Transaction(0x100, 0, 1), Transaction(0x200, 0, 2)
    writer.write([part(large, [1, 2], False)], [part(large, [3]), part(next_one, [4])])
    writer.write([part(Transaction(0x300, 0, 3), [5])])
    assert [(lsn, ordinal) for lsn, ordinal, _ in identities(tmp_path)] == [
        ("0/100", 0),
        ("0/100", 1),
        ("0/100", 2),
        ("0/200", 0),
        ("0/300", 0),
    ]
