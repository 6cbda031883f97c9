"""The codec refuses invalid bytes and values with a CodecError that names the field."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tablewire.errors import CodecError
from tablewire.model.ids import ChangefeedID
from tablewire.model.messages import (
    ActiveChangefeed,
    Batch,
    DispatchTableRequest,
    DispatchTableResponse,
    Heartbeat,
    HeartbeatResponse,
    Message,
    MessageBody,
    SpanReports,
    SpanStats,
)
from tablewire.model.progress import Barrier, TableBarrier
from tablewire.model.spans import Span, SpanBlock
from tablewire.model.states import DispatchAction, LivenessState, TableState
from tablewire.v1 import schedule_pb2 as pb
from tablewire.wire.codec import decode_batch, decode_message, encode_batch, encode_message
from tablewire.wire.limits import MAX_MESSAGE_BYTES

CHANGEFEED = ChangefeedID("default", "orders")


def message(body: MessageBody) -> Message:
    return Message("owner-1", "capture-1", CHANGEFEED, 7, 3, 11, 5, 4, body)


def reports(rows: int = 20) -> SpanReports:
    numbers = np.arange(rows, dtype=np.uint32)
    checkpoint_ts = np.arange(1_000, 1_000 + rows, dtype=np.uint64)
    return SpanReports(
        base=2,
        numbers=numbers,
        spans=SpanBlock.of([Span(-5, b"a", b"b")]),
        states=np.full(rows, TableState.REPLICATING.code, np.uint8),
        checkpoint_ts=checkpoint_ts,
        resolved_ts=checkpoint_ts + np.uint64(9),
        last_synced_ts=checkpoint_ts,
        assignment_epochs=np.full(rows, (7 << 20) | 1, np.uint64),
        errors=((3, "disk full"), (5, "gone")),
        stats=SpanStats(
            np.array([1, 4], np.uint32), np.ones(2), np.ones(2), np.array([1, 2], np.uint64), np.array([0, 1], np.uint8)
        ),
    )


def dispatch(rows: int = 20) -> DispatchTableRequest:
    return DispatchTableRequest(
        numbers=np.arange(1, rows + 1, dtype=np.uint32),
        spans=SpanBlock(np.arange(-5, rows - 5, dtype=np.int64)),
        actions=np.full(rows, DispatchAction.ADD_WRITE, np.uint8),
        checkpoint_ts=np.full(rows, 10, np.uint64),
        resolved_ts=np.full(rows, 12, np.uint64),
        assignment_epochs=np.full(rows, 5, np.uint64),
    )


def heartbeat() -> Heartbeat:
    return Heartbeat(
        Barrier(50, (TableBarrier(-3, 40), TableBarrier(9, 45))),
        acked=3,
        numbers=np.array([1, 2], np.uint32),
        spans=SpanBlock.of([Span(1), Span(2)]),
    )


BODIES: dict[str, MessageBody] = {
    "heartbeat": heartbeat(),
    "heartbeat_response": HeartbeatResponse(LivenessState.ALIVE, True, 20, 77, reports()),
    "dispatch_table_request": dispatch(),
    "dispatch_table_response": DispatchTableResponse(reports()),
}
BATCH = Batch("owner-1", "capture-1", 7, (ActiveChangefeed(CHANGEFEED, 3),), tuple(message(body) for body in BODIES.values()))


def envelope(kind: str) -> pb.Envelope:
    return pb.Envelope.FromString(encode_message(message(BODIES[kind])))


def _u32(*values: int) -> bytes:
    return np.array(values, "<u4").tobytes()


def _u64(*values: int) -> bytes:
    return np.array(values, "<u8").tobytes()


def _codes(column: pb.Column, *codes: int) -> None:
    column.Clear()
    column.width, column.deltas = 1, bytes(codes)


Spoil = Callable[[Any], None]
R = "heartbeat_response"
D = "dispatch_table_request"
H = "heartbeat"
SPOILED: dict[str, tuple[str, Spoil, str]] = {
    "version": (H, lambda e: setattr(e, "version", 2), r"^version: 2 is not supported"),
    "version missing": (H, lambda e: e.ClearField("version"), r"^version: 0"),
    "body missing": (H, lambda e: e.ClearField("heartbeat"), r"^body: missing"),
    "sender empty": (H, lambda e: setattr(e, "sender", ""), r"^sender: 0 bytes"),
    "receiver long": (H, lambda e: setattr(e, "receiver", "x" * 2_000), r"^receiver: 2000 bytes"),
    "revision negative": (H, lambda e: setattr(e, "owner_revision", -1), r"^owner_revision: -1"),
    "column width": (R, lambda e: setattr(e.heartbeat_response.reports.states, "width", 3), r"reports\.states\.width: 3"),
    "column short": (
        R,
        lambda e: setattr(
            e.heartbeat_response.reports.checkpoint_ts, "deltas", e.heartbeat_response.reports.checkpoint_ts.deltas[:-1]
        ),
        r"heartbeat_response\.reports\.checkpoint_ts\.deltas: 19 bytes, wanted 20 x 1",
    ),
    "rows beyond the columns": (R, lambda e: setattr(e.heartbeat_response.reports, "rows", 21), r"reports\.numbers"),
    "rows beyond the limit": (R, lambda e: setattr(e.heartbeat_response.reports, "rows", 2**32 - 1), r"reports\.rows"),
    "empty column with data": (
        R,
        lambda e: setattr(e.heartbeat_response.reports.stats, "rows", 0),
        r"stats\.positions: a column of 0 elements",
    ),
    "state": (R, lambda e: _codes(e.heartbeat_response.reports.states, *[3] * 19, 6), r"reports\.states: no code 6 \(row 19\)"),
    "state too large": (R, lambda e: setattr(e.heartbeat_response.reports.states, "base", 259), r"reports\.states: 259"),
    "liveness": (R, lambda e: setattr(e.heartbeat_response, "liveness", 2), r"heartbeat_response\.liveness: no code 2"),
    "overflow of base": (
        R,
        lambda e: setattr(e.heartbeat_response.reports.checkpoint_ts, "base", 2**64 - 1),
        r"checkpoint_ts: base \+ delta exceeds",
    ),
    "resolved beyond": (
        R,
        lambda e: setattr(e.heartbeat_response.reports.resolved_lead, "base", 2**64 - 1),
        r"resolved_lead: checkpoint_ts \+ resolved_lead exceeds 64 bits \(row 0\)",
    ),
    "exceptions unsorted": (
        R,
        lambda e: e.heartbeat_response.reports.last_synced_ts.MergeFrom(pb.Column(positions=_u32(3, 2), values=_u64(1, 1))),
        r"last_synced_ts\.positions: positions are not strictly ascending",
    ),
    "exceptions twice": (
        R,
        lambda e: e.heartbeat_response.reports.last_synced_ts.MergeFrom(pb.Column(positions=_u32(3, 3), values=_u64(1, 1))),
        r"last_synced_ts\.positions: positions are not strictly ascending",
    ),
    "exceptions outside": (
        R,
        lambda e: e.heartbeat_response.reports.last_synced_ts.MergeFrom(pb.Column(positions=_u32(20), values=_u64(1))),
        r"last_synced_ts\.positions: position 20 is outside of 20 rows",
    ),
    "exceptions odd": (
        R,
        lambda e: setattr(e.heartbeat_response.reports.last_synced_ts, "positions", b"abc"),
        r"last_synced_ts\.positions: 3 bytes",
    ),
    "exceptions without values": (
        R,
        lambda e: setattr(e.heartbeat_response.reports.last_synced_ts, "positions", _u32(1)),
        r"last_synced_ts\.values: 0 bytes, wanted 1 x 8",
    ),
    "values without exceptions": (
        R,
        lambda e: setattr(e.heartbeat_response.reports.last_synced_ts, "values", _u64(1)),
        r"last_synced_ts\.values: 8 bytes, wanted 0 x 8",
    ),
    "names missing": (R, lambda e: e.heartbeat_response.reports.ClearField("spans"), r"reports\.spans: 0 names for 1 spans"),
    "keys of some": (
        R,
        lambda e: e.heartbeat_response.reports.spans.start_keys.append(b"x"),
        r"reports\.spans\.start_keys: 2 keys for 1 spans",
    ),
    "end keys missing": (
        R,
        lambda e: e.heartbeat_response.reports.spans.ClearField("end_keys"),
        r"reports\.spans\.end_keys: 0 beside 1",
    ),
    "range empty": (
        R,
        lambda e: e.heartbeat_response.reports.spans.end_keys.__setitem__(0, b"a"),
        r"reports\.spans\.end_keys: not behind its start_key \(row 0\)",
    ),
    "errors unsorted": (
        R,
        lambda e: setattr(e.heartbeat_response.reports.errors[0], "row", 5),
        r"errors\.row: positions are not strictly",
    ),
    "error outside": (R, lambda e: setattr(e.heartbeat_response.reports.errors[1], "row", 20), r"errors\.row: position 20"),
    "error long": (
        R,
        lambda e: setattr(e.heartbeat_response.reports.errors[1], "text", "x" * 5_000),
        r"errors\.text: 5000 characters",
    ),
    "stats unsorted": (
        R,
        lambda e: _codes(e.heartbeat_response.reports.stats.positions, 4, 4),
        r"stats\.positions: positions are not strictly",
    ),
    "stats outside": (R, lambda e: _codes(e.heartbeat_response.reports.stats.positions, 4, 20), r"stats\.positions: position 20"),
    "rates short": (
        R,
        lambda e: setattr(e.heartbeat_response.reports.stats, "rows_per_s", b"1234"),
        r"stats\.rows_per_s: 4 bytes, wanted 2 x 8",
    ),
    "rate no number": (
        R,
        lambda e: setattr(e.heartbeat_response.reports.stats, "bytes_per_s", np.array([1.0, np.nan]).tobytes()),
        r"stats\.bytes_per_s: nan is no rate \(row 1\)",
    ),
    "snapshot flag": (
        R,
        lambda e: _codes(e.heartbeat_response.reports.stats.in_snapshot, 1, 2),
        r"stats\.in_snapshot: no code 2",
    ),
    "action": (D, lambda e: setattr(e.dispatch_table_request.actions, "base", 3), r"dispatch_table_request\.actions: no code 3"),
    "number 0": (
        D,
        lambda e: e.dispatch_table_request.numbers.MergeFrom(pb.Column(positions=_u32(4), values=_u64(0))),
        r"dispatch_table_request\.numbers: 0 is no number \(row 4\)",
    ),
    "number too large": (
        D,
        lambda e: e.dispatch_table_request.numbers.MergeFrom(pb.Column(positions=_u32(4), values=_u64(2**32))),
        r"dispatch_table_request\.numbers: 4294967296 does not fit uint32",
    ),
    "write without epoch": (
        D,
        lambda e: e.dispatch_table_request.assignment_epochs.MergeFrom(pb.Column(positions=_u32(4), values=_u64(0))),
        r"assignment_epochs: 0 for a permission to write \(row 4\)",
    ),
    "heartbeat number 0": (H, lambda e: _codes(e.heartbeat.numbers, 0, 1), r"heartbeat\.numbers: 0 is no number"),
    "barriers short": (H, lambda e: setattr(e.heartbeat.barrier, "rows", 3), r"heartbeat\.barrier\.table_ids"),
}


@pytest.mark.parametrize(("kind", "spoil", "reason"), SPOILED.values(), ids=SPOILED.keys())
def test_spoiled_field_is_refused_by_name(kind: str, spoil: Spoil, reason: str) -> None:
    """A message with one invalid field is refused, and the error names the field."""
    spoiled = envelope(kind)
    spoil(spoiled)
    with pytest.raises(CodecError, match=reason):
        decode_message(spoiled.SerializeToString())


def test_batch_error_names_the_envelope() -> None:
    """The error contains the index of the invalid message before the field."""
    batch = pb.Batch.FromString(encode_batch(BATCH))
    batch.envelopes[2].dispatch_table_request.actions.base = 9
    with pytest.raises(CodecError, match=r"^envelopes\[2\]\.dispatch_table_request\.actions: no code 9"):
        decode_batch(batch.SerializeToString())


@pytest.mark.parametrize("field", ["sender", "receiver", "owner_revision"])
def test_message_that_is_not_its_batchs_is_refused(field: str) -> None:
    """A message with another sender, receiver or owner_revision than its batch is refused."""
    batch = pb.Batch.FromString(encode_batch(BATCH))
    setattr(batch.envelopes[1], field, 8 if field == "owner_revision" else "other")
    with pytest.raises(CodecError, match=rf"^envelopes\[1\]\.{field}"):
        decode_batch(batch.SerializeToString())


def test_changefeed_named_twice_is_refused() -> None:
    """A changefeed may be active only once."""
    batch = pb.Batch.FromString(encode_batch(BATCH))
    batch.active.append(batch.active[0])
    with pytest.raises(CodecError, match=r"^active\[1\]: default/orders is named twice"):
        decode_batch(batch.SerializeToString())


def test_rows_of_a_whole_batch_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small envelopes cannot contain more rows than a batch may have."""
    monkeypatch.setattr("tablewire.wire.codec.MAX_ROWS_PER_BATCH", 60)
    data = encode_batch(Batch("owner-1", "capture-1", 7, (), BATCH.messages[:2]))
    decode_batch(data)
    many = pb.Batch.FromString(data)
    many.envelopes.extend(list(many.envelopes) * 2)
    with pytest.raises(CodecError, match=r"rows in all, at most 60"):
        decode_batch(many.SerializeToString())


