"""Rows of the stream as COPY BINARY rows, without decoding a value: many at a time with numpy, or one by one. Pure.

A tuple of the stream is `columns (2 bytes)` and then, for each column, a kind byte and (unless NULL or
not sent) length and data. A COPY BINARY tuple is the same without the kinds, and with a length of -1
for NULL. To encode is therefore to remove the frame's head and the kind bytes, and to insert four bytes
for each NULL.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import numpy as np

from processor.postgres.source.pgoutput import FRAME_HEADER, Value

COPY_HEAD = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
COPY_TAIL = b"\xff\xff"
NEW_AT = FRAME_HEADER + 6
"""The offset of the new tuple's number of columns in an insert, or an update without an old tuple."""
_NULL = ord("n")
_UNCHANGED = ord("u")


def encode_frames(frames: Sequence[bytes], columns: int) -> bytes | None:
    """Return the new rows of these frames (inserts, or updates without an old tuple) as COPY rows, in order.

    None if one of them lacks a value that did not change.
    """
    data = b"".join(frames)
    octets = np.frombuffer(data, np.uint8)
    # Every offset seen as a big-endian number of 4 bytes; overlapping, nothing is copied.
    lengths = np.ndarray((len(data) - 3,), dtype=">u4", buffer=data, strides=(1,))
    sizes = np.fromiter(map(len, frames), np.int64, len(frames))
    starts = np.cumsum(sizes) - sizes
    keep = np.ones(len(data), np.bool_)
    keep[(starts[:, None] + np.arange(NEW_AT)).ravel()] = False
    at = starts + (NEW_AT + 2)
    nulls: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    dropped = np.zeros(len(frames), np.int64)
    for _ in range(columns):
        kinds = octets[at]
        is_empty = (kinds == _NULL) | (kinds == _UNCHANGED)
        if is_empty.any():
            if (kinds == _UNCHANGED).any():
                return None
            rows = np.flatnonzero(is_empty)
            nulls.append((rows, at[rows], dropped[rows]))
            is_value = ~is_empty
            keep[at[is_value]] = False
            # A NULL may be the last byte: do not read a length after the end.
            following = np.where(is_value, at + 1, 0)
            at = at + np.where(is_value, lengths[following].astype(np.int64) + 5, 1)
            dropped += is_value
        else:
            keep[at] = False
            at = at + (lengths[at + 1].astype(np.int64) + 5)
            dropped += 1
    encoded = octets[keep]
    return encoded.tobytes() if not nulls else _with_nulls(encoded, nulls, dropped)


def _with_nulls(encoded: np.ndarray, nulls: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], dropped: np.ndarray) -> bytes:
    """Insert the NULLs. nulls: for each column (rows, their offsets in the joined frames, kind bytes removed before them)."""
    before = np.cumsum(dropped) - dropped
    places = np.concatenate([offsets - NEW_AT * (rows + 1) - before[rows] - inside for rows, offsets, inside in nulls])
    encoded[places] = 255
    return np.insert(encoded, np.repeat(places, 3), 255).tobytes()


def encode_rows(rows: Iterable[Sequence[Value]], columns: int) -> bytes:
    """Return whole rows as COPY rows; None is not permitted among the values."""
    head = columns.to_bytes(2, "big")
    pieces: list[bytes] = []
    for row in rows:
        pieces.append(head)
        pieces.extend(row)  # type: ignore[arg-type]  # the caller has filled every value
    return b"".join(pieces)


def encode_array(values: Sequence[bytes], element_oid: int) -> bytes:
    """Return a binary array of one dimension; none of the values is NULL."""
    if not values:
        return struct.pack(">IIi", 0, 0, element_oid)
    return struct.pack(">5I", 1, 0, element_oid, len(values), 1) + b"".join(values)
