"""A failover: from the loss of captures that wrote spans until every span has a writer again."""

from __future__ import annotations

from dataclasses import dataclass

from owner.core.events import FailoverBegan, FailoverDone
from tablewire.model.ids import CaptureID


@dataclass(slots=True)
class Failover:
    """The present failover of one scheduler, if there is one. since_ms: None = there is none."""

    since_ms: int | None = None
    spans: int = 0

    def begin(self, lost: dict[CaptureID, int], now_ms: int) -> FailoverBegan:
        """Captures are gone, each with the number of spans that it wrote. A failover in progress is extended."""
        self.since_ms = now_ms if self.since_ms is None else self.since_ms
        self.spans += sum(lost.values())
        return FailoverBegan(tuple(lost), sum(lost.values()))

    def end(self, now_ms: int) -> FailoverDone:
        assert self.since_ms is not None
        done = FailoverDone(self.spans, now_ms - self.since_ms)
        self.since_ms, self.spans = None, 0
        return done
