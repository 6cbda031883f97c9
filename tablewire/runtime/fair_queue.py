"""A queue with a bound for each key, so that a busy one pushes out only its own items.

Items leave in the order in which they came, whatever their key. A key at its bound loses its oldest item, which is right only for
messages that the protocol restates.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Generic, TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Entry(Generic[_T]):
    """A queued item. ticket: its place in the order of arrival."""

    ticket: int
    key: Hashable
    item: _T
    rows: int


@dataclass(slots=True)
class _KeyItems(Generic[_T]):
    entries: dict[int, Entry[_T]] = field(default_factory=dict)  # by ticket, oldest first
    rows: int = 0

    def remove(self, ticket: int) -> bool:
        entry = self.entries.pop(ticket, None)
        self.rows -= entry.rows if entry is not None else 0
        return entry is not None


class BoundedFairQueue(Generic[_T]):
    """Holds at most `max_items` items and `max_rows` rows for each key; one item is kept however many rows it has.

    Not thread-safe: the owner of the queue holds a lock of its own around every call.
    """

    def __init__(self, max_items: int, max_rows: int) -> None:
        if max_items < 1 or max_rows < 1:
            raise ValueError("the bound of a key is at least one item of one row")
        self._max_items, self._max_rows = max_items, max_rows
        self._by_key: dict[Hashable, _KeyItems[_T]] = {}
        self._tickets = 0

    def __len__(self) -> int:
        return sum(len(key.entries) for key in self._by_key.values())

    def put(self, key: Hashable, item: _T, rows: int = 0, *, max_items: int | None = None) -> int:
        """Add an item and return how many older ones of its key were dropped for it.

        max_items: a smaller bound for this key (1: the newest item replaces the one before it).
        """
        held = self._by_key.setdefault(key, _KeyItems())
        limit = self._max_items if max_items is None else max_items
        dropped = 0
        while held.entries and (len(held.entries) >= limit or held.rows + rows > self._max_rows):
            dropped += held.remove(next(iter(held.entries)))
        self._tickets += 1
        held.entries[self._tickets] = Entry(self._tickets, key, item, rows)
        held.rows += rows
        return dropped

    def entries(self) -> list[Entry[_T]]:
        """Return everything that is queued, oldest first. `remove` takes out what the caller has dealt with."""
        return sorted((entry for key in self._by_key.values() for entry in key.entries.values()), key=attrgetter("ticket"))

    def remove(self, entries: Iterable[Entry[_T]]) -> None:
        """Remove these entries; one that was dropped since is ignored."""
        for entry in entries:
            held = self._by_key.get(entry.key)
            if held is not None and held.remove(entry.ticket) and not held.entries:
                del self._by_key[entry.key]

    def take_all(self) -> list[_T]:
        """Return all items, oldest first, and empty the queue."""
        items = [entry.item for entry in self.entries()]
        self._by_key.clear()
        return items

    def remove_keys(self, is_gone: Callable[[Hashable], bool]) -> int:
        """Drop the keys for which `is_gone` is true and return how many items were in them."""
        gone = [key for key in self._by_key if is_gone(key)]
        return sum(len(self._by_key.pop(key).entries) for key in gone)
