"""BoundedFairQueue: order, bounds by key, and what is pushed out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tablewire.runtime.fair_queue import BoundedFairQueue


def test_items_leave_in_the_order_they_came() -> None:
    """The key of an item makes no difference."""
    queue: BoundedFairQueue[int] = BoundedFairQueue(8, 100)
    for item in range(6):
        queue.put("even" if item % 2 == 0 else "odd", item)
    (oldest, *_) = queue.entries()
    assert (oldest.key, oldest.item) == ("even", 0)
    queue.remove([oldest])
    assert queue.take_all() == [1, 2, 3, 4, 5]
    assert queue.entries() == []
    assert len(queue) == 0


def test_full_lane_loses_its_own_oldest() -> None:
    """A busy key never pushes out the items of another."""
    queue: BoundedFairQueue[str] = BoundedFairQueue(2, 100)
    queue.put("quiet", "q1")
    assert [queue.put("busy", f"b{number}") for number in range(4)] == [0, 0, 1, 1]
    assert queue.take_all() == ["q1", "b2", "b3"]


def test_lane_is_bounded_by_rows_but_holds_one_item() -> None:
    """An item of any size fits alone; the next one pushes out as many as it must."""
    queue: BoundedFairQueue[str] = BoundedFairQueue(8, 10)
    queue.put("a", "huge", rows=50)
    assert queue.put("a", "small", rows=4) == 1
    assert queue.put("a", "next", rows=6) == 0
    assert queue.put("a", "last", rows=5) == 2
    assert queue.take_all() == ["last"]


def test_newest_replaces_where_one_is_kept() -> None:
    """max_items=1 moves the newest to the end of the queue."""
    queue: BoundedFairQueue[str] = BoundedFairQueue(8, 10)
    queue.put("beat", "beat 1", max_items=1)
    queue.put("other", "other")
    assert queue.put("beat", "beat 2", max_items=1) == 1
    assert queue.take_all() == ["other", "beat 2"]


def test_entry_that_is_not_removed_keeps_its_place_unless_newer_ones_fill_its_lane() -> None:
    """What did not fit into a batch leads the next one."""
    queue: BoundedFairQueue[str] = BoundedFairQueue(2, 10)
    queue.put("a", "a1")
    queue.put("a", "a2")
    read = queue.entries()
    queue.put("b", "b1")
    assert [entry.item for entry in queue.entries()] == ["a1", "a2", "b1"]
    assert queue.put("a", "a3") == 1
    queue.remove(read[:1])
    assert [entry.item for entry in queue.entries()] == ["a2", "b1", "a3"]
    queue.remove(read)
    assert queue.take_all() == ["b1", "a3"]


def test_removed_lanes_are_gone() -> None:
    """remove_keys drops whole keys and returns how many items were in them."""
    queue: BoundedFairQueue[str] = BoundedFairQueue(4, 10)
    queue.put("a", "a1")
    queue.put("b", "b1")
    queue.put("a", "a2")
    assert queue.remove_keys(lambda key: key == "a") == 2
    assert queue.take_all() == ["b1"]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6), st.booleans()), max_size=60))
def test_bounds_hold_for_any_use(steps: list[tuple[int, int, bool]]) -> None:
    """No key ever holds more than its bounds, and items of one key stay in order."""
    queue: BoundedFairQueue[tuple[int, int, int]] = BoundedFairQueue(3, 10)
    taken: list[tuple[int, int, int]] = []
    for serial, (key, rows, takes) in enumerate(steps):
        if takes and (entries := queue.entries()):
            queue.remove(entries[:1])
            taken.append(entries[0].item)
        else:
            queue.put(key, (key, serial, rows), rows)
    rest = queue.take_all()
    for key in range(4):
        held = [item for item in rest if item[0] == key]
        assert len(held) <= 3
        assert sum(item[2] for item in held) <= 10
        serials = [item[1] for item in [*taken, *rest] if item[0] == key]
        assert serials == sorted(serials)
