"""A bounded mailbox for the thread that owns something, with a wake-up that is never lost.

Many threads put and wake, one thread waits and takes. A full mailbox refuses, and the sender decides what that means (a lost
message, an error to a caller), so that nothing is queued without a bound.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Mailbox(Generic[_T]):
    """Holds at most `capacity` items."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a mailbox holds at least one item, not {capacity}")
        self._capacity = capacity
        self._items: deque[_T] = deque()
        self._condition = threading.Condition()
        self._awake = False
        self.refused = 0
        """How many items did not fit since the start."""

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: _T) -> bool:
        """Add the item and wake the owner; False (and counted) if the mailbox is full. Never blocks."""
        with self._condition:
            if len(self._items) >= self._capacity:
                self.refused += 1
                return False
            self._items.append(item)
            self._condition.notify_all()
            return True

    def wake(self) -> None:
        """Make the present or the next `wait` return at once. Never blocks."""
        with self._condition:
            self._awake = True
            self._condition.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Return True as soon as there is an item or `wake` was called since the last wait, False after timeout_s."""
        with self._condition:
            called = self._condition.wait_for(lambda: self._awake or bool(self._items), max(0.0, timeout_s))
            self._awake = False
            return called

    def take(self) -> list[_T]:
        """Return all items in their order, and empty the mailbox. Never blocks."""
        with self._condition:
            items = list(self._items)
            self._items.clear()
            return items
