"""The dispatches of an owner as log lines, which join a move's story across processes.

The owner's `job_requested` and `span_moved` and the `span_ordered` of the two processors share `job`, which the CLI shows too;
changefeed, span and owner_revision join what no job asked for. assignment_epoch is the fence that the sink checks.

A few spans at a time (moves) are named; many at once (a start, a failover) are one line with counts. Owners repeat a dispatch
until it is confirmed, so each is logged once. Used on the agents' thread.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Final

import structlog

from tablewire.model.ids import ChangefeedID
from tablewire.model.jobs import format_job_id
from tablewire.model.messages import Batch, DispatchTableRequest, Message
from tablewire.model.spans import Span
from tablewire.model.states import DispatchAction

NAMED_MAX: Final = 5
"""The most spans of one message that get a line each."""
REMEMBERED_MAX: Final = 1_024
"""Spans whose last dispatch is remembered; a repetition for any other span is logged again."""

_ORDERS = {DispatchAction.ADD_PREPARE: "prepare", DispatchAction.ADD_WRITE: "write", DispatchAction.REMOVE: "stop"}

_log = structlog.get_logger("processor.orders")


class DispatchLog:
    def __init__(self, capture_id: str) -> None:
        self._log = _log.bind(capture=capture_id)
        self._last: OrderedDict[tuple[ChangefeedID, Span, bool], tuple[int, ...]] = OrderedDict()

    def note(self, batch: Batch) -> None:
        """Log what is new in a batch of the owner that the agents obey."""
        for message in batch.messages:
            if isinstance(message.body, DispatchTableRequest):
                self._note(message, message.body)

    def _note(self, message: Message, request: DispatchTableRequest) -> None:
        log = self._log.bind(changefeed=str(message.changefeed), owner_revision=message.owner_revision)
        actions = request.actions.tolist()
        orders = [_ORDERS[DispatchAction(action)] for action in actions]
        if len(actions) > NAMED_MAX:
            first = next(iter(request.spans))
            if self._is_new((message.changefeed, first, True), (message.owner_revision, len(actions), actions[0])):
                log.info("spans_ordered", **Counter(orders))
            return
        epochs, jobs = request.assignment_epochs.tolist(), request.jobs.tolist() or [0] * len(actions)
        for span, action, order, epoch, job in zip(request.spans, actions, orders, epochs, jobs, strict=True):
            if self._is_new((message.changefeed, span, False), (message.owner_revision, action, epoch)):
                ids = {"assignment_epoch": epoch, **({"job": format_job_id(job)} if job else {})}
                log.info("span_ordered", span=str(span), order=order, **ids)

    def _is_new(self, subject: tuple[ChangefeedID, Span, bool], dispatch: tuple[int, ...]) -> bool:
        """Return whether the last dispatch for this span was another one. True in subject: for the many spans it begins."""
        if self._last.get(subject) == dispatch:
            return False
        self._last[subject] = dispatch
        self._last.move_to_end(subject)
        if len(self._last) > REMEMBERED_MAX:
            self._last.popitem(last=False)
        return True
