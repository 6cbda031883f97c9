"""A queue that is bounded lane by lane, so that one busy sender can only ever push out its own items.

Items leave in the order in which they came, whatever their lane; a full lane loses its oldest item. That is right for messages
that the protocol restates, and for nothing else. Not thread-safe: whoever owns one holds a lock of its own around it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

_T = TypeVar("_T")


@dataclass(slots=True)
class _Lane:
    orders: deque[int] = field(default_factory=deque)
    rows: int = 0


@dataclass(slots=True)
class _Entry(Generic[_T]):
    lane: Hashable
    item: _T
    rows: int


class BoundedFairQueue(Generic[_T]):
    """At most `max_items` items and `max_rows` rows a lane; one item is always held, however many rows it has."""

    def __init__(self, max_items: int, max_rows: int) -> None:
        if max_items < 1 or max_rows < 1:
            raise ValueError("a lane holds at least one item of one row")
        self._max_items, self._max_rows = max_items, max_rows
        self._entries: OrderedDict[int, _Entry[_T]] = OrderedDict()
        self._lanes: dict[Hashable, _Lane] = {}
        self._last = 0
        self._first = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, lane: Hashable, item: _T, rows: int = 0, *, max_items: int | None = None) -> int:
        """Takes the item in; how many older ones of its lane had to go. max_items: a smaller bound for this lane (1 = the
        newest item replaces the one before it)."""
        held = self._lanes.setdefault(lane, _Lane())
        limit = self._max_items if max_items is None else max_items
        dropped = 0
        while held.orders and (len(held.orders) >= limit or held.rows + rows > self._max_rows):
            self._forget(held, held.orders.popleft())
            dropped += 1
        self._last += 1
        self._insert(self._last, _Entry(lane, item, rows))
        held.orders.append(self._last)
        return dropped

    def put_back(self, lane: Hashable, item: _T, rows: int = 0, *, max_items: int | None = None) -> bool:
        """Returns an item that was taken to the front; False (it is lost) when newer ones have filled its lane."""
        held = self._lanes.setdefault(lane, _Lane())
        limit = self._max_items if max_items is None else max_items
        if held.orders and (len(held.orders) >= limit or held.rows + rows > self._max_rows):
            return False
        self._first -= 1
        self._insert(self._first, _Entry(lane, item, rows))
        self._entries.move_to_end(self._first, last=False)
        held.orders.appendleft(self._first)
        return True

    def take(self) -> tuple[Hashable, _T] | None:
        """The oldest item and its lane; None when there is none."""
        if not self._entries:
            return None
        order = next(iter(self._entries))
        entry = self._entries[order]
        held = self._lanes[entry.lane]
        held.orders.popleft()
        self._forget(held, order)
        if not held.orders:
            del self._lanes[entry.lane]
        return entry.lane, entry.item

    def take_all(self) -> list[_T]:
        """All items in their order, the queue empty."""
        items = [entry.item for entry in self._entries.values()]
        self._entries.clear()
        self._lanes.clear()
        return items

    def remove(self, is_gone: Callable[[Hashable], bool]) -> int:
        """Drops all items of the lanes that the caller says are gone; how many."""
        gone = [lane for lane in self._lanes if is_gone(lane)]
        dropped = 0
        for lane in gone:
            for order in self._lanes.pop(lane).orders:
                del self._entries[order]
                dropped += 1
        return dropped

    def _insert(self, order: int, entry: _Entry[_T]) -> None:
        self._entries[order] = entry
        self._lanes[entry.lane].rows += entry.rows

    def _forget(self, held: _Lane, order: int) -> None:
        held.rows -= self._entries.pop(order).rows
