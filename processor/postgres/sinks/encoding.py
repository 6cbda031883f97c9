"""Rows of the stream as COPY BINARY rows, without decoding a value: many at a time with numpy, or one by one. Pure.

A tuple of the stream is `columns (2 bytes)` and then, for each column, a kind byte and (unless NULL or not sent) length and data;
a COPY BINARY tuple is the same without the kinds, and with a length of -1 for NULL. So encoding is: cut the frame's head and the
kind bytes out, and put four bytes where a NULL is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from processor.postgres.wire import FRAME_HEADER, Value

COPY_HEAD = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
COPY_TAIL = b"\xff\xff"
NEW_AT = FRAME_HEADER + 6
"""Where the new tuple's number of columns stands in the frame of an insert, or of an update without an old tuple."""
_NULL = ord("n")
_UNCHANGED = ord("u")


def encode_frames(frames: Sequence[bytes], columns: int) -> bytes | None:
    """The new rows of these frames (inserts, or updates that carry no old tuple), in order, as COPY rows. None when one of them
    lacks a value that did not change."""
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
            # A NULL may be the last byte: its length must not be looked up behind the end.
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
    """nulls: (rows, their offsets in the joined frames, kind bytes cut out before them in the same row), one a column."""
    before = np.cumsum(dropped) - dropped
    places = np.concatenate([offsets - NEW_AT * (rows + 1) - before[rows] - inside for rows, offsets, inside in nulls])
    encoded[places] = 255
    return np.insert(encoded, np.repeat(places, 3), 255).tobytes()


def encode_rows(rows: Iterable[Sequence[Value]], columns: int) -> bytes:
    """Whole rows as COPY rows; None is not allowed among the values."""
    head = columns.to_bytes(2, "big")
    pieces: list[bytes] = []
    for row in rows:
        pieces.append(head)
        pieces.extend(row)  # type: ignore[arg-type]  # the caller has filled every value
    return b"".join(pieces)


def encode_array(values: Sequence[bytes], element_oid: int) -> bytes:
    """A binary array of one dimension from values that are not NULL."""
    if not values:
        return bytes(8) + element_oid.to_bytes(4, "big")
    head = (
        (1).to_bytes(4, "big")
        + bytes(4)
        + element_oid.to_bytes(4, "big")
        + len(values).to_bytes(4, "big")
        + (1).to_bytes(4, "big")
    )
    return head + b"".join(values)
