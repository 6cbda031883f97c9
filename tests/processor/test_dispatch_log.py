"""What the owner orders as lines: each order once, in its words, and never more lines than that for many spans."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from structlog.testing import capture_logs

from processor.agent.dispatch_log import NAMED_MAX, REMEMBERED_MAX, DispatchLog
from tablewire.model.ids import ChangefeedID
from tablewire.model.jobs import format_job_id, new_job_id
from tablewire.model.messages import Batch, DispatchTableRequest, Message
from tablewire.model.spans import Span, SpanBlock
from tablewire.model.states import DispatchAction

FEED = ChangefeedID("default", "orders")
PREPARE, WRITE, STOP = DispatchAction.ADD_PREPARE, DispatchAction.ADD_WRITE, DispatchAction.REMOVE


def batch(*orders: tuple[int, DispatchAction, int], revision: int = 7) -> Batch:
    """One dispatch of (table, action, assignment_epoch)."""
    tables, actions, epochs = zip(*orders, strict=True)
    nothing = np.zeros(len(orders), np.uint64)
    request = DispatchTableRequest(
        np.arange(1, len(orders) + 1, dtype=np.uint32),
        SpanBlock.of([Span(table) for table in tables]),
        np.array(actions, np.uint8),
        nothing,
        nothing,
        np.array(epochs, np.uint64),
    )
    return Batch("owner", "capture-1", revision, (), (Message("owner", "capture-1", FEED, revision, 1, 1, 1, 0, request),))


def test_a_move_is_told_step_by_step_and_once() -> None:
    """Repetitions are silent; the same order after another one, and under another owner, is logged again."""
    log = DispatchLog("capture-1")
    with capture_logs() as lines:
        for order in ((5, PREPARE, 0), (5, PREPARE, 0), (5, WRITE, 9), (5, STOP, 0), (5, STOP, 0), (5, PREPARE, 0)):
            log.note(batch(order))
        log.note(batch((5, PREPARE, 0), revision=8))
    assert [(line["order"], line["assignment_epoch"], line["owner_revision"]) for line in lines] == [
        ("prepare", 0, 7), ("write", 9, 7), ("stop", 0, 7), ("prepare", 0, 7), ("prepare", 0, 8),
    ]  # fmt: skip
    assert {(line["event"], line["capture"], line["changefeed"], line["span"]) for line in lines} == {
        ("span_ordered", "capture-1", "default/orders", str(Span(5)))
    }


def test_an_order_of_a_job_has_its_id() -> None:
    """The one that the CLI and the owner's log show."""
    (message,) = batch((5, PREPARE, 0), (6, STOP, 0)).messages
    assert isinstance(message.body, DispatchTableRequest)
    number = new_job_id(7)
    named = replace(message, body=replace(message.body, jobs=np.array([number, 0], np.uint64)))
    with capture_logs() as lines:
        DispatchLog("capture-1").note(Batch("owner", "capture-1", 7, (), (named,)))
    assert [line.get("job") for line in lines] == [format_job_id(number), None]
    assert format_job_id(number).startswith("7-")


def test_many_spans_are_one_line_and_memory_is_bounded() -> None:
    """However often they are repeated, and however many there are."""
    log = DispatchLog("capture-1")
    many = batch(*((table, WRITE, table) for table in range(1, NAMED_MAX + 2)))
    with capture_logs() as lines:
        log.note(many)
        log.note(many)
        assert [(line["event"], line["write"]) for line in lines] == [("spans_ordered", NAMED_MAX + 1)]
        for table in range(REMEMBERED_MAX + 50):
            log.note(batch((table, STOP, 0)))
    assert len(log._last) == REMEMBERED_MAX
