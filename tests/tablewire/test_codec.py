"""The codec returns every value as it was, and encodes a steady report as small as designed."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tablewire.errors import CodecError
from tablewire.model.ids import TS_MAX, ChangefeedID
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
from tablewire.model.spans import SpanBlock
from tablewire.model.states import DispatchAction, LivenessState, TableState
from tablewire.wire.bodies import rows_of
from tablewire.wire.codec import (
    BatchBuilder,
    decode_batch,
    decode_message,
    encode_batch,
    encode_message,
)
from tablewire.wire.limits import MAX_ROWS_PER_MESSAGE
from tablewire.wire.versions import ProtocolVersions

CHANGEFEED = ChangefeedID("default", "orders")
NO_SPANS = SpanBlock(np.empty(0, np.int64))

u64s = st.one_of(st.integers(0, TS_MAX), st.integers(0, 300), st.sampled_from([0, 1, 2**32, 2**63, TS_MAX - 1, TS_MAX]))
names = st.text(min_size=1, max_size=12)
keys = st.binary(max_size=6)


@st.composite
def u64_columns(draw: st.DrawFn, rows: int) -> Any:
    """Draw columns: arbitrary values, values that are close together, mostly 0, constant, or with
    outliers.
    """
    kind = draw(st.sampled_from(["any", "near", "sparse", "constant"]))
    if kind == "any":
        values = draw(st.lists(u64s, min_size=rows, max_size=rows))
    elif kind == "near":
        base, spread = draw(st.integers(0, 2**63)), draw(st.sampled_from([3, 255, 256, 70_000, 2**33]))
        values = [base + delta for delta in draw(st.lists(st.integers(0, spread), min_size=rows, max_size=rows))]
        for row in draw(st.lists(st.integers(0, max(0, rows - 1)), max_size=2)) if rows else []:
            values[row] = draw(u64s)
    elif kind == "sparse":
        values = [0] * rows
        for row in draw(st.lists(st.integers(0, max(0, rows - 1)), max_size=3)) if rows else []:
            values[row] = draw(u64s)
    else:
        values = [draw(u64s)] * rows
    return np.array(values, np.uint64)


@st.composite
def span_blocks(draw: st.DrawFn, rows: int) -> SpanBlock:
    table_ids = draw(hnp.arrays(np.int64, rows))
    if rows == 0 or draw(st.booleans()):
        return SpanBlock(table_ids)
    start_keys, end_keys = [], []
    for _ in range(rows):
        low, high = sorted((draw(keys), draw(keys)))
        start_keys.append(low)
        end_keys.append(high if low < high else b"")
    return SpanBlock(table_ids, tuple(start_keys), tuple(end_keys))


@st.composite
def checkpoints(draw: st.DrawFn, rows: int) -> tuple[Any, Any]:
    left, right = draw(u64_columns(rows)), draw(u64_columns(rows))
    return np.minimum(left, right), np.maximum(left, right)


@st.composite
def stats_of(draw: st.DrawFn, report_rows: int) -> SpanStats:
    chosen = sorted(draw(st.sets(st.integers(0, report_rows - 1), max_size=4))) if report_rows else []
    rates = st.floats(0, 1e12, allow_nan=False)
    return SpanStats(
        rows=np.array(chosen, np.uint32),
        rows_per_s=draw(hnp.arrays(np.float64, len(chosen), elements=rates)),
        bytes_per_s=draw(hnp.arrays(np.float64, len(chosen), elements=rates)),
        puller_resolved_ts=draw(u64_columns(len(chosen))),
        in_snapshot=draw(hnp.arrays(np.uint8, len(chosen), elements=st.integers(0, 1))),
    )


@st.composite
def reports(draw: st.DrawFn) -> SpanReports:
    rows = draw(st.integers(0, 40))
    numbers = draw(hnp.arrays(np.uint32, rows))
    checkpoint_ts, resolved_ts = draw(checkpoints(rows))
    failed = sorted(draw(st.sets(st.integers(0, rows - 1), max_size=3))) if rows else []
    return SpanReports(
        base=draw(u64s),
        numbers=numbers,
        spans=draw(span_blocks(int((numbers == 0).sum()))),
        states=draw(hnp.arrays(np.uint8, rows, elements=st.integers(0, len(TableState) - 1))),
        checkpoint_ts=checkpoint_ts,
        resolved_ts=resolved_ts,
        last_synced_ts=draw(u64_columns(rows)),
        assignment_epochs=draw(u64_columns(rows)),
        errors=tuple((row, draw(st.text(max_size=20))) for row in failed),
        stats=draw(stats_of(rows)),
        more=draw(st.booleans()),
    )


@st.composite
def heartbeats(draw: st.DrawFn) -> Heartbeat:
    rows = draw(st.integers(0, 20))
    barriers = draw(st.lists(st.builds(TableBarrier, st.integers(-(2**63), 2**63 - 1), u64s), max_size=5))
    return Heartbeat(
        barrier=Barrier(draw(u64s), tuple(barriers)),
        acked=draw(u64s),
        collect_stats=draw(st.booleans()),
        by_name=draw(st.booleans()),
        numbers=draw(hnp.arrays(np.uint32, rows, elements=st.integers(1, 2**32 - 1))),
        spans=draw(span_blocks(rows)),
    )


@st.composite
def dispatches(draw: st.DrawFn) -> DispatchTableRequest:
    rows = draw(st.integers(0, 40))
    checkpoint_ts, resolved_ts = draw(checkpoints(rows))
    actions = draw(hnp.arrays(np.uint8, rows, elements=st.integers(0, 2)))
    epochs = draw(u64_columns(rows))
    return DispatchTableRequest(
        numbers=draw(hnp.arrays(np.uint32, rows, elements=st.integers(1, 2**32 - 1))),
        spans=draw(span_blocks(rows)),
        actions=actions,
        checkpoint_ts=checkpoint_ts,
        resolved_ts=resolved_ts,
        assignment_epochs=np.where((actions == DispatchAction.ADD_WRITE) & (epochs == 0), np.uint64(1), epochs),
        acked=draw(u64s),
        jobs=draw(u64_columns(rows)) if draw(st.booleans()) else np.empty(0, np.uint64),
    )


heartbeat_responses = st.builds(HeartbeatResponse, st.sampled_from(LivenessState), st.booleans(), u64s, u64s, reports())
bodies = st.one_of(heartbeats(), dispatches(), heartbeat_responses, st.builds(DispatchTableResponse, reports()))
messages = st.builds(
    Message,
    sender=names,
    receiver=names,
    changefeed=st.builds(ChangefeedID, st.text(max_size=12), names),
    owner_revision=st.integers(0, 2**63 - 1),
    changefeed_epoch=u64s,
    processor_epoch=u64s,
    number=u64s,
    echo=u64s,
    body=bodies,
)


def message(body: MessageBody, *, sender: str = "owner-1", receiver: str = "capture-1", **others: Any) -> Message:
    given_fields = {"owner_revision": 7, "changefeed_epoch": 3, "processor_epoch": 11, "number": 5, "echo": 4, **others}
    return Message(sender=sender, receiver=receiver, changefeed=CHANGEFEED, body=body, **given_fields)


def steady_report(rows: int, seed: int = 1) -> SpanReports:
    """Return a report of replicating spans that all moved; some lag by a few GiB of WAL, a third
    was never written.
    """
    random = np.random.default_rng(seed)
    checkpoint_ts = (0x12_3456_7890_0000 + random.integers(0, 2**31, rows)).astype(np.uint64)
    return SpanReports(
        base=8,
        numbers=np.arange(1, rows + 1, dtype=np.uint32),
        spans=NO_SPANS,
        states=np.full(rows, TableState.REPLICATING.code, np.uint8),
        checkpoint_ts=checkpoint_ts,
        resolved_ts=checkpoint_ts + random.integers(0, 2**24, rows).astype(np.uint64),
        last_synced_ts=np.where(random.random(rows) < 0.3, np.uint64(0), checkpoint_ts),
        assignment_epochs=np.full(rows, (7 << 20) | 1, np.uint64),
    )


def test_strategies_vary_every_field() -> None:
    """The strategies above cover every field of the messages, so that a new field must be added to
    the codec.
    """
    known = {
        Message: "sender receiver changefeed owner_revision changefeed_epoch processor_epoch number echo body version",
        Heartbeat: "barrier acked collect_stats by_name numbers spans",
        DispatchTableRequest: "numbers spans actions checkpoint_ts resolved_ts assignment_epochs acked jobs",
        HeartbeatResponse: "liveness fenced held checksum reports",
        DispatchTableResponse: "reports",
        SpanReports: "base numbers spans states checkpoint_ts resolved_ts last_synced_ts assignment_epochs errors stats more",
        SpanStats: "rows rows_per_s bytes_per_s puller_resolved_ts in_snapshot",
        SpanBlock: "table_ids start_keys end_keys",
        Barrier: "global_barrier_ts table_barriers",
        Batch: "sender receiver owner_revision active messages version",
    }
    for kind, names_of_fields in known.items():
        assert {field.name for field in fields(kind)} == set(names_of_fields.split()), kind.__name__


@given(messages)
@settings(max_examples=300, deadline=None)
def test_message_comes_back_as_it_was(sent: Message) -> None:
    """Every message survives encoding and decoding, field by field."""
    assert decode_message(encode_message(sent)) == sent


@given(
    st.lists(bodies, max_size=5), st.lists(st.builds(ActiveChangefeed, st.builds(ChangefeedID, names, names), u64s), max_size=5)
)
@settings(max_examples=100, deadline=None)
def test_batch_comes_back_as_it_was(sent: list[MessageBody], active: list[ActiveChangefeed]) -> None:
    """A batch survives encoding and decoding, with its messages in order."""
    unique = {one.changefeed: one for one in active}
    batch = Batch("owner-1", "capture-1", 7, tuple(unique.values()), tuple(message(body) for body in sent))
    assert decode_batch(encode_batch(batch)) == batch
    assert decode_batch(memoryview(encode_batch(batch))) == batch


@pytest.mark.parametrize("rows", [1_000, 131_072])
def test_steady_report_costs_at_most_24_bytes_a_span(rows: int) -> None:
    """A report in which every checkpoint moved has the designed size."""
    report = steady_report(rows)
    data = encode_message(message(HeartbeatResponse(LivenessState.ALIVE, True, rows, 1, report)))
    assert len(data) / rows <= 24
    assert decode_message(data).body.reports == report  # type: ignore[union-attr]


def test_outliers_do_not_make_a_column_wide() -> None:
    """A few spans far behind the others cost a few bytes each, not four more for every span."""
    report = steady_report(10_000)
    far = report.checkpoint_ts.copy()
    far[::1_000] -= np.uint64(2**45)
    lagging = SpanReports(8, report.numbers, NO_SPANS, report.states, far, report.resolved_ts, far, report.assignment_epochs)
    normal = len(encode_message(message(DispatchTableResponse(report))))
    with_stragglers = encode_message(message(DispatchTableResponse(lagging)))
    assert len(with_stragglers) - normal < 1_000 + 10_000
    assert decode_message(with_stragglers).body.reports == lagging  # type: ignore[union-attr]


def test_decoded_columns_cannot_be_written() -> None:
    """The columns of a message are read-only: numpy enforces it."""
    decoded = decode_message(encode_message(message(DispatchTableResponse(steady_report(20)))))
    assert isinstance(decoded.body, DispatchTableResponse)
    for column in ("numbers", "states", "checkpoint_ts", "resolved_ts", "last_synced_ts", "assignment_epochs"):
        assert not getattr(decoded.body.reports, column).flags.writeable, column


def test_builder_takes_what_fits_and_keeps_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full batch refuses a message, and remains valid."""
    one = message(DispatchTableResponse(steady_report(1_000)))
    size = len(encode_message(one))
    monkeypatch.setattr("tablewire.wire.codec.MAX_MESSAGE_BYTES", 2 * size + 200)
    builder = BatchBuilder("owner-1", "capture-1", 7)
    assert [builder.add(one), builder.add(one), builder.add(one)] == [True, True, False]
    assert len(decode_batch(builder.finish()).messages) == 2


