"""What the owner orders, as lines that join a move's story across processes: the owner's `job_requested` and `span_moved` and the
`span_ordered` of the two processors have `job` in common, which the CLI shows too; changefeed, span and owner_revision join
what no job asked for. assignment_epoch is the fence that the sink knows.

Few spans at a time are named (moves); many at once (a start, a failover) are one line with counts. Orders are repeated until
they are confirmed, so an order is told once. The agents' thread.
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
"""Orders of one message that are lines of their own."""
REMEMBERED_MAX: Final = 1_024
"""Spans whose last order is known; a repetition to any other one is told again."""

_log = structlog.get_logger("processor.orders")

_WORDS = {DispatchAction.ADD_PREPARE: "prepare", DispatchAction.ADD_WRITE: "write", DispatchAction.REMOVE: "stop"}


class DispatchLog:
    def __init__(self, capture_id: str) -> None:
        self._log = _log.bind(capture=capture_id)
        self._told: OrderedDict[tuple[ChangefeedID, Span, bool], tuple[int, ...]] = OrderedDict()

    def note(self, batch: Batch) -> None:
        """Every batch of an owner that is listened to."""
        for message in batch.messages:
            if isinstance(message.body, DispatchTableRequest):
                self._note(message, message.body)

    def _note(self, message: Message, request: DispatchTableRequest) -> None:
        log = self._log.bind(changefeed=str(message.changefeed), owner_revision=message.owner_revision)
        actions = request.actions.tolist()
        if len(actions) > NAMED_MAX:
            first = next(iter(request.spans))
            if self._is_new((message.changefeed, first, True), (message.owner_revision, len(actions), actions[0])):
                log.info("spans_ordered", **Counter(_word(action) for action in actions))
            return
        epochs, jobs = request.assignment_epochs.tolist(), request.jobs.tolist() or [0] * len(actions)
        for span, action, epoch, job in zip(request.spans, actions, epochs, jobs, strict=True):
            if self._is_new((message.changefeed, span, False), (message.owner_revision, action, epoch)):
                ids = {"assignment_epoch": epoch, **({"job": format_job_id(job)} if job else {})}
                log.info("span_ordered", span=str(span), order=_word(action), **ids)

    def _is_new(self, subject: tuple[ChangefeedID, Span, bool], order: tuple[int, ...]) -> bool:
        """Whether it is another one than the last that was told of this span (True in subject: of the many that it begins)."""
        if self._told.get(subject) == order:
            return False
        self._told[subject] = order
        self._told.move_to_end(subject)
        if len(self._told) > REMEMBERED_MAX:
            self._told.popitem(last=False)
        return True


def _word(action: int) -> str:
    return _WORDS[DispatchAction(action)]
