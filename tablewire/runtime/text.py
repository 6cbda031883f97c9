"""Words of texts for operators."""

from __future__ import annotations


def plural(count: int, noun: str) -> str:
    """Return `1 table`, `2 tables`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
