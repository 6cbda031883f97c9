"""The captures of one term: their indexes in the columns, message numbers and states.

An index is reused once its capture is gone and has no role any longer, so that 16-bit columns
suffice. The message number n of a capture continues if it comes back under the same id, since its
agent drops every n that is not larger than the last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from owner.core.tables import Rows
from tablewire.model.ids import CaptureID, CaptureInfo
from tablewire.model.states import CaptureState, LivenessState

GONE_KEPT = 10_000
"""The number of captures that are gone and may come back under their id."""


@dataclass(slots=True)
class Capture:
    """One processor, as known to this scheduler."""

    index: int
    id: CaptureID
    alive: bool = True
    processor_epoch: int = 0  # 0 = not known
    sent: int = 0  # n of the last message to it
    received: int = 0  # m of the last report that was applied
    acked: int = 0  # the base that its next report may have
    echoed: int = 0  # the largest echo that was applied
    reported_ms: int | None = None  # last message from it since it joined
    heartbeat_ms: int | None = None  # last heartbeat to it
    stats_ms: int | None = None
    liveness: LivenessState = LivenessState.ALIVE
    fenced: bool = False
    must_report_names: bool = False  # it reported an unknown number
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
        """Return the number of indexes in use or free."""
        return len(self._by_index)

    def __getitem__(self, index: int) -> Capture:
        return self._by_index[index]

    def get(self, capture_id: CaptureID) -> Capture | None:
        """Return the capture with this id if it is alive."""
        capture = self._by_id.get(capture_id)
        return capture if capture is not None and capture.alive else None

    def alive(self) -> Iterator[Capture]:
        """Return the captures that are alive, by id."""
        return (capture for _, capture in sorted(self._by_id.items()) if capture.alive)

    def update(self, alive: Mapping[CaptureID, CaptureInfo]) -> tuple[list[Capture], list[Capture]]:
        """Take over the alive captures; return those that joined and those that are gone, by id."""
        joined, gone = [], []
        for capture_id in sorted(alive):
            capture = self._by_id.get(capture_id)
            if capture is not None and capture.alive:
                continue
            if capture is None:
                capture = self._by_id[capture_id] = Capture(index=-1, id=capture_id)
            else:
                # Its spans count as stopped: it has to report all of them again, by name.
                capture.alive, capture.reported_ms = True, None
                capture.acked, capture.must_report_names, capture.heartbeat_ms = 0, True, None
            self._give_index(capture)
            joined.append(capture)
        for capture in self.alive():
            if capture.id not in alive:
                capture.alive = False
                capture.unnumbered.clear()
                gone.append(capture)
        return joined, gone

    def release(self, capture: Capture) -> None:
        """Free the index of a capture that is gone and has no role."""
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
