"""Options of a PostgreSQL changefeed (`--source-option key=value`), checked together. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields

from tablewire.errors import OperatingError
from tablewire.postgres.catalogue import OPERATIONS, PublicationRules

_MEBIBYTE = 1024 * 1024
_BOOLEANS = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}


def _number(default: int, least: int, most: int) -> int:
    value: int = field(default=default, metadata={"bounds": (least, most)})
    return value


@dataclass(frozen=True, slots=True)
class PostgresOptions:
    """Each option with its default and its bounds.

    sink_connections: writers of one processor at the sink. queue_max_bytes: changes of one table that
    wait for the sink; queues_max_bytes: of all tables of one processor. batch_max_bytes: of one sink
    transaction, unless one source transaction is larger. catch_up_streams: extra walsenders that read
    tables again. snapshot_threads: concurrent first copies. error_after_ms: how long a lost connection
    is retried without an error. binary: request binary values. existing_rows: what a first copy does
    with a sink table that already holds rows: refuse or truncate. operations: the changes that are
    replicated. partitions: whether each leaf is a table, or each partitioned table as a whole. generated_columns: those whose
    values are replicated.
    on_conflict: what is done with a change that finds another row at the sink than at the source.
    on_shape_change: whether a table that changed in a way that cannot be followed is copied again or fails.
    """

    sink_connections: int = _number(4, 1, 64)
    queue_max_bytes: int = _number(64 * _MEBIBYTE, 64 * 1024, 1024 * _MEBIBYTE)
    queues_max_bytes: int = _number(256 * _MEBIBYTE, 64 * 1024, 16 * 1024 * _MEBIBYTE)
    batch_max_bytes: int = _number(4 * _MEBIBYTE, 1024, 256 * _MEBIBYTE)
    catch_up_streams: int = _number(1, 1, 16)
    snapshot_threads: int = _number(1, 1, 16)
    error_after_ms: int = _number(15_000, 0, 3_600_000)
    statement_timeout_ms: int = _number(60_000, 1_000, 3_600_000)
    takeover_wait_ms: int = _number(300, 50, 5_000)
    file_max_bytes: int = _number(64 * _MEBIBYTE, 64 * 1024, 16 * 1024 * _MEBIBYTE)
    binary: bool = True
    existing_rows: str = field(default="refuse", metadata={"words": ("refuse", "truncate")})
    on_conflict: str = field(default="source-wins", metadata={"words": ("source-wins", "skip", "error")})
    operations: tuple[str, ...] = field(default=OPERATIONS, metadata={"list": OPERATIONS})
    partitions: str = field(default="leaf", metadata={"words": ("leaf", "root")})
    generated_columns: str = field(default="none", metadata={"words": ("none", "stored")})
    on_shape_change: str = field(default="copy", metadata={"words": ("copy", "error")})

    @property
    def rules(self) -> PublicationRules:
        return PublicationRules(self.operations, self.partitions == "root", self.generated_columns == "stored")


def parse_options(options: Mapping[str, str]) -> PostgresOptions:
    """Return the options; raise OperatingError that names the first unknown key or wrong value."""
    known = {option.name: option for option in fields(PostgresOptions)}
    for key in options:
        if key not in known:
            raise OperatingError(f"source option {key!r} does not exist; there are: {', '.join(sorted(known))}")
    values = {key: _parse(known[key], str(text).strip()) for key, text in options.items()}
    return PostgresOptions(**values)  # type: ignore[arg-type]  # each value was parsed for its own field


def _parse(option: Field[object], text: str) -> object:
    if words := option.metadata.get("words"):
        if text not in words:
            raise OperatingError(f"source option {option.name}: {text!r} is none of {', '.join(words)}")
        return text
    if known := option.metadata.get("list"):
        given = {word.strip() for word in text.split(",")}
        if wrong := given - set(known):
            raise OperatingError(f"source option {option.name}: {min(wrong)!r} is none of {', '.join(known)}")
        return tuple(word for word in known if word in given)
    if "bounds" not in option.metadata:
        if text.lower() not in _BOOLEANS:
            raise OperatingError(f"source option {option.name}: {text!r} is neither true nor false")
        return _BOOLEANS[text.lower()]
    least, most = option.metadata["bounds"]
    if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
        raise OperatingError(f"source option {option.name}: {text!r} is not a whole number from {least} to {most}")
    return int(text)
