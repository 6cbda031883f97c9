"""Whether a capture is staying or leaving: set once by its process, read by every agent in it."""

from __future__ import annotations

import threading

from tablewire.model.states import LivenessState


class Liveness:
    """ALIVE until `stop` is called, then STOPPING for good. Any thread."""

    def __init__(self) -> None:
        self._stopping = threading.Event()

    @property
    def state(self) -> LivenessState:
        return LivenessState.STOPPING if self._stopping.is_set() else LivenessState.ALIVE

    def stop(self) -> None:
        """One way and idempotent."""
        self._stopping.set()
