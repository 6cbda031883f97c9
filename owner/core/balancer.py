"""What rebalance and balance remember between two ticks."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from owner.core.jobs import RebalanceJob


@dataclass(slots=True)
class Balancer:
    """At most one job; is_balancing: loads are being evened out without being asked."""

    job: RebalanceJob | None = None
    is_balancing: bool = False
    quiet_since_ms: int | None = None
    planned: deque[tuple[int, int, int]] = field(default_factory=deque)  # (row, its number, target)
