"""The twelve tables of the workload: what a row of each looks like, from a seeded chance and a number that is never reused.

Between them: bigint, int, text, uuid, composite and no keys; text with everything that needs quoting, numeric with NaN and with
many digits, jsonb, json, bytea, timestamptz and its relatives, arrays with NULLs in them, NULLs everywhere, values big
enough to be stored out of line (TOAST) which updates leave alone, key-changing updates, and a table without a primary key.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from ipaddress import IPv4Address
from random import Random
from typing import Any
from uuid import UUID

from psycopg.types.json import Json, Jsonb

Row = dict[str, Any]

_WORDS = (
    "alpha",
    "b'eta",
    'ga"mma',
    "del\tta",
    "eps\\ilon",
    "ze\nta",
    "éta",
    "θ",
    "日本語",
    "🐘",
    "",
    " ",
    "\\N",
    "NULL",
    "{}",
    "%s",
)
_EPOCH = datetime(2024, 2, 29, 23, 59, 59, 999_999, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Shape:
    """A table: its columns as SQL, the columns that identify a row, and how rows and updates are made.

    row(rng, number): a new row. update(rng, number): the columns that an update sets; it may hold key columns.
    extra_sql: statements after CREATE TABLE, with {} for the table's name.
    """

    name: str
    columns_sql: str
    key: tuple[str, ...]
    row: Callable[[Random, int], Row]
    update: Callable[[Random, int], Row]
    extra_sql: tuple[str, ...] = ()


def _text(rng: Random, words: int = 4) -> str:
    return " ".join(rng.choices(_WORDS, k=rng.randint(0, words)))


def _maybe(rng: Random, value: Any) -> Any:
    """NULL once in four."""
    return None if rng.random() < 0.25 else value


def _stamp(rng: Random) -> datetime:
    return _EPOCH + timedelta(microseconds=rng.randrange(10**15))


def _uuid(rng: Random) -> UUID:
    return UUID(int=rng.getrandbits(128), version=4)


def _numeric(rng: Random) -> Decimal:
    choice = rng.random()
    if choice < 0.03:
        return Decimal("NaN")
    digits = rng.choice((2, 10, 40))
    return Decimal(rng.randint(-(10**digits), 10**digits)).scaleb(-rng.randint(0, digits // 2))


def _tree(rng: Random) -> Any:
    return {"k": _text(rng, 2), "n": rng.randint(-5, 5), "x": [None, True, 1.5, _text(rng, 1)], "d": {"è": []}}


def _big_text(rng: Random) -> str:
    """12-40 kB that do not compress, so that they are stored out of line."""
    return base64.b64encode(rng.randbytes(rng.randint(9_000, 30_000))).decode("ascii")


def _subset(rng: Random, row: Row) -> Row:
    """One to all columns of an update."""
    names = rng.sample(list(row), k=rng.randint(1, len(row)))
    return {name: row[name] for name in row if name in names}


def _account(rng: Random) -> Row:
    return {
        "owner": _text(rng),
        "balance": Decimal(rng.randint(-(10**9), 10**9)).scaleb(-4),
        "opened_at": _stamp(rng),
        "note": _maybe(rng, _text(rng)),
        "active": rng.random() < 0.5,
    }


def _order_line(rng: Random) -> Row:
    return {"sku": _text(rng, 2), "quantity": rng.randint(1, 99), "price": Decimal(rng.randint(0, 10**7)).scaleb(-2)}


def _document(rng: Random) -> Row:
    return {"body": Jsonb(_tree(rng)), "tags": [_maybe(rng, word) for word in rng.choices(_WORDS, k=rng.randint(0, 4))]}


def _blob(rng: Random) -> Row:
    return {"data": rng.randbytes(rng.choice((0, 1, 20, 300))), "digest": _maybe(rng, rng.randbytes(16))}


def _event(rng: Random) -> Row:
    return {"happened_at": _stamp(rng), "kind": rng.choice(("open", "close", "it's")), "payload": _maybe(rng, Json(_tree(rng)))}


def _measurement(rng: Random) -> Row:
    value = rng.choice((rng.gauss(0, 1e6), float("nan"), float("inf"), 1e-300, 0.1))
    return {"value": value, "quality": _maybe(rng, rng.randint(-32768, 32767))}


def _arrays(rng: Random) -> Row:
    return {
        "ints": [_maybe(rng, rng.randint(-(2**31), 2**31 - 1)) for _ in range(rng.randint(0, 5))],
        "texts": _maybe(rng, rng.choices(_WORDS, k=rng.randint(0, 3))),
        "stamps": [_stamp(rng) for _ in range(rng.randint(0, 2))],
        "matrix": [[rng.randint(0, 9), rng.randint(0, 9)] for _ in range(2)],
    }


def _nulls(rng: Random) -> Row:
    return {
        "a": _maybe(rng, rng.randint(-100, 100)),
        "b": _maybe(rng, _text(rng)),
        "c": _maybe(rng, _numeric(rng)),
        "d": _maybe(rng, _stamp(rng)),
    }


def _moment(rng: Random) -> Row:
    stamp = _stamp(rng)
    return {
        "day": date(1, 1, 1) + timedelta(days=rng.randrange(3_000_000)),
        "clock": time(rng.randrange(24), rng.randrange(60), rng.randrange(60), rng.randrange(10**6)),
        "local": stamp.replace(tzinfo=None),
        "at": stamp,
        "span": timedelta(days=rng.randint(-400, 400), microseconds=rng.randrange(10**10)),
    }


def _mixed(rng: Random) -> Row:
    return {
        "n": _numeric(rng),
        "small": rng.randint(-32768, 32767),
        "short": rng.choice(("a", "bc ", "")),
        "address": _maybe(rng, IPv4Address(rng.getrandbits(32))),
        "ratio": rng.choice((0.5, 1.25, -3.0)),
    }


def _keyed(key: Callable[[Random, int], Row], rest: Callable[[Random], Row]) -> Callable[[Random, int], Row]:
    return lambda rng, number: {**key(rng, number), **rest(rng)}


def _part(rest: Callable[[Random], Row]) -> Callable[[Random, int], Row]:
    return lambda rng, _number: _subset(rng, rest(rng))


def _by_id(_rng: Random, number: int) -> Row:
    return {"id": number}


def _setting_update(rng: Random, number: int) -> Row:
    """Every third update changes the key."""
    changed: Row = {"value": _maybe(rng, _text(rng))}
    return {"name": f"{_text(rng, 1)}/{number}", **changed} if number % 3 == 0 else changed


def _big_update(rng: Random, number: int) -> Row:
    """Mostly the title alone: the big text is then not sent by the source at all."""
    return {"title": _text(rng), "body": _big_text(rng)} if number % 10 == 0 else {"title": _text(rng)}


SHAPES: Sequence[Shape] = (
    Shape(
        "accounts",
        "id bigint PRIMARY KEY, owner text NOT NULL, balance numeric(18,4), opened_at timestamptz, note text, active boolean",
        ("id",),
        _keyed(_by_id, _account),
        _part(_account),
    ),
    Shape(
        "order_lines",
        "order_id bigint, line_no int, sku text, quantity int, price numeric(12,2), PRIMARY KEY (order_id, line_no)",
        ("order_id", "line_no"),
        _keyed(lambda _rng, number: {"order_id": number // 4, "line_no": number % 4}, _order_line),
        _part(_order_line),
    ),
    Shape(
        "documents",
        "id uuid PRIMARY KEY, body jsonb, tags text[]",
        ("id",),
        _keyed(lambda rng, _number: {"id": _uuid(rng)}, _document),
        _part(_document),
    ),
    Shape(
        "blobs",
        "id bigint PRIMARY KEY, data bytea, digest bytea",
        ("id",),
        _keyed(_by_id, _blob),
        _part(_blob),
    ),
    Shape(
        "events",
        "n bigint, happened_at timestamptz, kind text, payload json",
        ("n",),
        _keyed(lambda _rng, number: {"n": number}, _event),
        _part(_event),
        ("ALTER TABLE {} REPLICA IDENTITY FULL", "CREATE INDEX ON {} (n)"),
    ),
    Shape(
        "big_texts",
        "id bigint PRIMARY KEY, title text, body text",
        ("id",),
        _keyed(_by_id, lambda rng: {"title": _text(rng), "body": _big_text(rng)}),
        _big_update,
        ("ALTER TABLE {} ALTER COLUMN body SET STORAGE EXTERNAL",),
    ),
    Shape(
        "measurements",
        "sensor text, at timestamptz, value double precision, quality smallint, PRIMARY KEY (sensor, at)",
        ("sensor", "at"),
        _keyed(
            lambda rng, number: {"sensor": rng.choice(("t1", "t'2", "τ3")), "at": _EPOCH + timedelta(seconds=number)},
            _measurement,
        ),
        _part(_measurement),
    ),
    Shape(
        "settings",
        "name text PRIMARY KEY, value text",
        ("name",),
        lambda rng, number: {"name": f"{_text(rng, 2)}#{number}", "value": _maybe(rng, _text(rng))},
        _setting_update,
    ),
    Shape(
        "arrays",
        "id int PRIMARY KEY, ints int[], texts text[], stamps timestamptz[], matrix int[]",
        ("id",),
        _keyed(_by_id, _arrays),
        _part(_arrays),
    ),
    Shape(
        "nulls",
        "id bigint PRIMARY KEY, a int, b text, c numeric, d timestamptz",
        ("id",),
        _keyed(_by_id, _nulls),
        _part(_nulls),
    ),
    Shape(
        "moments",
        "id bigint PRIMARY KEY, day date, clock time, local timestamp, at timestamptz, span interval",
        ("id",),
        _keyed(_by_id, _moment),
        _part(_moment),
    ),
    Shape(
        "mixed",
        "id bigint PRIMARY KEY, n numeric, small smallint, short character(4), address inet, ratio real",
        ("id",),
        _keyed(_by_id, _mixed),
        _part(_mixed),
    ),
)
