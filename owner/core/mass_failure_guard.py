"""The brake: when many captures vanish at once, the cause is rarely that they are all dead, and
moving everything to the few that are left would bury them. What runs goes on; spans that lost their
capture wait, and say so.

It lets go when enough captures are back, or after `brake_hold_ms`. Hysteresis: it grips above
brake_percent of the captures lost, and lets go early only when half of that share is missing at
most.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from owner.core.scheduler_config import SchedulerConfig


@dataclass(slots=True)
class MassFailureGuard:
    """One scheduler's brake; told of every tick."""

    is_active: bool = False
    since_ms: int = 0
    before: int = 0  # how many captures there were when the loss began
    losses: list[tuple[int, int]] = field(default_factory=list)  # (when, how many) within the window

    def tick(self, now_ms: int, alive: int, gone: int, config: SchedulerConfig) -> None:
        """alive: how many captures there are now. gone: how many vanished since the last tick
        without having been drained."""
        self.losses = [(at, lost) for at, lost in self.losses if now_ms - at <= config.brake_window_ms]
        if gone:
            self.losses.append((now_ms, gone))
        lost = sum(lost for _, lost in self.losses)
        if not self.is_active:
            self.before = alive + lost
            if self.before >= config.brake_min_captures and lost * 100 > self.before * config.brake_percent:
                self.is_active, self.since_ms = True, now_ms
            return
        missing = max(0, self.before - alive)
        if missing * 200 <= self.before * config.brake_percent or now_ms - self.since_ms >= config.brake_hold_ms:
            self.is_active = False
            self.losses.clear()
