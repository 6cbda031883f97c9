"""Query: a manual job of the owner (move, rebalance, drain, cancel), as its caller sees it.

The scheduler's tick decides and settles it; any thread may read it, wait for it, or ask for its cancellation.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

from tablewire.model.ids import CaptureID
from tablewire.model.states import QueryKind, QueryState

ENDED = frozenset({QueryState.REFUSED, QueryState.DONE, QueryState.CANCELLED})

_COUNT_BITS = 20
_counter = itertools.count(1)


def new_job_number(owner_revision: int) -> int:
    """Of a job that this process begins as the leader of this term: no other job of the cluster has it. Any thread."""
    return owner_revision << _COUNT_BITS | next(_counter) & (1 << _COUNT_BITS) - 1


def job_id(number: int) -> str:
    """As people and logs see it, `7-12`: the term, and which job of it. Empty for 0, which is no job."""
    return f"{number >> _COUNT_BITS}-{number & (1 << _COUNT_BITS) - 1}" if number else ""


class Query:
    """One job. `state` and `reason` are what the last tick left; `subject` names what it is about, `target` where it leads.

    number: of the job, 0 = none (see `job_id`). asked_by: who asked, set by whoever knows. moves_done, moves_left: how many moves
    were made, and are under way or planned, None = not known.
    """

    def __init__(
        self,
        kind: QueryKind,
        target: CaptureID | None,
        subject: str = "",
        *,
        number: int = 0,
        on_cancel: Callable[[Query], None] | None = None,
    ) -> None:
        self.kind = kind
        self.target = target
        self.subject = subject
        self.number = number
        self.asked_by = ""
        self.moves_done: int | None = None
        self.moves_left: int | None = None
        self._state = QueryState.PENDING
        self._reason = "not looked at yet"
        self._changed = threading.Condition()
        self._on_cancel = on_cancel

    @property
    def state(self) -> QueryState:
        return self._state

    @property
    def reason(self) -> str:
        """Why it is refused, cancelled or still pending; empty when there is nothing to say."""
        return self._reason

    def wait(self, timeout_s: float) -> QueryState:
        """Waits until the job has ended, at most so long; the state then. Never call it on the thread that ticks."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._state not in ENDED:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            return self._state

    def cancel(self) -> None:
        """Asks for an end; the next tick undoes what can be undone. A job past the point of no return goes on to its end."""
        if self._on_cancel is not None and self._state not in ENDED:
            self._on_cancel(self)

    def settle(self, state: QueryState, reason: str) -> None:
        """For the scheduler alone: a job that has ended never changes again."""
        with self._changed:
            if self._state in ENDED or (self._state, self._reason) == (state, reason):
                return
            self._state, self._reason = state, reason
            self._changed.notify_all()

    def __str__(self) -> str:
        what = " ".join(part for part in (str(self.kind), self.subject) if part)
        where = f" -> {self.target}" if self.target is not None else ""
        why = f": {self._reason}" if self._reason else ""
        return f"{what}{where} {self._state}{why}"

    __repr__ = __str__
