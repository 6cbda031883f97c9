"""Manual jobs inside the core: what an operator asked for, level-triggered, until it is done or refused with a reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

from tablewire.model.ids import CaptureID, TableID
from tablewire.model.spans import Span
from tablewire.model.states import QueryState

ENDED = (QueryState.DONE, QueryState.REFUSED, QueryState.CANCELLED)


@dataclass(slots=True)
class MoveJob:
    """Bring a table, or one span of it, to a capture. `rows` is filled when the job is first looked at."""

    key: int
    table_id: TableID
    span: Span | None
    target: CaptureID
    state: QueryState = QueryState.PENDING
    reason: str = ""
    cancel_requested: bool = False
    rows: list[int] | None = None
    numbers: list[int] = field(default_factory=list)  # of the rows, to notice that a row is another one now
    attempts: dict[int, int] = field(default_factory=dict)  # prepares that were started, by row

    def end(self, state: QueryState, reason: str = "") -> None:
        self.state, self.reason = state, reason


@dataclass(slots=True)
class DrainJob:
    """Everything away from a capture; stands until it is cancelled or the capture is gone."""

    key: int
    target: CaptureID
    state: QueryState = QueryState.PENDING
    reason: str = ""
    taken_in: bool = False  # a tick after bootstrap has seen it
    left: int = 0  # spans that still touch the capture

    def end(self, state: QueryState, reason: str = "") -> None:
        self.state, self.reason = state, reason


@dataclass(slots=True)
class RebalanceJob:
    """Even the loads out, by the fewest moves; it ends when nothing is left to move, and leaves nothing armed."""

    key: int
    state: QueryState = QueryState.PENDING
    reason: str = ""
    cancel_requested: bool = False
    moved: int = 0

    def end(self, state: QueryState, reason: str = "") -> None:
        self.state, self.reason = state, reason


@dataclass(frozen=True, slots=True)
class PlannedMove:
    """What a dry run would do with one span, and why. source, target: captures by id; weight: the span's."""

    span: Span
    source: CaptureID
    target: CaptureID
    weight: float
    reason: str


@dataclass(frozen=True, slots=True)
class RebalancePlan(Sequence[PlannedMove]):
    """The moves of a dry run, and the load of each capture before and after them."""

    moves: tuple[PlannedMove, ...] = ()
    load_before: Mapping[CaptureID, float] = field(default_factory=dict)
    load_after: Mapping[CaptureID, float] = field(default_factory=dict)

    @overload
    def __getitem__(self, index: int) -> PlannedMove: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[PlannedMove]: ...

    def __getitem__(self, index: int | slice) -> PlannedMove | Sequence[PlannedMove]:
        return self.moves[index]

    def __len__(self) -> int:
        return len(self.moves)
