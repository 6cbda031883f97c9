"""Captures that were evicted while they were silent, and whose executor is not fenced, or not known to be.

Their key is gone, but nobody heard them stop, and their sink would not refuse them. By the rules their death counts only once
their own lease must have made them stop: a TTL and its margin after the revocation. Until then they are passed on as alive, so
that nothing is promoted beside them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from tablewire.types import CaptureID, CaptureInfo


class Evictions:
    """`evict`, `hold`: the thread that evicts; `with_held`: the tick's."""

    def __init__(self) -> None:
        self._held: dict[CaptureID, tuple[CaptureInfo, float]] = {}
        self._lock = threading.Lock()

    def evict(self, capture: CaptureInfo, remove: Callable[[], object], lease_s: float) -> None:
        """Its key is taken away by `remove`, which blocks; lease_s: how long it may write at the most without a registration, 0:
        its sink refuses it at once. It is held from before its key is gone, so that no tick takes it for dead in between."""
        if lease_s:
            self.hold(capture, time.monotonic() + lease_s)
        remove()
        if lease_s:
            self.hold(capture, time.monotonic() + lease_s)

    def hold(self, capture: CaptureInfo, until_s: float) -> None:
        """The capture counts as alive until then, whatever etcd says. until_s: of the same clock as `with_held`."""
        with self._lock:
            self._held[capture.id] = (capture, until_s)

    def with_held(self, captures: Mapping[CaptureID, CaptureInfo], now_s: float) -> Mapping[CaptureID, CaptureInfo]:
        """The captures of etcd, and those that may still write."""
        with self._lock:
            if not self._held:
                return captures
            self._held = {id: (info, until_s) for id, (info, until_s) in self._held.items() if until_s > now_s}
            return {**{id: info for id, (info, _) in self._held.items()}, **captures}
