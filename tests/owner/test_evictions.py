"""An evicted capture whose executor is not fenced counts as alive until its own lease has stopped it."""

from __future__ import annotations

import time

from owner.evictions import Evictions
from owner.scheduler import SchedulerConfig
from tablewire.types import CaptureInfo
from tests.owner.world import World


def test_an_unfenced_capture_is_held_until_its_lease_is_over() -> None:
    """It stays beside what etcd knows, and goes by the clock."""
    evictions, others = Evictions(), {"b": CaptureInfo("b", "b:1")}
    evictions.hold(CaptureInfo("a", "a:1"), until_s=10.0)
    assert set(evictions.with_held(others, 9.9)) == {"a", "b"}
    assert evictions.with_held(others, 10.0) == others


def test_nothing_is_copied_without_evictions() -> None:
    """The usual case hands on what it was given."""
    others = {"b": CaptureInfo("b", "b:1")}
    assert Evictions().with_held(others, 0.0) is others


def test_an_unfenced_capture_is_held_before_its_key_is_gone() -> None:
    """The tick's thread may see the key's end before the thread that evicts does: it still counts as alive."""
    evictions, seen = Evictions(), []
    evictions.evict(CaptureInfo("a", "a:1"), lambda: seen.append(set(evictions.with_held({}, time.monotonic()))), 10.0)
    assert seen == [{"a"}]
    assert set(evictions.with_held({}, time.monotonic())) == {"a"}


def test_a_fenced_capture_is_not_held() -> None:
    """Its sink refuses it: its death counts at once."""
    evictions = Evictions()
    evictions.evict(CaptureInfo("a", "a:1"), lambda: None, 0.0)
    assert evictions.with_held({}, 0.0) == {}


def test_who_never_spoke_may_be_unfenced() -> None:
    """Nobody knows whether the sink of a capture that has been silent since before the term would refuse it."""
    world = World(captures=["a", "mute"], tables=[1])
    world.config = SchedulerConfig(bootstrap_timeout_ms=500)
    world.settle()
    assert world.snapshot.unfenced == frozenset()
    world.paused.add("mute")
    world.elect("owner2")
    world.until(world.scheduler.is_initialized)
    assert world.snapshot.unfenced == {"mute"}
