"""One etcd lease, kept alive, and the moment until which this process may rely on it.

The deadline is computed so that it can only be too early: it counts from the time at which the last successful keep-alive was
**sent** (etcd renewed the lease at that moment or later), less a margin for stopping what must stop. It is a time of
`lease_clock`, which also runs while the machine is suspended: a process that was paused (SIGSTOP, a frozen VM) and wakes up
late sees at its next look at the clock that the deadline has passed, before anything else had a chance to run. So: **look
first, then act** (`is_valid` immediately before every effect).

A lease that was lost once is never revived, even when etcd still has it and a keep-alive comes through after all: those
who saw the loss have begun to act on it. Whoever wants to go on takes a new lease.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import structlog

from tablewire.errors import ClosedError, EtcdError
from tablewire.etcd.session import EtcdSession, LeaseLostError
from tablewire.runtime.backoff import Backoff

KEEP_ALIVES_A_TERM = 3
"""How many keep-alives are due between two deadlines: two in a row may fail."""
MARGIN_SHARE = 0.2
MARGIN_MIN_S = 0.3
MARGIN_MAX_S = 2.0
RETRY_MIN_S = 0.05
RETRY_MAX_S = 0.5

_log = structlog.get_logger("tablewire.lease")

_CLOCK_ID = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def lease_clock() -> float:
    """Seconds of CLOCK_BOOTTIME (Linux: monotonic, and runs on while the machine is suspended, which CLOCK_MONOTONIC and so
    `time.monotonic` do not), or of CLOCK_MONOTONIC where there is none. Compare deadlines of leases with this alone."""
    return time.clock_gettime(_CLOCK_ID)


def default_margin_s(ttl_s: float) -> float:
    """How long before the lease can expire at etcd its holder must have stopped: a fifth of the TTL, within bounds."""
    return min(MARGIN_MAX_S, max(MARGIN_MIN_S, ttl_s * MARGIN_SHARE))


class LeaseKeeper:
    """Grants a lease when made (EtcdError when etcd does not answer), and keeps it alive while `run` runs.

    ttl_s is rounded up to whole seconds, as etcd counts. on_lost(reason) is called once, on the thread that noticed, not later
    than margin_s before the lease can have expired; never after `close`. All methods from any thread.
    """

    def __init__(
        self,
        session: EtcdSession,
        *,
        ttl_s: float,
        on_lost: Callable[[str], None],
        margin_s: float | None = None,
        clock: Callable[[], float] = lease_clock,
    ) -> None:
        self._session = session
        self._clock = clock
        self._on_lost = on_lost
        self._margin_s = default_margin_s(ttl_s) if margin_s is None else margin_s
        if not 0 <= self._margin_s < ttl_s:
            raise ValueError(f"a lease of {ttl_s:g} s cannot have a margin of {self._margin_s:g} s")
        self._condition = threading.Condition()
        self._lost = ""
        self._closed = False
        sent_at = clock()
        self.lease_id, granted_s = session.grant(math.ceil(ttl_s))
        self._deadline = sent_at + granted_s - self._margin_s
        self._interval_s = (granted_s - self._margin_s) / KEEP_ALIVES_A_TERM
        self._due_at = sent_at + self._interval_s

    @property
    def lost_reason(self) -> str:
        """Why the lease is lost; empty while it is not."""
        return self._lost

    def deadline(self) -> float:
        """The time of `lease_clock` until which the lease may be relied on; the past once it is lost."""
        with self._condition:
            return -math.inf if self._lost or self._closed else self._deadline

    def is_valid(self) -> bool:
        """Whether the lease may be relied on at this moment."""
        return self._clock() < self.deadline()

    def lose(self, reason: str) -> None:
        """Somebody knows better: the lease or its key is gone."""
        with self._condition:
            if self._lost or self._closed:
                return
            self._lost = reason
            self._condition.notify_all()
        self._on_lost(reason)

    def close(self) -> None:
        """Stops keeping it alive and relying on it; etcd lets it expire, or the caller revokes it. Idempotent."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def run(self) -> None:
        """Keeps the lease alive; returns once it is lost or closed."""
        backoff = Backoff(RETRY_MIN_S, RETRY_MAX_S)
        while self._wait_until_due():
            sent_at = self._clock()
            timeout_s = min(self._interval_s, self.deadline() - sent_at)
            if timeout_s <= 0:
                self.lose("the lease was not renewed in time")
                return
            try:
                ttl_s = self._session.keep_alive_once(self.lease_id, timeout_s=timeout_s)
            except LeaseLostError as error:
                self.lose(str(error))
                return
            except ClosedError as error:
                self.lose(str(error))
                return
            except EtcdError as error:
                if backoff.failures == 0:
                    _log.warning("keep_alive_failed", lease=f"{self.lease_id:016x}", reason=str(error))
                self._due_at = self._clock() + backoff.next_s()
            else:
                backoff.reset()
                self._renewed(sent_at, ttl_s)

    def _renewed(self, sent_at: float, ttl_s: int) -> None:
        """An answer that was read after the deadline comes too late: others may have seen the loss."""
        with self._condition:
            if self._clock() < self._deadline:
                self._deadline = sent_at + ttl_s - self._margin_s
                self._due_at = sent_at + self._interval_s
            else:
                self._due_at = self._deadline  # the next look finds it lost

    def _wait_until_due(self) -> bool:
        """False when there is nothing to keep any more."""
        with self._condition:
            while not self._lost and not self._closed:
                left_s = min(self._due_at, self._deadline) - self._clock()
                if left_s <= 0:
                    return True
                self._condition.wait(left_s)
            return False
