"""What an operator does about the error of a table, as the error text and docs/postgres.md say."""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.random_tables.oracle import Connection

Name = tuple[str, str]


def _quoted(name: Name) -> str:
    return f'"{name[0]}"."{name[1]}"'


def _copy_again(source: Connection, sink: Connection, name: Name, match: re.Match[str]) -> None:
    """Remove the table and its position at the sink."""
    sink.execute(f"DROP TABLE IF EXISTS {_quoted(name)} CASCADE".encode())
    sink.execute("DELETE FROM tablewire.positions WHERE table_name = %s", (".".join(name),))


def _empty(source: Connection, sink: Connection, name: Name, match: re.Match[str]) -> None:
    sink.execute(f"TRUNCATE {_quoted(name)} CASCADE".encode())


def _full_identity(source: Connection, sink: Connection, name: Name, match: re.Match[str]) -> None:
    source.execute(f"ALTER TABLE {_quoted(name)} REPLICA IDENTITY FULL".encode())


def _forget_position(source: Connection, sink: Connection, name: Name, match: re.Match[str]) -> None:
    sink.execute("DELETE FROM tablewire.positions WHERE table_name = %s", (".".join(name),))


WAYS_OUT: tuple[tuple[str, Callable[[Connection, Connection, Name, re.Match[str]], None]], ...] = (
    (r"holds rows already: empty it", _empty),
    (r"REPLICA IDENTITY (DEFAULT|USING INDEX|NOTHING|FULL)", _full_identity),
    (r"has no primary key", _full_identity),
    (r"remove its row in tablewire.positions", _forget_position),
    (r"is not in publication", _full_identity),
)
"""The first expression that an error matches says what to do; other errors are counted only."""


def follow(source: Connection, sink: Connection, name: Name, error: str) -> bool:
    """Do what the error says; return False if it names no way out that is known here."""
    for expression, act in WAYS_OUT:
        if match := re.search(expression, error):
            act(source, sink, name, match)
            return True
    return False
