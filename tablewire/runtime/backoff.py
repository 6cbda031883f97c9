"""Exponential backoff with jitter."""

from __future__ import annotations

import random

_DOUBLINGS_MAX = 30


class Backoff:
    """Pauses that double from `min_s` to `max_s` seconds until `reset`.

    Each pause is shortened at random by up to half, so that processes do not retry in step. Not
    thread-safe.
    """

    def __init__(self, min_s: float, max_s: float) -> None:
        self._min_s, self._max_s = min_s, max_s
        self.failures = 0
        """Calls of `next_s` since the last `reset`."""

    def next_s(self) -> float:
        """Count one more failure and return how long to pause, in seconds."""
        pause_s = min(self._max_s, self._min_s * 2.0 ** min(self.failures, _DOUBLINGS_MAX))
        self.failures += 1
        return pause_s * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Start again from `min_s`: an attempt succeeded."""
        self.failures = 0
