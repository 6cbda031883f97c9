"""The settings of a scheduler, each defined once: its default, its bounds and its meaning.

The configuration of the owner service reads the same fields
(`owner.owner_config.SchedulerSection`), and so does the table of keys in docs/configuration.md.
Every time is in milliseconds of the clock that the scheduler was given.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


def setting(default: int, doc: str, *, ge: int = 1, le: int) -> Any:
    """Return a dataclass field. ge, le: the bounds for operators; a program may set any whole
    number of at least 1 (or 0 where ge is 0, which turns something off)."""
    return field(default=default, metadata={"doc": doc, "ge": ge, "le": le})


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The settings of one scheduler; ValueError names a value that is out of bounds."""

    heartbeat_interval_ms: int = setting(100, "How often each processor is asked for its progress", ge=10, le=60_000)
    stats_interval_ms: int = setting(1_000, "How often each processor is asked for its rates", ge=100, le=600_000)
    bootstrap_timeout_ms: int = setting(
        10_000,
        "How long a new leader waits for processors that do not answer before it continues without them",
        ge=100,
        le=600_000,
    )
    capture_silent_ms: int = setting(
        3_000, "A processor that has not answered for this long counts as silent and gets no new tables", ge=100, le=600_000
    )
    add_batch_spans: int = setting(32_768, "The maximum number of tables that one tick places", le=1_000_000)
    remove_batch_spans: int = setting(32_768, "The maximum number of tables that one tick begins to remove", le=1_000_000)
    max_task_concurrency: int = setting(32, "The maximum number of planned moves at the same time", le=100_000)
    max_task_concurrency_per_capture: int = setting(
        16, "The maximum number of planned moves at the same time that involve one processor", le=100_000
    )
    error_backoff_initial_ms: int = setting(
        1_000,
        "The pause of a table after its first error; it doubles with each error, less a random part of up to half",
        ge=10,
        le=600_000,
    )
    error_backoff_max_ms: int = setting(60_000, "The longest pause of a table after an error", ge=10, le=3_600_000)
    error_forget_ms: int = setting(
        60_000,
        "After this long without an error, the next error of a table starts with the shortest pause",
        ge=100,
        le=86_400_000,
    )
    spans_per_message: int = setting(
        65_536, "The maximum number of spans in one dispatch message; more spans are sent as several messages", le=262_144
    )
    prepare_timeout_ms: int = setting(
        300_000,
        "A prepare that takes longer is undone: the table stays where it is, or another processor tries",
        ge=1_000,
        le=86_400_000,
    )
    move_attempts: int = setting(3, "The number of failed prepares after which a move is refused", le=100)
    rows_per_s_per_weight: int = setting(100, "A table weighs 1, plus 1 for each multiple of this many rows/s", le=1_000_000_000)
    bytes_per_s_per_weight: int = setting(
        100_000, "The same for bytes/s; the larger of the two weights counts", le=1_000_000_000_000
    )
    balance_interval_ms: int = setting(
        60_000, "How long placement must have been quiet before load balancing begins by itself; 0: never", ge=0, le=86_400_000
    )
    balance_start_percent: int = setting(
        20, "Load balancing begins when the most loaded processor is this far above the mean", le=1_000
    )
    balance_stop_percent: int = setting(
        5, "Load balancing and `owner rebalance` end when every processor is this close to the mean", le=1_000
    )
    move_cooldown_ms: int = setting(
        600_000, "A table that was moved is not moved again for this long, except by an operator", le=604_800_000
    )
    audit_interval_ms: int = setting(
        10_000,
        "How often the tables that a processor reports are compared with those that the owner expects",
        ge=100,
        le=3_600_000,
    )
    brake_percent: int = setting(
        50, "When more than this share of the processors disappears within brake_window_ms, placement pauses; 100: never", le=100
    )
    brake_window_ms: int = setting(
        10_000, "The time within which disappearing processors are counted together", ge=100, le=600_000
    )
    brake_hold_ms: int = setting(
        30_000, "How long placement pauses at most; it resumes earlier when enough processors are back", ge=100, le=3_600_000
    )
    brake_min_captures: int = setting(4, "With fewer processors than this, placement never pauses", le=100_000)

    def __post_init__(self) -> None:
        for one in fields(self):
            value, least = getattr(self, one.name), min(1, one.metadata["ge"])
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{one.name} must be a whole number of at least {least}, not {value!r}")
        if self.error_backoff_max_ms < self.error_backoff_initial_ms:
            raise ValueError("error_backoff_max_ms must not be below error_backoff_initial_ms")
        if self.balance_start_percent <= self.balance_stop_percent:
            raise ValueError("balance_start_percent must be above balance_stop_percent")
