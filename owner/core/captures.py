"""The captures of one term: small ints for the columns, the numbers of the messages, and who may be
given work.

An int is given out again once its capture is gone and has no role any more, so that columns of 16
bits are enough. The message number n of a capture goes on when it leaves and comes back under the
same id, since its agent drops every n that is not larger than the last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from owner.core.tables import Rows
from tablewire.model.ids import CaptureID, CaptureInfo
from tablewire.model.states import CaptureState, LivenessState

GONE_KEPT = 10_000
"""So many captures that are gone are remembered, should one come back under its id."""


@dataclass(slots=True)
class Capture:
    """One processor, as this scheduler knows it."""

    index: int
    id: CaptureID
    alive: bool = True
    joined_ms: int = 0
    processor_epoch: int = 0  # 0 = not known yet
    sent: int = 0  # n of the last message to it
    received: int = 0  # m of the last report that was applied
    acked: int = 0  # what its next report may build on
    echoed: int = 0  # the largest echo that was applied
    reported_ms: int | None = None  # when it answered last, in this life
    heartbeat_ms: int | None = None  # when it was asked last
    stats_ms: int | None = None
    liveness: LivenessState = LivenessState.ALIVE
    fenced: bool = False
    must_report_names: bool = False  # it used a number that is not known here
    unnumbered: list[Rows] = field(default_factory=list)  # rows that it reported by name
    audited_ms: int | None = None

    def state(self, now_ms: int, silent_ms: int) -> CaptureState:
        if self.reported_ms is None:
            return CaptureState.UNINITIALIZED
        if now_ms - self.reported_ms > silent_ms:
            return CaptureState.SILENT
        if self.liveness is LivenessState.STOPPING:
            return CaptureState.STOPPING
        return CaptureState.READY


class Captures:
    """All captures of this term by id and by index; one thread."""

    def __init__(self) -> None:
        self._by_id: dict[CaptureID, Capture] = {}
        self._by_index: list[Capture] = []
        self._free: list[int] = []
        self._gone: deque[CaptureID] = deque()

    def __len__(self) -> int:
        """How many indexes were given out."""
        return len(self._by_index)

    def __getitem__(self, index: int) -> Capture:
        return self._by_index[index]

    def get(self, capture_id: CaptureID) -> Capture | None:
        """The living capture of this id."""
        capture = self._by_id.get(capture_id)
        return capture if capture is not None and capture.alive else None

    def alive(self) -> Iterator[Capture]:
        """By id."""
        return (capture for _, capture in sorted(self._by_id.items()) if capture.alive)

    def update(self, alive: Mapping[CaptureID, CaptureInfo], now_ms: int) -> tuple[list[Capture], list[Capture]]:
        """(joined, gone) since the last call, each by id."""
        joined, gone = [], []
        for capture_id in sorted(alive):
            capture = self._by_id.get(capture_id)
            if capture is None:
                capture = self._by_id[capture_id] = Capture(index=-1, id=capture_id, joined_ms=now_ms)
                self._give_index(capture)
                joined.append(capture)
            elif not capture.alive:
                self._give_index(capture)
                # All that was known of it was taken for stopped; it has to tell everything again,
                # by name.
                capture.alive, capture.joined_ms, capture.reported_ms = True, now_ms, None
                capture.acked, capture.must_report_names, capture.heartbeat_ms = 0, True, None
                joined.append(capture)
        for capture in self.alive():
            if capture.id not in alive:
                capture.alive = False
                capture.unnumbered.clear()
                gone.append(capture)
        return joined, gone

    def release(self, capture: Capture) -> None:
        """A capture that is gone has no role any more: its index may be given to another one."""
        self._free.append(capture.index)
        self._gone.append(capture.id)
        if len(self._gone) > GONE_KEPT:
            oldest = self._by_id.get(self._gone.popleft())
            if oldest is not None and not oldest.alive:
                del self._by_id[oldest.id]

    def _give_index(self, capture: Capture) -> None:
        if self._free:
            capture.index = self._free.pop()
            self._by_index[capture.index] = capture
        else:
            capture.index = len(self._by_index)
            self._by_index.append(capture)
