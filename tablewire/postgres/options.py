"""Options of a PostgreSQL changefeed (`--source-option key=value`), checked as a whole by whoever reads them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from tablewire.errors import OperatingError

_MEBIBYTE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class PostgresOptions:
    """Every key with its default; bounds in `_BOUNDS`. All of them but `binary` and `existing_rows` are numbers.

    sink_connections: writers of one processor at the sink. queue_max_bytes: changes of one table that wait for the sink;
    queues_max_bytes: of all tables of one processor. batch_max_bytes: of one sink transaction, unless one source transaction is
    larger. catch_up_streams: tables that fell behind are read again by so many extra walsenders. snapshot_threads: initial
    copies at a time. error_after_ms: how long a lost connection is retried quietly. binary: ask for binary values.
    existing_rows: what a first copy does with a sink table that holds rows already: refuse | truncate.
    """

    sink_connections: int = 4
    queue_max_bytes: int = 64 * _MEBIBYTE
    queues_max_bytes: int = 256 * _MEBIBYTE
    batch_max_bytes: int = 4 * _MEBIBYTE
    catch_up_streams: int = 1
    snapshot_threads: int = 1
    error_after_ms: int = 15_000
    statement_timeout_ms: int = 60_000
    takeover_wait_ms: int = 300
    file_max_bytes: int = 64 * _MEBIBYTE
    binary: bool = True
    existing_rows: str = "refuse"


_BOUNDS: Mapping[str, tuple[int, int]] = {
    "sink_connections": (1, 64),
    "queue_max_bytes": (64 * 1024, 1024 * _MEBIBYTE),
    "queues_max_bytes": (64 * 1024, 16 * 1024 * _MEBIBYTE),
    "batch_max_bytes": (1024, 256 * _MEBIBYTE),
    "catch_up_streams": (1, 16),
    "snapshot_threads": (1, 16),
    "error_after_ms": (0, 3_600_000),
    "statement_timeout_ms": (1_000, 3_600_000),
    "takeover_wait_ms": (50, 5_000),
    "file_max_bytes": (64 * 1024, 16 * 1024 * _MEBIBYTE),
}
_WORDS: Mapping[str, tuple[str, ...]] = {"existing_rows": ("refuse", "truncate")}
_BOOLEANS = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}


def parse_options(options: Mapping[str, str]) -> PostgresOptions:
    """The options; OperatingError names the first key or value that cannot be right."""
    known = {field.name for field in fields(PostgresOptions)}
    values: dict[str, object] = {}
    for key, text in options.items():
        if key not in known:
            raise OperatingError(f"source option {key!r} does not exist; there are: {', '.join(sorted(known))}")
        values[key] = _parse(key, str(text).strip())
    return PostgresOptions(**values)  # type: ignore[arg-type]  # each value was parsed by its own key


def _parse(key: str, text: str) -> object:
    if key in _WORDS:
        if text not in _WORDS[key]:
            raise OperatingError(f"source option {key}: {text!r} is none of {', '.join(_WORDS[key])}")
        return text
    if key not in _BOUNDS:
        if text.lower() not in _BOOLEANS:
            raise OperatingError(f"source option {key}: {text!r} is neither true nor false")
        return _BOOLEANS[text.lower()]
    least, most = _BOUNDS[key]
    if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
        raise OperatingError(f"source option {key}: {text!r} is not a whole number from {least} to {most}")
    return int(text)
