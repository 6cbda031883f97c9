"""What rebalance and balance remember between two ticks."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from owner.core.jobs import RebalanceJob
from owner.core.tables import Tables


@dataclass(slots=True)
class Balancer:
    """At most one job; is_balancing: loads are being evened out without being asked."""

    job: RebalanceJob | None = None
    is_balancing: bool = False
    quiet_since_ms: int | None = None
    planned: deque[tuple[int, int, int]] = field(default_factory=deque)  # (row, its number, target)

    def shift(self, tables: Tables) -> dict[int, float]:
        """What the planned moves will add to each capture (index -> weight, negative: take away)."""
        added: dict[int, float] = {}
        for row, number, target in self.planned:
            source = int(tables.primary[row])
            if tables.live[row] and tables.number[row] == number and source >= 0:
                weight = float(tables.weight[row])
                added[source] = added.get(source, 0.0) - weight
                added[target] = added.get(target, 0.0) + weight
        return added
