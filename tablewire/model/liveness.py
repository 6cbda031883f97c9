"""Whether a processor is stopping: set once by its process, read by all of its agents."""

from __future__ import annotations

import threading

from tablewire.model.states import LivenessState


class Liveness:
    """ALIVE until `stop` is called, STOPPING from then on. Any thread."""

    def __init__(self) -> None:
        self._stopping = threading.Event()

    @property
    def state(self) -> LivenessState:
        return LivenessState.STOPPING if self._stopping.is_set() else LivenessState.ALIVE

    def stop(self) -> None:
        self._stopping.set()
