"""Which job an order or a placement belongs to, so that one number follows a job through the logs of all processes.

The core knows jobs and rows, and not what is told of them: this looks at the jobs before a tick and names them in what the tick
brought. It changes what people read and nothing else. The tick's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from owner.core.moves import under_way
from owner.core.state import Core
from owner.core.tables import NO_ROW, TASK_BALANCE, TASK_DRAIN, TASK_MOVE, TASK_NONE
from owner.core.tick import Facts, Placement
from tablewire.model.columns import U64
from tablewire.model.messages import DispatchTableRequest, Message

NAMED_ORDERS_MAX: Final = 256
"""Of one message. Who reads the log of more than that is told how many there were."""
TOLD_PLACEMENTS_MAX: Final = 64


def moves_ahead(core: Core) -> int:
    """Moves of a rebalance that are under way or planned."""
    return len(under_way(core, (TASK_BALANCE,))) + len(core.balancer.planned)


class JobNumbers:
    """The jobs as they stand right before a tick; a job that ends in it still has its last orders and its placements."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._moves = list(core.moves)
        self._rebalance = core.balancer.job.key if core.balancer.job is not None else 0
        self._drains = {target: job.key for target, job in core.drains.items()}

    def name_orders(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages of the tick, with the jobs of their orders."""
        if not (self._moves or self._rebalance or self._drains):
            return messages
        moves = self._by_number()
        return [self._named(message, moves) for message in messages]

    def name_placements(self, facts: Facts) -> Facts:
        """The facts of the tick, with the jobs of the first placements."""
        planned = [placement for placement in facts.placements if placement.source is not None]
        if not planned or not (self._moves or self._rebalance or self._drains):
            return facts
        moves = self._by_number()
        told = [self._placed(placement, moves) for placement in facts.placements[:TOLD_PLACEMENTS_MAX]]
        return replace(facts, placements=(*told, *facts.placements[TOLD_PLACEMENTS_MAX:]))

    def _by_number(self) -> dict[int, int]:
        """The job of each span that was asked for by a move, by the span's number; the newest job of a span."""
        return {number: job.key for job in self._moves for number in job.numbers}

    def _named(self, message: Message, moves: dict[int, int]) -> Message:
        body = message.body
        if not isinstance(body, DispatchTableRequest) or not 0 < len(body.numbers) <= NAMED_ORDERS_MAX:
            return message
        jobs = self._jobs_of(body, moves)
        return message if jobs is None else replace(message, body=replace(body, jobs=jobs))

    def _jobs_of(self, body: DispatchTableRequest, moves: dict[int, int]) -> U64 | None:
        """One element an order, 0 = of no job; None when none is."""
        tables = self._core.tables
        rows = tables.rows_of_numbers(body.numbers)
        jobs = [
            self._job(number, row, int(tables.task[row]), moves)
            for number, row in zip(body.numbers.tolist(), rows.tolist(), strict=True)
        ]
        return np.array(jobs, np.uint64) if any(jobs) else None

    def _job(self, number: int, row: int, task: int, moves: dict[int, int]) -> int:
        if task in (TASK_MOVE, TASK_NONE):
            return moves.get(number, 0)
        if task == TASK_BALANCE:
            return self._rebalance
        if task == TASK_DRAIN and self._drains:
            if len(self._drains) == 1:
                return next(iter(self._drains.values()))
            primary = int(self._core.tables.primary[row])
            return self._drains.get(self._core.captures[primary].id, 0) if primary >= 0 else 0
        return 0

    def _placed(self, placement: Placement, moves: dict[int, int]) -> Placement:
        job = 0
        if placement.why == "move":
            row = self._core.tables.row_of(placement.span)
            job = moves.get(int(self._core.tables.number[row]), 0) if row != NO_ROW else 0
        elif placement.why == "balance":
            job = self._rebalance
        elif placement.why == "drain" and placement.source is not None:
            job = self._drains.get(placement.source, 0)
        return replace(placement, job=job) if job else placement