def test_oversize_is_refused_unread() -> None:
    """More bytes than the limit are refused without being parsed."""
    data = bytes(MAX_MESSAGE_BYTES + 1)
    for decode in (decode_message, decode_batch):
        with pytest.raises(CodecError, match=f"at most {MAX_MESSAGE_BYTES}"):
            decode(data)


def test_the_jobs_of_orders_are_a_field_that_need_not_be_there() -> None:
    """The field may be absent; if it is present it has one element for each span."""
    without = envelope("dispatch_table_request")
    assert not without.dispatch_table_request.HasField("jobs")
    assert len(decode_message(without.SerializeToString()).body.jobs) == 0  # type: ignore[union-attr]
    named = replace(dispatch(), jobs=np.full(20, 7 << 20 | 1, np.uint64))
    assert decode_message(encode_message(message(named))).body == named
    with pytest.raises(CodecError, match=r"jobs: shape \(2,\)"):
        encode_message(message(replace(named, jobs=named.jobs[:2])))


def test_sender_refuses_what_breaks_the_contract() -> None:
    """Encoding refuses wrong types, wrong lengths, and resolved_ts below checkpoint_ts."""
    good = dispatch(3)
    columns = (good.numbers, good.spans, good.actions, good.checkpoint_ts, good.resolved_ts, good.assignment_epochs)
    spoiled = {
        r"numbers: a column of uint32": (0, good.numbers.astype(np.int64)),
        r"actions: shape \(2,\)": (2, good.actions[:2]),
        r"checkpoint_ts: a column of uint64": (3, good.checkpoint_ts.astype(np.float64)),
        r"resolved_ts: below checkpoint_ts \(row 0\)": (4, good.checkpoint_ts - np.uint64(1)),
        r"actions: no code 7": (2, np.full(3, 7, np.uint8)),
    }
    for reason, (place, column) in spoiled.items():
        body = DispatchTableRequest(*columns[:place], column, *columns[place + 1 :])  # type: ignore[arg-type]
        with pytest.raises(CodecError, match=reason):
            encode_message(message(body))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"number": -1}, r"^number: -1 does not fit 64 bits"),
        ({"owner_revision": 2**63}, r"^owner_revision: \d+ does not fit 63 bits"),
        ({"echo": 1.5}, r"^echo: 1.5 is not an integer"),
        ({"sender": "\udcff"}, r"^sender: .* is not UTF-8 text"),
        ({"body": None}, r"^body: NoneType is no message"),
    ],
)
def test_sender_refuses_an_envelope_that_cannot_travel(fields: dict[str, Any], reason: str) -> None:
    """Encoding refuses numbers out of range, names that are not text, and bodies that are not
    messages.
    """
    values: dict[str, Any] = {
        "sender": "a",
        "receiver": "b",
        "changefeed": CHANGEFEED,
        "owner_revision": 1,
        "changefeed_epoch": 1,
        "processor_epoch": 1,
        "number": 1,
        "echo": 0,
        "body": heartbeat(),
    }
    with pytest.raises(CodecError, match=reason):
        encode_message(Message(**(values | fields)))


