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
    error_backoff_initial_ms, error_backoff_max_ms: how long a span waits after an executor's error, doubling.
    error_forget_ms: a span that replicated this long without an error starts again with the shortest wait.
    spans_per_message: how many spans one dispatch message holds; more are sent as several messages.
    prepare_timeout_ms: a prepare that takes longer is undone; the span stays where it was, or is tried elsewhere.
    move_attempts: so many prepares of one move may end without success before it is refused.
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
    brake_percent: int = 50
    brake_window_ms: int = 10_000
    brake_hold_ms: int = 30_000
    brake_min_captures: int = 4

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"SchedulerConfig.{field.name} must be a whole number of at least 1, not {value!r}")
        if self.error_backoff_max_ms < self.error_backoff_initial_ms:
            raise ValueError("SchedulerConfig.error_backoff_max_ms must not be below error_backoff_initial_ms")
