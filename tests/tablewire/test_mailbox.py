"""The mailbox: bounded, in order, and no wake-up is lost."""

from __future__ import annotations

import threading
import time

import pytest

from tablewire.runtime.mailbox import Mailbox

TIMEOUT_S = 10.0


def test_items_come_in_order_and_are_bounded() -> None:
    """What does not fit is refused and counted; taking makes room."""
    box: Mailbox[int] = Mailbox(2)
    assert [box.put(number) for number in range(3)] == [True, True, False]
    assert (len(box), box.refused) == (2, 1)
    assert box.take() == [0, 1]
    assert box.take() == []
    assert box.put(3)


def test_a_mailbox_of_nothing_is_refused() -> None:
    """A capacity below one is a mistake."""
    with pytest.raises(ValueError, match="at least one"):
        Mailbox(0)


def test_waiting_ends_by_time() -> None:
    """Without an item and without a wake-up the wait returns False, and a negative time is none."""
    box: Mailbox[int] = Mailbox(1)
    assert not box.wait(0.01)
    assert not box.wait(-1)


def test_a_wake_up_before_the_wait_counts_once() -> None:
    """wake is remembered until the next wait, and used up by it; an item lasts until it is taken."""
    box: Mailbox[int] = Mailbox(1)
    box.wake()
    box.wake()
    assert box.wait(0)
    assert not box.wait(0)
    box.put(1)
    assert box.wait(0)
    assert box.wait(0)
    box.take()
    assert not box.wait(0)


@pytest.mark.parametrize("by_item", [True, False])
def test_a_waiter_is_woken_from_another_thread(by_item: bool) -> None:
    """A put or a wake of another thread ends the wait long before its time."""
    box: Mailbox[int] = Mailbox(1)
    thread = threading.Thread(target=(lambda: box.put(1)) if by_item else box.wake)
    start = time.monotonic()
    thread.start()
    assert box.wait(TIMEOUT_S)
    assert time.monotonic() - start < TIMEOUT_S / 2
    thread.join()


def test_nothing_is_lost_between_many_threads() -> None:
    """What many threads put, one thread takes, each item once, each sender's in order."""
    box: Mailbox[tuple[int, int]] = Mailbox(100_000)
    threads = [threading.Thread(target=lambda s=s: [box.put((s, n)) for n in range(1000)]) for s in range(4)]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    found: list[tuple[int, int]] = []
    deadline = time.monotonic() + TIMEOUT_S
    while len(found) < 4000 and time.monotonic() < deadline:
        box.wait(0.1)
        found += box.take()
    for thread in threads:
        thread.join()
    for sender in range(4):
        assert [number for s, number in found if s == sender] == list(range(1000))