def test_message_larger_than_a_batch_is_refused_by_its_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that fits into no batch is an error."""
    monkeypatch.setattr("tablewire.wire.codec.MAX_MESSAGE_BYTES", 5_000)
    with pytest.raises(CodecError, match="at most 5000"):
        BatchBuilder("owner-1", "capture-1", 7).add(message(DispatchTableResponse(steady_report(1_000))))


def test_report_with_too_many_rows_is_refused_by_its_sender() -> None:
    """The encoder has the same limit as the decoder."""
    rows = MAX_ROWS_PER_MESSAGE + 1
    zeros = np.zeros(rows, np.uint64)
    report = SpanReports(0, np.ones(rows, np.uint32), NO_SPANS, np.zeros(rows, np.uint8), zeros, zeros, zeros, zeros)
    sent = message(DispatchTableResponse(report))
    assert rows_of(sent) == rows
    with pytest.raises(CodecError, match=r"dispatch_table_response.rows: \d+ rows in all"):
        encode_message(sent)


def test_rates_that_are_no_numbers_are_sent_as_zero() -> None:
    """An invalid rate of a plug-in does not invalidate the report."""
    stats = SpanStats(
        np.arange(3, dtype=np.uint32),
        np.array([np.nan, np.inf, 5.0]),
        np.array([-1.0, 0.0, 2.0]),
        np.zeros(3, np.uint64),
        np.zeros(3, np.uint8),
    )
    report = steady_report(3)
    sent = SpanReports(
        8,
        report.numbers,
        NO_SPANS,
        report.states,
        report.checkpoint_ts,
        report.resolved_ts,
        report.last_synced_ts,
        report.assignment_epochs,
        stats=stats,
    )
    decoded = decode_message(encode_message(message(DispatchTableResponse(sent)))).body
    assert isinstance(decoded, DispatchTableResponse)
    assert decoded.reports.stats.rows_per_s.tolist() == [0.0, 0.0, 5.0]
    assert decoded.reports.stats.bytes_per_s.tolist() == [0.0, 0.0, 2.0]


def test_error_text_is_cut_and_made_sendable() -> None:
    """An error text of an executor does not invalidate the report, whatever it contains."""
    report = steady_report(2)
    sent = SpanReports(
        8,
        report.numbers,
        NO_SPANS,
        report.states,
        report.checkpoint_ts,
        report.resolved_ts,
        report.last_synced_ts,
        report.assignment_epochs,
        errors=((0, "x" * 10_000), (1, "bad \udcff byte")),
    )
    decoded = decode_message(encode_message(message(DispatchTableResponse(sent)))).body
    assert isinstance(decoded, DispatchTableResponse)
    assert decoded.reports.errors == ((0, "x" * 4_096), (1, "bad ? byte"))


def test_scenario_36_a_batch_has_a_version_that_both_support() -> None:
    """A batch in another version is decoded to the same messages by processes that support it, and
    refused by others.
    """
    batch = Batch("owner-1", "capture-1", 7, (), (message(Heartbeat(Barrier(9))),), version=2)
    data = encode_batch(batch)
    assert decode_batch(data, ProtocolVersions(1, 2)) == batch
    with pytest.raises(CodecError, match=r"^version: 2 is not supported, only 1$"):
        decode_batch(data, ProtocolVersions(1, 1))
    with pytest.raises(CodecError, match=r"^version: 2 is not supported, only 3 to 4$"):
        decode_batch(data, ProtocolVersions(3, 4))


@pytest.mark.parametrize(
    ("own", "other", "common"),
    [
        ((1, 1), (1, 1), 1),
        ((1, 2), (1, 1), 1),
        ((1, 2), (2, 3), 2),
        ((1, 4), (2, 3), 3),
        ((1, 1), (2, 2), None),
        ((3, 4), (1, 2), None),
    ],
)
def test_scenario_36_the_highest_common_version_is_used(own: tuple[int, int], other: tuple[int, int], common: int | None) -> None:
    """Both sides compute the same highest common version."""
    assert ProtocolVersions(*own).common(ProtocolVersions(*other)) == common
    assert ProtocolVersions(*other).common(ProtocolVersions(*own)) == common
