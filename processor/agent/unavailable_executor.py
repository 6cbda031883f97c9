"""The executor of a changefeed whose real executor cannot be made: it holds nothing and refuses every span with the reason.

Without it the processor would have to stay silent. The owner has its answers in other changefeeds, so it does not count as
lost, and a capture that never reported may hold any span: nothing of the changefeed could be promoted or moved anywhere.
"""

from __future__ import annotations

from tablewire.errors import OperatingError
from tablewire.model.ids import Ts
from tablewire.model.progress import Checkpoint, TableStatus
from tablewire.model.spans import Span
from tablewire.model.states import TableState


class UnavailableExecutor:
    """A TableExecutor that refuses every span with `reason`. It has no sink to fence."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def add_table_span(self, span: Span, checkpoint: Checkpoint, is_prepare: bool) -> bool:
        raise OperatingError(f"this processor cannot serve the changefeed: {self.reason}")

    def set_assignment_epoch(self, span: Span, epoch: int) -> None:
        """Never called: no span is ever prepared here. It makes this executor count as fenced."""

    def is_add_table_span_finished(self, span: Span, is_prepare: bool) -> bool:
        return False

    def remove_table_span(self, span: Span) -> bool:
        return True

    def is_remove_table_span_finished(self, span: Span) -> tuple[Ts, bool]:
        return 0, True

    def get_table_span_status(self, span: Span, collect_stat: bool) -> TableStatus:
        return TableStatus(span, TableState.ABSENT, Checkpoint(0, 0))
