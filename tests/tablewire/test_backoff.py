"""Backoff: pauses that double within bounds, and start again after a success."""

from __future__ import annotations

from tablewire.runtime.backoff import Backoff


def test_pauses_double_up_to_the_maximum() -> None:
    """Each pause lies between half and all of its step, and the steps end at max_s."""
    backoff = Backoff(0.1, 1.0)
    for step_s in (0.1, 0.2, 0.4, 0.8, 1.0, 1.0):
        assert step_s / 2 <= backoff.next_s() <= step_s
    assert backoff.failures == 6


def test_a_reset_starts_again() -> None:
    """After a success the next pause is the shortest one."""
    backoff = Backoff(0.1, 1.0)
    for _ in range(50):
        backoff.next_s()
    backoff.reset()
    assert backoff.failures == 0
    assert backoff.next_s() <= 0.1


def test_many_failures_do_not_overflow() -> None:
    """A service may fail for years."""
    backoff = Backoff(0.1, 1.0)
    backoff.failures = 10**9
    assert backoff.next_s() <= 1.0
