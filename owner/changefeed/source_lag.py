"""How long ago the source was where the checkpoint is: the lag in seconds, whatever a source's Ts means.

One writer, any reader. The accuracy is how often the source is asked (`source.poll_interval_ms`).
"""

from __future__ import annotations

from collections import deque

from tablewire.model.ids import Ts

SAMPLES_MAX = 4_096
"""When there are more, every second one goes: a long lag is known less exactly, not forgotten."""


class SourceLag:
    def __init__(self) -> None:
        self._samples: deque[tuple[Ts, float]] = deque()
        """(where the source was, when it was first seen there), both growing."""

    def note(self, source_ts: Ts, checkpoint_ts: Ts, now_s: float) -> None:
        """What is known at now_s, on any monotone clock in seconds."""
        samples = self._samples
        if source_ts > (samples[-1][0] if samples else 0):
            samples.append((source_ts, now_s))
        while samples and samples[0][0] <= checkpoint_ts:
            samples.popleft()
        if len(samples) > SAMPLES_MAX:
            self._samples = deque(sample for at, sample in enumerate(samples) if at % 2 == 0 or at == len(samples) - 1)

    def seconds(self, checkpoint_ts: Ts, now_s: float) -> float:
        """0 when the checkpoint is where the source was seen last."""
        for source_ts, seen_s in list(self._samples):
            if source_ts > checkpoint_ts:
                return max(0.0, now_s - seen_s)
        return 0.0
