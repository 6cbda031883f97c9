"""The settings of a scheduler. Every time is in milliseconds of the clock that the scheduler was given."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Settings of one scheduler; ValueError names a value that is out of bounds.

    heartbeat_interval_ms: how often each capture is asked how far it is. stats_interval_ms: how often it is asked for rates.
    bootstrap_timeout_ms: how long a new scheduler waits for captures that do not answer before it goes on without them.
    capture_silent_ms: without an answer for this long a capture counts as silent and is given nothing new.
    add_batch_spans, remove_batch_spans: how many spans one tick adds, and removes, at the most.
    max_task_concurrency, max_task_concurrency_per_capture: how many planned moves may be under way.
    error_backoff_initial_ms, error_backoff_max_ms: how long a span waits after an error, doubling, less up to half (jitter).
    error_forget_ms: a span that replicated this long without an error starts again with the shortest wait.
    spans_per_message: how many spans one dispatch message holds; more are sent as several messages.
    prepare_timeout_ms: a prepare that takes longer is undone; the span stays where it was, or is tried elsewhere.
    move_attempts: so many prepares of one move may end without success before it is refused.
    rows_per_s_per_weight, bytes_per_s_per_weight: a span weighs 1, and 1 more for each such rate, whichever gives more.
    balance_interval_ms: how long placement has been quiet before loads are evened out without being asked; 0: never.
    balance_start_percent: how far above the mean the most loaded capture is before that begins; balance_stop_percent: how near
    the mean is good enough, for this and for rebalance. move_cooldown_ms: a span that was moved stays where it is for so long,
    unless an operator moves or rebalances.
    audit_interval_ms: how often what a capture says it holds is compared with what is known of it.
    brake_percent: when more than this share of the captures vanishes within brake_window_ms, spans are not placed anew before
    brake_hold_ms have passed, or enough captures are back. brake_min_captures: with fewer captures there is no brake.
    """

    heartbeat_interval_ms: int = 100
    stats_interval_ms: int = 1_000
    bootstrap_timeout_ms: int = 10_000
    capture_silent_ms: int = 3_000
    add_batch_spans: int = 32_768
    remove_batch_spans: int = 32_768
    max_task_concurrency: int = 32
    max_task_concurrency_per_capture: int = 16
    error_backoff_initial_ms: int = 1_000
    error_backoff_max_ms: int = 60_000
    error_forget_ms: int = 60_000
    spans_per_message: int = 65_536
    prepare_timeout_ms: int = 300_000
    move_attempts: int = 3
    rows_per_s_per_weight: int = 100
    bytes_per_s_per_weight: int = 100_000
    balance_interval_ms: int = 60_000
    balance_start_percent: int = 20
    balance_stop_percent: int = 5
    move_cooldown_ms: int = 600_000
    audit_interval_ms: int = 10_000
    brake_percent: int = 50
    brake_window_ms: int = 10_000
    brake_hold_ms: int = 30_000
    brake_min_captures: int = 4

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "balance_interval_ms" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"SchedulerConfig.{field.name} must be a whole number of at least {least}, not {value!r}")
        if self.error_backoff_max_ms < self.error_backoff_initial_ms:
            raise ValueError("SchedulerConfig.error_backoff_max_ms must not be below error_backoff_initial_ms")
        if self.balance_start_percent <= self.balance_stop_percent:
            raise ValueError("SchedulerConfig.balance_start_percent must be above balance_stop_percent")
