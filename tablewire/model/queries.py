"""Query: a read-only handle on a manual job of the owner."""

from __future__ import annotations

import threading
from collections.abc import Callable

from tablewire.model.ids import CaptureID
from tablewire.model.jobs import ENDED, JobView
from tablewire.model.states import QueryKind, QueryState


class Query:
    """A handle on one job. Any thread may read it, wait for the job, or ask for its cancellation.

    Invariant: `job` is an immutable view. The scheduler alone replaces it, at the end of a tick or
    when it closes, and never after the job has ended.
    """

    def __init__(self, job: JobView, request_cancel: Callable[[int], None]) -> None:
        """request_cancel: called with the id of the job; returns at once."""
        self._job = job
        self._request_cancel = request_cancel
        self._cancel_requested = False
        self._changed = threading.Condition()

    @property
    def job(self) -> JobView:
        return self._job

    @property
    def kind(self) -> QueryKind:
        return self._job.kind

    @property
    def target(self) -> CaptureID | None:
        return self._job.target

    @property
    def state(self) -> QueryState:
        return self._job.state

    @property
    def reason(self) -> str:
        """Why the job is pending, refused or cancelled; may be empty."""
        return self._job.reason

    def wait(self, timeout_s: float) -> QueryState:
        """Wait until the job has ended, at most timeout_s, and return its state. Never call this on
        the thread that ticks."""
        with self._changed:
            self._changed.wait_for(lambda: self.state in ENDED, timeout_s)
            return self.state

    def cancel(self) -> None:
        """Ask for cancellation: the next tick undoes what can be undone. A move whose source has been
        asked to stop continues."""
        if self.state not in ENDED and not self._cancel_requested:
            self._cancel_requested = True
            self._request_cancel(self._job.id)

    def update(self, job: JobView) -> None:
        """Replace the view, unless the job has ended. For the scheduler only."""
        with self._changed:
            if self.state not in ENDED:
                self._job = job
                self._changed.notify_all()

    def __str__(self) -> str:
        what = " ".join(part for part in (str(self.kind), self._job.subject) if part)
        where = f" -> {self.target}" if self.target is not None else ""
        why = f": {self.reason}" if self.reason else ""
        return f"{what}{where} {self.state}{why}"

    __repr__ = __str__
