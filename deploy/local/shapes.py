"""The twelve tables of the workload: how rows are made from a seeded random generator and a number
that is never reused.

Together they have: bigint, int, text, uuid, composite and no keys; text that needs quoting; numeric
with NaN and with many digits; jsonb, json, bytea, timestamptz and related types; arrays that
contain NULLs; NULLs everywhere; values large enough to be stored out of line (TOAST) that updates
do not touch; updates that change the key; and a table without a primary key.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from ipaddress import IPv4Address
from random import Random
from types import MappingProxyType
from typing import Any, TypeAlias
from uuid import UUID

from psycopg.types.json import Json, Jsonb

Row = dict[str, Any]
Make: TypeAlias = Callable[[Random], Any]
MakeKey: TypeAlias = Callable[[Random, int], Any]

_WORDS = (
    *("alpha", "b'eta", 'ga"mma', "del\tta", "eps\\ilon", "ze\nta", "éta", "θ", "日本語", "🐘"),
    *("", " ", "\\N", "NULL", "{}", "%s"),
)
_EPOCH = datetime(2024, 2, 29, 23, 59, 59, 999_999, tzinfo=UTC)
_NULL_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Shape:
    """A table: its columns as SQL, the columns that identify a row, and functions that make rows
    and updates.

    row(rng, number): a new row. update(rng, number): the columns that an update sets; these may
    include key columns. extra_sql: statements after CREATE TABLE, with {} for the name of the
    table.
    """

    name: str
    columns_sql: str
    key: tuple[str, ...]
    row: Callable[[Random, int], Row]
    update: Callable[[Random, int], Row]
    extra_sql: tuple[str, ...] = ()


def _text(rng: Random, words: int = 4) -> str:
    return " ".join(rng.choices(_WORDS, k=rng.randint(0, words)))


def _big_text(rng: Random) -> str:
    """Return 12 to 40 kB that do not compress, so that they are stored out of line."""
    return base64.b64encode(rng.randbytes(rng.randint(9_000, 30_000))).decode("ascii")


def _timestamp(rng: Random) -> datetime:
    return _EPOCH + timedelta(microseconds=rng.randrange(10**15))


def _decimal(rng: Random, digits: int, scale: int) -> Decimal:
    return Decimal(rng.randint(-(10**digits), 10**digits)).scaleb(-scale)


def _numeric(rng: Random) -> Decimal:
    digits = rng.choice((2, 10, 40))
    return Decimal("NaN") if rng.random() < 0.03 else _decimal(rng, digits, rng.randint(0, digits // 2))


def _tree(rng: Random) -> Any:
    return {"k": _text(rng, 2), "n": rng.randint(-5, 5), "x": [None, True, 1.5, _text(rng, 1)], "d": {"è": []}}


def _array(make: Make, most: int) -> Make:
    return lambda rng: [_or_null(rng, make) for _ in range(rng.randint(0, most))]


def _or_null(rng: Random, make: Make) -> Any:
    return None if rng.random() < _NULL_SHARE else make(rng)


_MAKE: Mapping[str, Make] = {
    "boolean": lambda rng: rng.random() < 0.5,
    "bytea": lambda rng: rng.randbytes(rng.choice((0, 1, 20, 300))),
    "character(4)": lambda rng: rng.choice(("a", "bc ", "")),
    "date": lambda rng: date(1, 1, 1) + timedelta(days=rng.randrange(3_000_000)),
    "double precision": lambda rng: rng.choice((rng.gauss(0, 1e6), float("nan"), float("inf"), 1e-300, 0.1)),
    "inet": lambda rng: IPv4Address(rng.getrandbits(32)),
    "int": lambda rng: rng.randint(-(2**31), 2**31 - 1),
    "int[]": _array(lambda rng: rng.randint(-(2**31), 2**31 - 1), 5),
    "int[][]": lambda rng: [[rng.randint(0, 9), rng.randint(0, 9)] for _ in range(2)],
    "interval": lambda rng: timedelta(days=rng.randint(-400, 400), microseconds=rng.randrange(10**10)),
    "json": lambda rng: Json(_tree(rng)),
    "jsonb": lambda rng: Jsonb(_tree(rng)),
    "numeric": _numeric,
    "numeric(12,2)": lambda rng: _decimal(rng, 9, 2),
    "numeric(18,4)": lambda rng: _decimal(rng, 13, 4),
    "real": lambda rng: rng.choice((0.5, 1.25, -3.0)),
    "smallint": lambda rng: rng.randint(-32768, 32767),
    "text": _text,
    "text[]": _array(lambda rng: rng.choice(_WORDS), 4),
    "time": lambda rng: time(rng.randrange(24), rng.randrange(60), rng.randrange(60), rng.randrange(10**6)),
    "timestamp": lambda rng: _timestamp(rng).replace(tzinfo=None),
    "timestamptz": _timestamp,
    "timestamptz[]": _array(_timestamp, 2),
}
"""Values by type of column."""
_ID: Mapping[str, tuple[str, MakeKey]] = {"id": ("bigint", lambda _rng, number: number)}


def _shape(
    name: str,
    key: Mapping[str, tuple[str, MakeKey]],
    columns: str,
    *extra_sql: str,
    makes: Mapping[str, Make] = MappingProxyType({}),
    update: Callable[[Random, int], Row] | None = None,
    primary: bool = True,
) -> Shape:
    """Build a Shape of key columns (name -> type, how a value is made) and columns ("name type,
    ...").

    Values follow from the type unless `makes` has the column, and are NULL at times unless it is
    NOT NULL. An update sets some or all of the columns that are not in the key.
    """
    kinds = dict(column.split(" ", 1) for column in columns.split(", "))

    def values(rng: Random, names: Sequence[str]) -> Row:
        row = {}
        for column in names:
            kind = kinds[column].removesuffix(" NOT NULL")
            make = makes.get(column) or _MAKE[kind]
            row[column] = _or_null(rng, make) if kind == kinds[column] else make(rng)
        return row

    keys_sql = ", ".join(f"{column} {kind}" for column, (kind, _) in key.items())
    primary_sql = f", PRIMARY KEY ({', '.join(key)})" if primary else ""
    return Shape(
        name,
        f"{keys_sql}, {columns}{primary_sql}",
        tuple(key),
        lambda rng, number: {column: make(rng, number) for column, (_, make) in key.items()} | values(rng, list(kinds)),
        update or (lambda rng, _number: values(rng, rng.sample(list(kinds), k=rng.randint(1, len(kinds))))),
        extra_sql,
    )


def _update_setting(rng: Random, number: int) -> Row:
    """Change the key in every third update."""
    changed: Row = {"value": _or_null(rng, _text)}
    return {"name": f"{_text(rng, 1)}/{number}", **changed} if number % 3 == 0 else changed


def _update_big_text(rng: Random, number: int) -> Row:
    """Set the title alone in most updates: the source then does not send the large value."""
    return {"title": _text(rng), "body": _big_text(rng)} if number % 10 == 0 else {"title": _text(rng)}


SHAPES: Sequence[Shape] = (
    _shape("accounts", _ID, "owner text NOT NULL, balance numeric(18,4), opened_at timestamptz, note text, active boolean"),
    _shape(
        "order_lines",
        {"order_id": ("bigint", lambda _rng, number: number // 4), "line_no": ("int", lambda _rng, number: number % 4)},
        "sku text, quantity int, price numeric(12,2)",
    ),
    _shape(
        "documents",
        {"id": ("uuid", lambda rng, _number: UUID(int=rng.getrandbits(128), version=4))},
        "body jsonb NOT NULL, tags text[]",
    ),
    _shape("blobs", _ID, "data bytea NOT NULL, digest bytea"),
    _shape(
        "events",
        {"n": ("bigint", lambda _rng, number: number)},
        "happened_at timestamptz NOT NULL, kind text NOT NULL, payload json",
        "ALTER TABLE {} REPLICA IDENTITY FULL",
        "CREATE INDEX ON {} (n)",
        primary=False,
    ),
    _shape(
        "big_texts",
        _ID,
        "title text, body text NOT NULL",
        "ALTER TABLE {} ALTER COLUMN body SET STORAGE EXTERNAL",
        makes={"body": _big_text},
        update=_update_big_text,
    ),
    _shape(
        "measurements",
        {
            "sensor": ("text", lambda rng, _number: rng.choice(("t1", "t'2", "τ3"))),
            "at": ("timestamptz", lambda _rng, number: _EPOCH + timedelta(seconds=number)),
        },
        "value double precision NOT NULL, quality smallint",
    ),
    _shape(
        "settings",
        {"name": ("text", lambda rng, number: f"{_text(rng, 2)}#{number}")},
        "value text",
        update=_update_setting,
    ),
    _shape(
        "arrays",
        {"id": ("int", lambda _rng, number: number)},
        "ints int[], texts text[], stamps timestamptz[], matrix int[][] NOT NULL",
    ),
    _shape("nulls", _ID, "a int, b text, c numeric, d timestamptz"),
    _shape("moments", _ID, "day date, clock time, local timestamp, at timestamptz, span interval"),
    _shape("mixed", _ID, "n numeric, small smallint, short character(4) NOT NULL, address inet, ratio real"),
)
