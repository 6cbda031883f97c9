"""What a processor answers for a changefeed whose executor it cannot make: that it holds nothing and can take nothing, and why.

Silence would be worse than the failure. The owner hears this processor in other changefeeds, so that it cannot be taken for
lost, and a capture that never spoke may hold anything: nothing of the changefeed could be promoted or moved anywhere.
"""

from __future__ import annotations

from tablewire.errors import OperatingError
from tablewire.model.ids import Ts
from tablewire.model.progress import Checkpoint, TableStatus
from tablewire.model.spans import Span
from tablewire.model.states import TableState


class UnavailableExecutor:
    """A TableExecutor that refuses every span with `reason`. It has nothing that a sink would have to fence."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def add_table_span(self, span: Span, checkpoint: Checkpoint, is_prepare: bool) -> bool:
        raise OperatingError(f"this processor cannot serve the changefeed: {self.reason}")

    def set_assignment_epoch(self, span: Span, epoch: int) -> None:
        """Never called: nothing is ever prepared here."""

    def is_add_table_span_finished(self, span: Span, is_prepare: bool) -> bool:
        return False

    def remove_table_span(self, span: Span) -> bool:
        return True

    def is_remove_table_span_finished(self, span: Span) -> tuple[Ts, bool]:
        return 0, True

    def get_table_span_status(self, span: Span, collect_stat: bool) -> TableStatus:
        return TableStatus(span, TableState.ABSENT, Checkpoint(0, 0))
