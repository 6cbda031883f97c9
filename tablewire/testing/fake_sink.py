"""The sink that `tablewire.testing` offers. Import it from there."""

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
    writers: dict[str, tuple[int, int] | None] = field(default_factory=dict)  # who may write, and under what (None: unfenced)


class FakeSink:
    """A sink that several FakeTableExecutors share: it fences like a real one, keeps positions, and counts writers.

    A fenced writer takes a span over under (changefeed_epoch, assignment_epoch): an older pair than the stored one is refused,
    a newer one shuts the former writer out. An unfenced writer is never refused. Whoever can still change the sink is an
    effective writer; two at once are a violation.
    """

    def __init__(self) -> None:
        self._rows: dict[Span, _SinkRow] = {}
        self.max_writers = 0
        """The most effective writers that any span has had at once."""
        self.refused_writes: Counter[Span] = Counter()
        """Writes, by span, that were refused for their epoch."""
        self.violations: deque[str] = deque(maxlen=MAX_RECORDED_VIOLATIONS)
        """Each time a span got a second effective writer, and each permission that was given twice."""

    def writers(self, span: Span) -> tuple[str, ...]:
        """Who may effectively write the span now, by name."""
        row = self._rows.get(span)
        if row is None:
            return ()
        return tuple(sorted(name for name, fence in row.writers.items() if fence is None or fence == row.fence))

    def position(self, span: Span) -> Ts:
        """Up to where the span was written, by anybody."""
        row = self._rows.get(span)
        return 0 if row is None else row.position

    def fence(self, span: Span) -> tuple[int, int]:
        """The (changefeed_epoch, assignment_epoch) that is stored; (0, 0) before any."""
        row = self._rows.get(span)
        return (0, 0) if row is None else row.fence

    def take_over(self, span: Span, writer: str, fence: tuple[int, int] | None, granted: Ts) -> Ts:
        """The writer may write from here on; the position to start from, max(granted, stored). EpochRefusedError: too old."""
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
        """One write up to checkpoint_ts. EpochRefusedError: another one has taken over."""
        row = self._rows.setdefault(span, _SinkRow())
        if writer not in row.writers:
            self.violations.append(f"span {span}: {writer} wrote without a permission")
            return
        fence = row.writers[writer]
        if fence is not None and fence != row.fence:
            self.refused_writes[span] += 1
            raise EpochRefusedError(
                f"the sink refuses the epoch: span {span} is held under {row.fence}, {writer} wrote under {fence}"
            )
        row.position = max(row.position, checkpoint_ts)

    def leave(self, span: Span, writer: str) -> None:
        """The writer has stopped for good."""
        row = self._rows.get(span)
        if row is not None:
            row.writers.pop(writer, None)
