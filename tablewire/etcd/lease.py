"""One etcd lease that is kept alive, and the deadline until which its holder may rely on it.

The deadline can only be too early: it counts from when the last successful keep-alive was **sent**
(etcd renewed the lease then or later), less a margin for stopping what must stop. It is a time of
`lease_clock`, which also runs while the machine is suspended: a process that was paused (SIGSTOP, a
frozen VM) finds the deadline passed at its first look at the clock. Therefore check `is_valid`
immediately before every effect.

A lease that was lost is never revived, even if etcd still has it and a later keep-alive succeeds:
others have already acted on the loss. The holder must take a new lease.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import structlog

from tablewire.errors import ClosedError, EtcdError
from tablewire.etcd.session import EtcdSession
from tablewire.etcd.values import LeaseLostError
from tablewire.runtime.backoff import Backoff
from tablewire.runtime.sections import default_margin_s

KEEP_ALIVES_A_TERM = 3
"""How many keep-alives are due between two deadlines: two in a row may fail."""
RETRY_MIN_S = 0.05
RETRY_MAX_S = 0.5

_log = structlog.get_logger("tablewire.lease")

_CLOCK_ID = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def lease_clock() -> float:
    """Return the seconds that deadlines of leases are compared with.

    On Linux this is CLOCK_BOOTTIME, which unlike CLOCK_MONOTONIC (and `time.monotonic`) runs while
    the machine is suspended.
    """
    return time.clock_gettime(_CLOCK_ID)


class LeaseKeeper:
    """A lease, granted when it is made (or EtcdError), kept alive while `run` runs. Any thread.

    ttl_s is rounded up to whole seconds. on_lost(reason) is called once, at least margin_s before
    the lease can expire, on the thread that noticed the loss; never after `close`.
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
        self.lost_reason = ""
        """Why the lease is lost; empty while it is not."""
        self._condition = threading.Condition()
        self._closed = False
        sent_at = clock()
        self.lease_id, granted_s = session.grant(math.ceil(ttl_s))
        self._deadline = sent_at + granted_s - self._margin_s
        self._interval_s = (granted_s - self._margin_s) / KEEP_ALIVES_A_TERM
        self._due_at = sent_at + self._interval_s

    def deadline(self) -> float:
        """Return until when the lease is valid, by `lease_clock`; -inf once it is lost or closed."""
        with self._condition:
            return -math.inf if self.lost_reason or self._closed else self._deadline

    def is_valid(self) -> bool:
        """Return whether the lease may be relied on now."""
        return self._clock() < self.deadline()

    def lose(self, reason: str) -> None:
        """Treat the lease as lost: the caller knows that it or its key is gone."""
        with self._condition:
            if self.lost_reason or self._closed:
                return
            self.lost_reason = reason
            self._condition.notify_all()
        self._on_lost(reason)

    def close(self) -> None:
        """Stop keeping the lease alive; the caller may revoke it. Idempotent."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def run(self) -> None:
        """Keep the lease alive; return when it is lost or closed."""
        backoff = Backoff(RETRY_MIN_S, RETRY_MAX_S)
        while self._wait_until_due():
            sent_at = self._clock()
            timeout_s = min(self._interval_s, self.deadline() - sent_at)
            if timeout_s <= 0:
                self.lose("the lease was not renewed in time")
                return
            try:
                ttl_s = self._session.keep_alive_once(self.lease_id, timeout_s=timeout_s)
            except (LeaseLostError, ClosedError) as error:
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
        """Move the deadline, unless it has already passed: others may have seen the loss."""
        with self._condition:
            if self._clock() < self._deadline:
                self._deadline = sent_at + ttl_s - self._margin_s
                self._due_at = sent_at + self._interval_s
            else:
                self._due_at = self._deadline  # the next check finds it lost

    def _wait_until_due(self) -> bool:
        """Wait until the next keep-alive is due; return False if the lease is lost or closed."""
        with self._condition:
            while not self.lost_reason and not self._closed:
                remaining_s = min(self._due_at, self._deadline) - self._clock()
                if remaining_s <= 0:
                    return True
                self._condition.wait(remaining_s)
            return False
