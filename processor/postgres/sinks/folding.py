"""Folds many changes of a table with a key: for each key, the row at the end, or that it is gone.

The quick way looks only at the key of each frame, and the last frame of a key wins; it gives up (None)
if an update changed a key. The careful way reads every value, so it can merge updates that lack
unchanged values; it gives up if only the sink knows a value of a row whose key changes. Pure.

Keys are compared by their bytes. Two keys that PostgreSQL considers equal but whose bytes differ
(numeric 1.0 and 1.00) are folded separately, which is correct if all deletes are applied before all
rows: at the end at most one of the two exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from processor.postgres.sinks.changes import key_of, old_key, patch
from processor.postgres.sinks.plans import TargetPlan
from processor.postgres.source.pgoutput import DELETE, FRAME_HEADER, INSERT, NEW_ROW, TRUNCATE, UPDATE, Value, read_change

Key: TypeAlias = "tuple[bytes, ...]"
_MARKER_AT = FRAME_HEADER + 5
_FIRST_AT = FRAME_HEADER + 8
"""The offset of the first column's kind byte in a frame whose only tuple follows the marker."""


@dataclass(slots=True)
class Folded:
    """The result of folding.

    deletes: keys whose rows existed before. inserted: frames of whole rows whose keys did not exist
    before; frames: of whole rows that replace one that did. new_rows, rows: the same, read.
    partial: values to set in existing rows; None = unchanged.
    """

    deletes: list[Key] = field(default_factory=list)
    inserted: list[bytes] = field(default_factory=list)
    frames: list[bytes] = field(default_factory=list)
    new_rows: list[list[Value]] = field(default_factory=list)
    rows: list[list[Value]] = field(default_factory=list)
    partial: list[tuple[Key, list[Value]]] = field(default_factory=list)


def after_truncate(frames: Sequence[bytes]) -> tuple[Sequence[bytes], bytes | None]:
    """Return the frames after the last TRUNCATE, and that one, if there is one."""
    for at in range(len(frames) - 1, -1, -1):
        if frames[at][FRAME_HEADER] == TRUNCATE:
            return frames[at + 1 :], frames[at]
    return frames, None


def fold_quickly(plan: TargetPlan, frames: Sequence[bytes]) -> Folded | None:
    """Fold by the last frame of each key; only for a key of leading columns. Resulting frames may lack unchanged values."""
    count = len(plan.key)
    if plan.key != tuple(range(count)) or plan.patches:
        return None
    last: dict[bytes, bytes] = {}
    inserted: set[bytes] = set()
    from_bytes = int.from_bytes
    for frame in frames:
        if frame[FRAME_HEADER] == UPDATE and frame[_MARKER_AT] != NEW_ROW:
            return None
        end = _FIRST_AT
        for _ in range(count):
            end += 5 + from_bytes(frame[end + 1 : end + 5], "big")
        key = frame[_FIRST_AT:end]
        if frame[FRAME_HEADER] == INSERT and key not in last:
            inserted.add(key)
        last[key] = frame
    folded = Folded()
    for key, frame in last.items():
        if frame[FRAME_HEADER] == DELETE:
            if key not in inserted:
                folded.deletes.append(_split(key, count))
        elif key in inserted:
            folded.inserted.append(frame)
        else:
            folded.frames.append(frame)
    return folded


def _split(key: bytes, count: int) -> Key:
    """Return the values of `count` consecutive columns with their kinds."""
    if count == 1:
        return (key[1:],)
    values: list[bytes] = []
    at = 0
    for _ in range(count):
        end = at + 5 + int.from_bytes(key[at + 1 : at + 5], "big")
        values.append(key[at + 1 : end])
        at = end
    return tuple(values)


def fold_carefully(plan: TargetPlan, frames: Sequence[bytes]) -> Folded | None:
    """Fold by reading every value; return None if a row whose key changed lacks a value that is not among the changes."""
    rows: dict[Key, list[Value] | None] = {}  # None: gone
    existed: dict[Key, bool] = {}
    for frame in frames:
        kind, old, new = read_change(frame)
        patch(plan, old)
        patch(plan, new)
        if kind == DELETE:
            assert old is not None
            key = _as_key(key_of(plan, old))
            existed.setdefault(key, True)
            rows[key] = None
            continue
        assert new is not None
        if kind == UPDATE:
            before = _as_key(old_key(plan, old, new))
            for at, value in zip(plan.key, before, strict=True):
                if new[at] is None:  # a long key value that did not change is sent in the old tuple alone
                    new[at] = value
            existed.setdefault(before, True)
            if (known := rows.get(before)) is not None:
                new = _merged(known, new)
        key = _as_key(key_of(plan, new))
        if kind == UPDATE and before != key:
            if None in new:
                return None
            rows[before] = None
        existed.setdefault(key, False)
        rows[key] = new
    folded = Folded()
    for key, row in rows.items():
        if row is None:
            if existed[key]:
                folded.deletes.append(key)
        elif not existed[key]:
            folded.new_rows.append(row)
        elif None in row:
            folded.partial.append((key, row))
        else:
            folded.rows.append(row)
    return folded


def _merged(before: Sequence[Value], after: Sequence[Value]) -> list[Value]:
    return [old if new is None else new for old, new in zip(before, after, strict=True)]


def _as_key(values: Sequence[Value]) -> Key:
    return tuple(values)  # type: ignore[arg-type]  # key columns are never NULL and always sent
