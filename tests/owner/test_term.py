"""How often a term ticks: often while something moves or was asked for, rarely otherwise."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from owner.core.scheduler_config import SchedulerConfig
from owner.leadership.election import Leadership
from owner.leadership.term import Term
from owner.owner_config import OwnerConfig, OwnerTickSection, SchedulerSection


def new_term(**scheduler: int) -> Term:
    """Return a term without changefeeds, on which nothing was started."""
    config = OwnerConfig(
        tick=OwnerTickSection(interval_ms=100, idle_interval_ms=1_000), scheduler=SchedulerSection(**{**SCHEDULER, **scheduler})
    )
    unused: Any = SimpleNamespace(guarded_write=None, guard=None)
    return Term(
        Leadership(7, 0.0),
        owner_id="owner",
        config=config,
        session=unused,
        election=unused,
        hub=unused,
        changefeeds=unused,
        counters=unused,
        observe_tick=lambda _seconds: None,
        previous_workers={},
    )


SCHEDULER = {"heartbeat_interval_ms": 50, "capture_silent_ms": SchedulerConfig().capture_silent_ms}


def test_a_request_ends_the_idle_pace() -> None:
    """A processor that stops, a drain or a new record wakes the term: the rounds after that one are not a second apart."""
    term, now = new_term(), time.monotonic()
    assert term._next_interval_s(now) == 0.1, "a term starts at the short interval"
    assert term._next_interval_s(now + 5.0) == 1.0
    term.wake()
    assert [term._next_interval_s(now + later) for later in (0.0, 0.3, 0.9)] == [0.1, 0.1, 0.1]
    assert term._next_interval_s(now + 5.0) == 1.0


def test_no_pace_is_slower_than_a_third_of_the_silence() -> None:
    """With capture_silent_ms at 100 both intervals leave time for three heartbeats."""
    term, now = new_term(capture_silent_ms=100), time.monotonic()
    assert term._next_interval_s(now) == pytest.approx(0.1 / 3)
    assert term._next_interval_s(now + 5.0) == pytest.approx(0.1 / 3)
