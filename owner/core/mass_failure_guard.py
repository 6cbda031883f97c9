"""The mass-failure guard.

When many captures disappear at once, they are rarely all dead, and moving all spans to the few that
are left would overload them. While the guard is active, spans that run continue, and spans that
lost their capture wait with the stall reason `brake`.

It becomes active when more than brake_percent of the captures are lost within brake_window_ms. It
ends when at most half of that share is missing (hysteresis), or after brake_hold_ms.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from owner.core.scheduler_config import SchedulerConfig


@dataclass(slots=True)
class MassFailureGuard:
    """The guard of one scheduler."""

    is_active: bool = False
    since_ms: int = 0
    before: int = 0  # the number of captures before the loss
    losses: list[tuple[int, int]] = field(default_factory=list)  # (at_ms, count) within the window

    def tick(self, now_ms: int, alive: int, gone: int, config: SchedulerConfig) -> None:
        """Update the guard. gone: the captures that disappeared in this tick without a drain."""
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
