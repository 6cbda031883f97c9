"""The decoder of logical replication, fed with anything: it returns, or raises WireError and nothing else."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from processor.postgres.source import pgoutput

HEADER = b"w" + struct.pack(">QQq", 5, 6, 7)
READERS: list[Callable[[bytes], object]] = [
    pgoutput.read_begin,
    pgoutput.read_commit_end,
    pgoutput.read_keepalive,
    pgoutput.read_relation,
    pgoutput.read_truncated,
    pgoutput.read_message,
    pgoutput.read_change,
]


def value(data: bytes | None) -> bytes:
    return b"n" if data is None else b"b" + struct.pack(">I", len(data)) + data


def row(*values: bytes | None) -> bytes:
    return struct.pack(">H", len(values)) + b"".join(map(value, values))


TABLE = struct.pack(">I", 17)
GOOD = [
    HEADER + b"B" + struct.pack(">QqI", 9, 8, 7),
    HEADER + b"C" + struct.pack(">BQQq", 0, 9, 10, 8),
    b"k" + struct.pack(">QqB", 9, 8, 1),
    HEADER + b"R" + TABLE + b"public\0t\0d" + struct.pack(">H", 2) + 2 * (b"\1id\0" + struct.pack(">Ii", 23, -1)),
    HEADER + b"T" + struct.pack(">IB", 2, 0) + TABLE + TABLE,
    HEADER + b"M" + struct.pack(">BQ", 1, 9) + b"prefix\0" + struct.pack(">I", 3) + b"abc",
    HEADER + b"I" + TABLE + b"N" + row(b"1", None, b"text"),
    HEADER + b"U" + TABLE + b"O" + row(b"1", b"old") + b"N" + row(b"1", b"new"),
    HEADER + b"D" + TABLE + b"K" + row(b"1", None),
]


def read_all(frame: bytes) -> int:
    """How many readers took it."""
    taken = 0
    for reader in READERS:
        try:
            reader(frame)
            taken += 1
        except pgoutput.WireError:
            continue
    return taken


def test_good_frames_are_read() -> None:
    """Each by the reader it is for."""
    assert pgoutput.read_change(GOOD[7])[1:] == ([b"\0\0\0\x011", b"\0\0\0\x03old"], [b"\0\0\0\x011", b"\0\0\0\x03new"])
    assert pgoutput.read_relation(GOOD[3]).columns[1].name == "id"
    assert pgoutput.read_message(GOOD[5]) == (True, "prefix", b"abc")
    assert all(map(read_all, GOOD))


@given(st.binary(max_size=200))
def test_random_bytes_raise_wire_error_alone(data: bytes) -> None:
    """Alone, and behind a good header."""
    read_all(data)
    read_all(HEADER + data)


@given(
    st.sampled_from(GOOD),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4),
    st.integers(0, 200),
    st.binary(max_size=8),
)
def test_mutated_frames_raise_wire_error_alone(frame: bytes, changes: list[tuple[int, int]], cut: int, tail: bytes) -> None:
    """Bytes changed, cut off and appended."""
    mutated = bytearray(frame)
    for at, byte in changes:
        mutated[at % len(mutated)] = byte
    read_all(bytes(mutated[: len(mutated) - cut % len(mutated)]) + tail)


@pytest.mark.parametrize("frame", GOOD[6:], ids=["insert", "update", "delete"])
def test_a_value_longer_than_its_frame_is_refused(frame: bytes) -> None:
    """A cut frame never gives a shorter value."""
    with pytest.raises(pgoutput.WireError, match="a change of"):
        pgoutput.read_change(frame[:-1])
