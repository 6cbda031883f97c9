"""An evicted capture whose executor is not fenced counts as alive until its own lease has stopped it."""

from __future__ import annotations

from owner.evictions import Evictions
from tablewire.types import CaptureInfo


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
