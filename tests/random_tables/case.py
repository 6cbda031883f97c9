"""What a generated case is: a list of steps, each of which can be left out, so that a failing case can be made smaller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from tablewire.errors import TablewireError


class Act(StrEnum):
    """What a step does.

    BOTH, SOURCE, SINK: run statements there. OPEN, FINISH: a transaction on a second connection to the
    source, which stays open for some steps. SINK_THEN_SOURCE: change the sink, then touch the table at
    the source (the last statement), so that the change at the sink is noticed. CHECK: source and sink
    are compared at a position. HOLD: a barrier at the current position, which LIFT compares and removes.
    CRASH: an executor is cut off inside. ABANDON: one that continues to write as long as it can.
    LOSE_SLOT: while nothing runs, the slot is dropped, and its statements run at the source.
    CUT: connections are terminated. PAUSE: all executors end,
    and start again before the next step that is not a statement. DRIVE: time passes, number is milliseconds.
    """

    BOTH = "both"
    SOURCE = "source"
    SINK = "sink"
    SINK_THEN_SOURCE = "sink, then source"
    OPEN = "open"
    FINISH = "finish"
    START = "start"
    CHECK = "check"
    HOLD = "hold"
    LIFT = "lift"
    RESTART = "restart"
    CRASH = "crash"
    ABANDON = "abandon"
    PAUSE = "pause"
    MOVE = "move"
    CUT = "cut"
    LOSE_SLOT = "lose slot"
    DRIVE = "drive"


SQL_ACTS = (Act.BOTH, Act.SOURCE, Act.SINK, Act.SINK_THEN_SOURCE, Act.OPEN, Act.LOSE_SLOT)


@dataclass(frozen=True, slots=True)
class Step:
    """statements: of SQL_ACTS. alone: not inside a transaction. number: which executor, table or time. name: a table."""

    act: Act
    statements: tuple[str, ...] = ()
    alone: bool = False
    number: int = 0
    name: str = ""

    def __str__(self) -> str:
        if self.act not in SQL_ACTS:
            return f"{self.act} {self.number or ''}".strip()
        inner = "; ".join(self.statements)
        return f"{self.act}: {inner}" if self.alone or len(self.statements) == 1 else f"{self.act}: BEGIN; {inner}; COMMIT"


@dataclass(frozen=True, slots=True)
class Case:
    """bulk_min: from how many changes on the sink is written in bulk. expects_errors: a step may leave a table with an error."""

    seed: int
    steps: tuple[Step, ...]
    options: Mapping[str, str] = field(default_factory=dict)
    initial_snapshot: bool = True
    bulk_min: int = 48


class Violation(TablewireError):
    """The invariant does not hold. kind: a word that stays the same while the case is made smaller."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


@dataclass(slots=True)
class Result:
    """What became of a case. tables: the end of each table, by name: equal, error or pending. errors: their texts.

    kept: the steps without the statements that failed.
    """

    seed: int
    tables: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    violation: str = ""
    kind: str = ""
    seconds: float = 0.0
    ran: int = 0
    refused: int = 0
    trace: list[str] = field(default_factory=list)
    kept: tuple[Step, ...] = ()
