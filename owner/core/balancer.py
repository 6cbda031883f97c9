"""What rebalance and balance remember between two ticks."""

from __future__ import annotations

from collections import Counter, deque
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
    begun: dict[int, tuple[int, int]] = field(default_factory=dict)  # row -> (its number, target) of moves that have not ended
    failed: Counter[int] = field(default_factory=Counter)  # target -> how many moves to it failed, one after the other

    def clear(self) -> None:
        """What was planned and tried is forgotten; moves that are under way end by themselves."""
        self.planned.clear()
        self.begun.clear()
        self.failed.clear()

    def settle(self, tables: Tables) -> None:
        """Takes note of the moves that have ended, well or not."""
        for row, (number, target) in list(self.begun.items()):
            if tables.number[row] == number and int(tables.secondary[row]) == target:
                continue
            del self.begun[row]
            if tables.number[row] != number:
                continue
            if int(tables.primary[row]) == target:
                self.failed.pop(target, None)
            else:
                self.failed[target] += 1

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
