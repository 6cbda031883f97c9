"""What load balancing remembers between two ticks."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


class QueuedMove(NamedTuple):
    """A move that has not begun. number: of the row, which may be reused for another span."""

    place: int  # in the plan
    row: int
    number: int
    source: int
    target: int
    weight: float


class MoveQueue:
    """The moves of a plan that have not begun. Moves between the same two captures begin in the
    order of the plan; moves between others do not wait for them."""

    def __init__(self) -> None:
        self.load_change: defaultdict[int, float] = defaultdict(float)  # what the moves will add to each capture, by index
        self._queues: dict[tuple[int, int], deque[QueuedMove]] = {}

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def add(self, moves: Iterable[QueuedMove]) -> None:
        for move in moves:
            self._queues.setdefault((move.source, move.target), deque()).append(move)
            self._count(move, 1)

    def pop(self, may_begin: Callable[[int, int], bool]) -> QueuedMove | None:
        """Remove and return the first move for which may_begin(source, target) holds."""
        heads = [queue[0] for pair, queue in self._queues.items() if may_begin(*pair)]
        if not heads:
            return None
        move = min(heads)
        queue = self._queues[move.source, move.target]
        queue.popleft()
        if not queue:
            del self._queues[move.source, move.target]
        self._count(move, -1)
        return move

    def _count(self, move: QueuedMove, sign: int) -> None:
        self.load_change[move.source] -= sign * move.weight
        self.load_change[move.target] += sign * move.weight


@dataclass(slots=True)
class Balancer:
    """The state of load balancing."""

    is_balancing: bool = False  # without a job
    quiet_since_ms: int | None = None
    planned: MoveQueue = field(default_factory=MoveQueue)
    failed: Counter[int] = field(default_factory=Counter)  # by target: the number of consecutive failed moves

    def clear(self) -> None:
        """Forget what was planned and tried. Moves that are in progress end by themselves."""
        self.planned = MoveQueue()
        self.failed.clear()
