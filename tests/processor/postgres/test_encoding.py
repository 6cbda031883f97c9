"""Encoding and folding without a server: the quick ways give what reading every value gives."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from processor.postgres.sinks.encoding import encode_array, encode_frames, encode_rows
from processor.postgres.sinks.folding import Folded, after_truncate, fold_carefully, fold_quickly
from processor.postgres.sinks.plans import TargetColumn, TargetPlan
from processor.postgres.sinks.wire_types import WireType
from processor.postgres.source.pgoutput import NULL_VALUE, Relation, RelationColumn, Value, read_change

HEAD = b"w" + bytes(24)
KEY = st.integers(1, 6).map(lambda number: b"k%d" % number)
DATA = st.one_of(st.none(), st.binary(max_size=12))


def row_bytes(values: list[bytes | str | None]) -> bytes:
    """A tuple of the stream; None = NULL, "u" = not sent."""
    pieces = [len(values).to_bytes(2, "big")]
    for value in values:
        if value is None:
            pieces.append(b"n")
        elif isinstance(value, str):
            pieces.append(b"u")
        else:
            pieces.append(b"b" + len(value).to_bytes(4, "big") + value)
    return b"".join(pieces)


def insert(*values: bytes | str | None) -> bytes:
    return HEAD + b"I" + bytes(4) + b"N" + row_bytes(list(values))


def update(*values: bytes | str | None, old: bytes | None = None) -> bytes:
    before = b"K" + row_bytes([old, None, None]) if old is not None else b""
    return HEAD + b"U" + bytes(4) + before + b"N" + row_bytes(list(values))


def delete(key: bytes) -> bytes:
    return HEAD + b"D" + bytes(4) + b"K" + row_bytes([key, None, None])


def truncate() -> bytes:
    return HEAD + b"T" + (1).to_bytes(4, "big") + bytes(5)


def plan() -> TargetPlan:
    text = WireType("text", 25)
    columns = tuple(TargetColumn(name, text, "") for name in ("k", "a", "b"))
    relation = Relation(0, "public", "t", "d", tuple(RelationColumn(c.name, 25, -1, c.name == "k") for c in columns))
    return TargetPlan(relation, '"public"."t"', columns, (0,))


def read_new(frame: bytes) -> list[Value]:
    new = read_change(frame)[2]
    assert new is not None
    return new


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(DATA, min_size=3, max_size=3), min_size=1, max_size=30))
def test_many_frames_are_encoded_as_each_alone(rows: list[list[bytes | None]]) -> None:
    """NULLs in any place, empty values, any sizes."""
    frames = [insert(*row) for row in rows]
    assert encode_frames(frames, 3) == encode_rows([read_new(frame) for frame in frames], 3)


def test_a_value_that_was_not_sent_is_not_encoded() -> None:
    """The caller has to fill it in."""
    assert encode_frames([insert(b"a", b"b", b"c"), update(b"a", "u", None)], 3) is None


def test_array_of_keys() -> None:
    """Header of one dimension, then the values as they are."""
    assert encode_array([b"\0\0\0\1x"], 25).hex() == "0000000100000000" + "00000019" + "0000000100000001" + "0000000178"
    assert encode_array([], 25).hex() == "0000000000000000" + "00000019"


def test_only_what_follows_the_last_truncate_matters() -> None:
    """And whether there was one."""
    frames = [insert(b"a", None, None), truncate(), insert(b"b", None, None), truncate(), insert(b"c", None, None)]
    assert after_truncate(frames) == (frames[4:], frames[3])
    assert after_truncate(frames[:1]) == (frames[:1], None)


def applied(start: dict[bytes, list[Value]], folded: Folded) -> dict[bytes, list[Value]]:
    """What a sink does with it, each of which must find the rows that it needs: deletes, rows, new rows, partial updates."""
    rows = dict(start)
    for key in folded.deletes:
        del rows[key[0]]
    for row in [*folded.rows, *(read_new(frame) for frame in folded.frames)]:
        assert row[0] in rows
        rows[row[0]] = row
    for row in [*folded.new_rows, *(read_new(frame) for frame in folded.inserted)]:
        assert row[0] is not None
        assert row[0] not in rows
        rows[row[0]] = row
    for key, values in folded.partial:
        if key[0] in rows:
            rows[key[0]] = [old if new is None else new for old, new in zip(rows[key[0]], values, strict=True)]
    return rows


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_folded_changes_come_to_the_same(data: st.DataObject) -> None:
    """Changes as a source can make them, with values that were not sent and keys that change, one by one and folded."""
    value = st.binary(max_size=4)
    start: dict[bytes, list[Value]] = {}
    for key in data.draw(st.sets(KEY, max_size=4)):
        frame = insert(key, b"a", b"b")
        start[read_new(frame)[0] or b""] = read_new(frame)
    rows = dict(start)
    frames: list[bytes] = []
    for _ in range(data.draw(st.integers(1, 25))):
        plain = {key[4:]: key for key in rows}
        key = data.draw(KEY)
        wire = len(key).to_bytes(4, "big") + key
        if key not in plain:
            frames.append(insert(key, data.draw(value), data.draw(DATA)))
            rows[wire] = read_new(frames[-1])
            continue
        kind = data.draw(st.sampled_from(["delete", "update", "partial", "key"]))
        if kind == "delete":
            frames.append(delete(key))
            del rows[wire]
            continue
        target = data.draw(KEY) if kind == "key" else key
        if kind == "key" and target in plain:
            continue
        middle = "u" if kind == "partial" or (kind == "key" and data.draw(st.booleans())) else data.draw(value)
        frames.append(update(target, middle, data.draw(DATA), old=key if kind == "key" else None))
        before = rows.pop(wire)
        after = [old if new is None else new for old, new in zip(before, read_new(frames[-1]), strict=True)]
        assert after[0] is not None
        rows[after[0]] = after
    careful = fold_carefully(plan(), frames)
    if careful is not None:
        assert applied(start, careful) == rows
    quick = fold_quickly(plan(), frames)
    if quick is not None and all(None not in read_new(frame) for frame in [*quick.frames, *quick.inserted]):
        assert all(read_new(frame)[0] not in start for frame in quick.inserted)
        assert all(read_new(frame)[0] in start for frame in quick.frames)
        assert applied(start, quick) == rows


def test_null_value_is_the_copy_null() -> None:
    """What stands for NULL among values is what COPY BINARY has there."""
    assert (-1).to_bytes(4, "big", signed=True) == NULL_VALUE