GOOD_BYTES = [encode_message(message(body)) for body in BODIES.values()]
BATCH_BYTES = encode_batch(BATCH)


def _never_anything_else(decode: Callable[[bytes], object], data: bytes) -> None:
    with contextlib.suppress(CodecError):
        decode(data)


@given(st.binary(max_size=400))
@settings(max_examples=1_000, deadline=None)
def test_random_bytes_raise_codec_error_alone(data: bytes) -> None:
    """Decoding arbitrary bytes returns a message or raises CodecError."""
    _never_anything_else(decode_message, data)
    _never_anything_else(decode_batch, data)


edits = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(["set", "cut", "insert"]), st.binary(min_size=1, max_size=4)),
    min_size=1,
    max_size=4,
)


@given(st.sampled_from(GOOD_BYTES), edits)
@settings(max_examples=2_500, deadline=None)
def test_mutated_messages_raise_codec_error_alone(data: bytes, changes: list[tuple[float, str, bytes]]) -> None:
    """Decoding a valid message with changed bytes returns a message that can be encoded again, or
    raises CodecError.
    """
    mutated = bytearray(data)
    for where, how, what in changes:
        at = int(where * len(mutated)) if mutated else 0
        if how == "set":
            mutated[at : at + len(what)] = what
        elif how == "cut":
            del mutated[at : at + len(what)]
        else:
            mutated[at:at] = what
    try:
        decoded = decode_message(bytes(mutated))
    except CodecError:
        return
    # What was decoded is valid: it can be encoded again, and is equal to the result.
    assert decode_message(encode_message(decoded)) == decoded
    _never_anything_else(decode_batch, BATCH_BYTES[: len(mutated)] + bytes(mutated))
