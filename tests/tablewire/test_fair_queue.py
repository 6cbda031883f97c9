"""BoundedFairQueue: order, bounds by lane, and what is pushed out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tablewire.runtime.fair_queue import BoundedFairQueue


def test_items_leave_in_the_order_they_came() -> None:
    """Whatever their lane."""
    lanes: BoundedFairQueue[int] = BoundedFairQueue(8, 100)
    for item in range(6):
        lanes.put("even" if item % 2 == 0 else "odd", item)
    assert lanes.take() == ("even", 0)
    assert lanes.take_all() == [1, 2, 3, 4, 5]
    assert lanes.take() is None
    assert len(lanes) == 0


def test_full_lane_loses_its_own_oldest() -> None:
    """A busy lane never pushes out the items of another."""
    lanes: BoundedFairQueue[str] = BoundedFairQueue(2, 100)
    lanes.put("quiet", "q1")
    assert [lanes.put("busy", f"b{number}") for number in range(4)] == [0, 0, 1, 1]
    assert lanes.take_all() == ["q1", "b2", "b3"]


def test_lane_is_bounded_by_rows_but_holds_one_item() -> None:
    """An item of any size fits alone; the next one pushes out as many as it must."""
    lanes: BoundedFairQueue[str] = BoundedFairQueue(8, 10)
    lanes.put("a", "huge", rows=50)
    assert lanes.put("a", "small", rows=4) == 1
    assert lanes.put("a", "next", rows=6) == 0
    assert lanes.put("a", "last", rows=5) == 2
    assert lanes.take_all() == ["last"]


def test_newest_replaces_where_one_is_kept() -> None:
    """max_items=1 moves the newest to the end of the queue."""
    lanes: BoundedFairQueue[str] = BoundedFairQueue(8, 10)
    lanes.put("beat", "beat 1", max_items=1)
    lanes.put("other", "other")
    assert lanes.put("beat", "beat 2", max_items=1) == 1
    assert lanes.take_all() == ["other", "beat 2"]


def test_item_put_back_is_first_again_unless_newer_ones_fill_its_lane() -> None:
    """What did not fit into a turn leads the next one."""
    lanes: BoundedFairQueue[str] = BoundedFairQueue(2, 10)
    lanes.put("a", "a2")
    assert lanes.put_back("a", "a1")
    assert not lanes.put_back("a", "a0")
    assert lanes.put_back("b", "b1")
    assert lanes.take_all() == ["b1", "a1", "a2"]


def test_removed_lanes_are_gone() -> None:
    """remove drops whole lanes and says how many items went."""
    lanes: BoundedFairQueue[str] = BoundedFairQueue(4, 10)
    lanes.put("a", "a1")
    lanes.put("b", "b1")
    lanes.put("a", "a2")
    assert lanes.remove(lambda lane: lane == "a") == 2
    assert lanes.take_all() == ["b1"]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6), st.booleans()), max_size=60))
def test_bounds_hold_for_any_use(steps: list[tuple[int, int, bool]]) -> None:
    """No lane ever holds more than its bounds, and items of one lane stay in order."""
    lanes: BoundedFairQueue[tuple[int, int, int]] = BoundedFairQueue(3, 10)
    taken: list[tuple[int, int, int]] = []
    for serial, (lane, rows, takes) in enumerate(steps):
        if takes and (one := lanes.take()) is not None:
            taken.append(one[1])
        else:
            lanes.put(lane, (lane, serial, rows), rows)
    rest = lanes.take_all()
    for lane in range(4):
        held = [item for item in rest if item[0] == lane]
        assert len(held) <= 3
        assert sum(item[2] for item in held) <= 10
        serials = [item[1] for item in [*taken, *rest] if item[0] == lane]
        assert serials == sorted(serials)
