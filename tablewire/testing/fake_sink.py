"""The sink of `tablewire.testing`; import it from there."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from tablewire.errors import EpochRefusedError
from tablewire.model.ids import Ts
from tablewire.model.spans import Span

MAX_RECORDED_VIOLATIONS = 1_000


@dataclass(slots=True)
class _SinkRow:
    fence: tuple[int, int] = (0, 0)
    position: Ts = 0
    writers: dict[str, tuple[int, int] | None] = field(default_factory=dict)
    """The fence of each writer by name, None for an unfenced one."""


class FakeSink:
    """A sink for several FakeTableExecutors: it fences, stores positions, and counts writers.

    A fenced writer takes over a span with (changefeed_epoch, assignment_epoch). A pair older than
    the stored one is refused; a newer one excludes the previous writer. An unfenced writer is never
    refused. A writer whose next write would be accepted is effective; two effective writers of a
    span are a violation.
    """

    def __init__(self) -> None:
        self._rows: dict[Span, _SinkRow] = {}
        self.max_writers = 0
        """The highest number of effective writers that a span has had at once."""
        self.refused_writes: Counter[Span] = Counter()
        """How many writes were refused for their epoch, by span."""
        self.violations: deque[str] = deque(maxlen=MAX_RECORDED_VIOLATIONS)
        """Each time that a span got a second effective writer, or was written without a takeover."""

    def writers(self, span: Span) -> tuple[str, ...]:
        """Return the names of the effective writers of the span."""
        row = self._rows.get(span)
        if row is None:
            return ()
        return tuple(sorted(name for name, fence in row.writers.items() if fence is None or fence == row.fence))

    def position(self, span: Span) -> Ts:
        """Return how far the span has been written."""
        row = self._rows.get(span)
        return 0 if row is None else row.position

    def fence(self, span: Span) -> tuple[int, int]:
        """Return the stored (changefeed_epoch, assignment_epoch), (0, 0) if there is none."""
        row = self._rows.get(span)
        return (0, 0) if row is None else row.fence

    def take_over(self, span: Span, writer: str, fence: tuple[int, int] | None, granted: Ts) -> Ts:
        """Add a writer; return where it starts. Raise EpochRefusedError if its fence is too old."""
        row = self._rows.setdefault(span, _SinkRow())
        if fence is not None:
            if fence < row.fence:
                self.refused_writes[span] += 1
                raise EpochRefusedError(
                    f"the sink refuses the epoch: span {span} is held under {row.fence}, {writer} came with {fence}"
                )
            row.fence = fence
        row.writers[writer] = fence
        row.position = max(row.position, granted)
        effective = self.writers(span)
        self.max_writers = max(self.max_writers, len(effective))
        if len(effective) > 1:
            self.violations.append(f"span {span}: {', '.join(effective)} write at once under {row.fence}")
        return row.position

    def write(self, span: Span, writer: str, checkpoint_ts: Ts) -> None:
        """Write up to checkpoint_ts. Raise EpochRefusedError if another writer has taken over."""
        row = self._rows.setdefault(span, _SinkRow())
        if writer not in row.writers:
            self.violations.append(f"span {span}: {writer} wrote without a takeover")
            return
        fence = row.writers[writer]
        if fence is not None and fence != row.fence:
            self.refused_writes[span] += 1
            raise EpochRefusedError(
                f"the sink refuses the epoch: span {span} is held under {row.fence}, {writer} wrote under {fence}"
            )
        row.position = max(row.position, checkpoint_ts)

    def leave(self, span: Span, writer: str) -> None:
        """Remove a writer that has stopped."""
        row = self._rows.get(span)
        if row is not None:
            row.writers.pop(writer, None)
