"""TableFilter: the patterns of a changefeed, by which it selects its tables. Pure.

A pattern is `schema.table` with * and ? in both parts; `!pattern` excludes and takes precedence. As in
psql, a part or a piece of it in double quotes is taken literally: `"my.schema".*`, `public."a*b"`, and `""`
is one quote. Without quotes the first dot separates the parts. Case matters with and without quotes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tablewire.errors import OperatingError

_WILDCARDS = {"*": "[^\0]*", "?": "[^\0]"}


class TableFilter:
    """The compiled patterns of a changefeed. Raises OperatingError for a malformed pattern."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self.patterns = tuple(patterns)
        self._included: list[re.Pattern[str]] = []
        self._excluded: list[re.Pattern[str]] = []
        for pattern in self.patterns:
            text = pattern.strip()
            target = self._excluded if text.startswith("!") else self._included
            target.append(_compile(text.removeprefix("!").lstrip(), pattern))
        if not self._included:
            raise OperatingError("the table filter includes nothing: give at least one pattern such as 'public.*'")

    def matches(self, schema: str, name: str) -> bool:
        return self.includes(schema, name) and not self.excludes(schema, name)

    def includes(self, schema: str, name: str) -> bool:
        """Return whether a pattern without `!` matches."""
        return any(pattern.match(f"{schema}\0{name}") for pattern in self._included)

    def excludes(self, schema: str, name: str) -> bool:
        """Return whether a pattern with `!` matches."""
        return any(pattern.match(f"{schema}\0{name}") for pattern in self._excluded)


def split_patterns(text: str) -> list[str]:
    """Return the patterns of a list that is separated by commas outside of double quotes."""
    found, start, is_quoted = [], 0, False
    for at, char in enumerate(text):
        is_quoted ^= char == '"'
        if char == "," and not is_quoted:
            found.append(text[start:at])
            start = at + 1
    return [pattern.strip() for pattern in (*found, text[start:]) if pattern.strip()]


def _compile(text: str, pattern: str) -> re.Pattern[str]:
    parts = [[""], [""]]
    part = parts[0]
    for char, is_quoted in _characters(text, pattern):
        if char == "." and not is_quoted and part is parts[0]:
            part = parts[1]
        else:
            part.append(re.escape(char) if is_quoted else _WILDCARDS.get(char, re.escape(char)))
    schema, name = ("".join(pieces) for pieces in parts)
    if not schema or not name:
        raise OperatingError(
            f"table pattern {pattern!r}: expected schema.table, with * and ? in either part, and names with dots in double quotes"
        )
    return re.compile(f"{schema}\0{name}\\Z", re.DOTALL)


def _characters(text: str, pattern: str) -> Iterator[tuple[str, bool]]:
    """Yield each character of a pattern without its quotes, and whether it is quoted."""
    at, is_quoted = 0, False
    while at < len(text):
        char = text[at]
        at += 1
        if char != '"':
            yield char, is_quoted
        elif is_quoted and text[at : at + 1] == '"':
            yield char, True
            at += 1
        else:
            is_quoted = not is_quoted
    if is_quoted:
        raise OperatingError(f"table pattern {pattern!r}: a double quote is not closed")
