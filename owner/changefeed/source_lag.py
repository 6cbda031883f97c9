"""The lag of a changefeed in seconds, whatever the unit of its source's Ts. Its resolution is
`source.poll_interval_ms`."""

from __future__ import annotations

from collections import deque

from tablewire.model.ids import Ts

SAMPLES_MAX = 4_096
"""When there are more, every second one is dropped: a long lag is then known less precisely."""


class SourceLag:
    """The positions of a source beyond the checkpoint, with the time at which each was first seen.
    One writer, any reader."""

    def __init__(self) -> None:
        self._samples: deque[tuple[Ts, float]] = deque()  # both ascending

    def observe(self, source_ts: Ts, checkpoint_ts: Ts, now_s: float) -> None:
        """Add the position of the source at now_s, on any monotonic clock in seconds."""
        samples = self._samples
        if source_ts > (samples[-1][0] if samples else 0):
            samples.append((source_ts, now_s))
        while samples and samples[0][0] <= checkpoint_ts:
            samples.popleft()
        if len(samples) > SAMPLES_MAX:
            self._samples = deque(sample for at, sample in enumerate(samples) if at % 2 == 0 or at == len(samples) - 1)

    def seconds(self, checkpoint_ts: Ts, now_s: float) -> float:
        """Return the seconds since the source was first seen beyond the checkpoint; 0 if it was
        not."""
        for source_ts, seen_s in list(self._samples):
            if source_ts > checkpoint_ts:
                return max(0.0, now_s - seen_s)
        return 0.0
