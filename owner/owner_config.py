"""All keys of the owner service, with their defaults, bounds and units; `tablewire.runtime.config` says how to give them."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated

from owner.core.scheduler_config import SchedulerConfig
from tablewire.runtime.config import Section, key
from tablewire.runtime.sections import EtcdSection, GrpcSection, HttpSection, LogSection, PeerTlsSection

DEFAULT_ADMIN_PORT = 7440
DEFAULT_HTTP_PORT = 7441


class AdminSection(GrpcSection, frozen=True, kw_only=True):
    """The admin API, which the CLI and the other owners call."""

    port: Annotated[int, key("TCP port of the admin API; 0 takes a free one", ge=0, le=65535)] = DEFAULT_ADMIN_PORT


class OwnerHttpSection(HttpSection, frozen=True, kw_only=True):
    port: Annotated[int, key("TCP port of /metrics, /healthz, /readyz; 0 takes a free one", ge=0, le=65535)] = DEFAULT_HTTP_PORT


class OwnerTickSection(Section, frozen=True, kw_only=True):
    interval_ms: Annotated[int, key("The longest time between two ticks of a changefeed", ge=10, le=10_000)] = 100
    status_interval_ms: Annotated[int, key("How often a checkpoint that moved is stored in etcd", ge=50, le=600_000)] = 200


class OwnerExchangeSection(Section, frozen=True, kw_only=True):
    """The calls to the processors."""

    timeout_ms: Annotated[int, key("Deadline of one Exchange with a processor", ge=100, le=60_000)] = 5_000
    idle_ms: Annotated[int, key("A processor to which nothing is to be said is called that often", ge=10, le=10_000)] = 500


class SchedulerSection(Section, frozen=True, kw_only=True):
    """Of every changefeed's scheduler. Each field of SchedulerConfig is a key here, with the same default."""

    heartbeat_interval_ms: Annotated[int, key("How often each processor is asked how far it is", ge=10, le=60_000)] = 100
    stats_interval_ms: Annotated[int, key("How often it is asked for rates", ge=100, le=600_000)] = 1_000
    bootstrap_timeout_ms: Annotated[
        int, key("How long a new leader waits for processors that do not answer before it goes on", ge=100, le=600_000)
    ] = 10_000
    capture_silent_ms: Annotated[
        int, key("Without an answer for this long a processor counts as silent and gets nothing new", ge=100, le=600_000)
    ] = 3_000
    capture_evict_ms: Annotated[
        int,
        key(
            "A processor that is silent for this long although etcd hears it loses its registration; 0: never", ge=0, le=3_600_000
        ),
    ] = 60_000
    add_batch_spans: Annotated[int, key("How many spans one tick places at the most", ge=1, le=1_000_000)] = 32_768
    remove_batch_spans: Annotated[int, key("How many spans one tick begins to remove at the most", ge=1, le=1_000_000)] = 32_768
    spans_per_message: Annotated[
        int, key("How many spans one dispatch message holds; more are sent as several", ge=1, le=262_144)
    ] = 65_536
    max_task_concurrency: Annotated[int, key("How many planned moves may be under way", ge=1, le=100_000)] = 32
    max_task_concurrency_per_capture: Annotated[int, key("The same for one processor", ge=1, le=100_000)] = 16
    prepare_timeout_ms: Annotated[
        int,
        key("A prepare that takes longer is undone: the span stays where it is, or is tried elsewhere", ge=1_000, le=86_400_000),
    ] = 300_000
    move_attempts: Annotated[
        int, key("So many prepares of one move may end without success before the move is refused", ge=1, le=100)
    ] = 3
    error_backoff_initial_ms: Annotated[
        int, key("How long a span waits after an error, doubling; up to half is cut off, unlike for each span", ge=10, le=600_000)
    ] = 1_000
    error_backoff_max_ms: Annotated[int, key("The longest such wait", ge=10, le=3_600_000)] = 60_000
    error_forget_ms: Annotated[
        int, key("A span that replicated this long without an error starts again with the shortest wait", ge=100, le=86_400_000)
    ] = 60_000
    rows_per_s_per_weight: Annotated[int, key("A span weighs 1, and 1 more for each so many rows/s", ge=1, le=1_000_000_000)] = (
        100
    )
    bytes_per_s_per_weight: Annotated[
        int, key("The same for bytes/s; of the two the one that gives more counts", ge=1, le=1_000_000_000_000)
    ] = 100_000
    balance_interval_ms: Annotated[
        int, key("How long placement has been quiet before loads are evened out unasked; 0: never", ge=0, le=86_400_000)
    ] = 60_000
    balance_start_percent: Annotated[
        int, key("How far above the mean the most loaded processor is before that begins", ge=1, le=1_000)
    ] = 20
    balance_stop_percent: Annotated[
        int, key("How near the mean is good enough, for that and for `owner rebalance`", ge=1, le=1_000)
    ] = 5
    move_cooldown_ms: Annotated[
        int, key("A span that was moved stays where it is for so long, unless an operator says otherwise", ge=1, le=604_800_000)
    ] = 600_000
    audit_interval_ms: Annotated[
        int, key("How often what a processor says it holds is compared with what is known of it", ge=100, le=3_600_000)
    ] = 10_000
    brake_percent: Annotated[
        int,
        key(
            "When more than this share of the processors vanishes at once, nothing is placed anew for a while; 100: never",
            ge=1,
            le=100,
        ),
    ] = 50
    brake_window_ms: Annotated[int, key("What counts as at once", ge=100, le=600_000)] = 10_000
    brake_hold_ms: Annotated[
        int, key("The brake lets go after this, or earlier when enough processors are back", ge=100, le=3_600_000)
    ] = 30_000
    brake_min_captures: Annotated[int, key("With fewer processors there is no brake", ge=1, le=100_000)] = 4

    def __post_init__(self) -> None:
        if self.capture_silent_ms <= self.heartbeat_interval_ms:
            raise ValueError("capture_silent_ms must be above heartbeat_interval_ms")
        if self.error_backoff_max_ms < self.error_backoff_initial_ms:
            raise ValueError("error_backoff_max_ms must not be below error_backoff_initial_ms")
        if self.balance_start_percent <= self.balance_stop_percent:
            raise ValueError("balance_start_percent must be above balance_stop_percent")

    def for_core(self) -> SchedulerConfig:
        """The same values as the scheduler takes them; what it does not know is the service's own."""
        return SchedulerConfig(**{field.name: getattr(self, field.name) for field in fields(SchedulerConfig)})


class SourceSection(Section, frozen=True, kw_only=True):
    """How the leader looks after the source of each changefeed."""

    poll_interval_ms: Annotated[int, key("How often tables are listed and the safepoint is advanced", ge=50, le=600_000)] = 1_000
    idle_poll_interval_ms: Annotated[
        int, key("How often a changefeed that does not run is asked what it retains", ge=100, le=3_600_000)
    ] = 10_000
    retry_min_ms: Annotated[int, key("The first pause after an error of a source; it doubles", ge=10, le=600_000)] = 500
    retry_max_ms: Annotated[int, key("The longest pause after an error of a source", ge=10, le=3_600_000)] = 30_000

    def __post_init__(self) -> None:
        if self.retry_max_ms < self.retry_min_ms:
            raise ValueError("retry_max_ms must not be below retry_min_ms")


class HistorySection(Section, frozen=True, kw_only=True):
    """What `owner events` shows."""

    events_max: Annotated[int, key("How many events are kept in etcd; the oldest go", ge=10, le=5_000)] = 1_000


class OwnerConfig(Section, frozen=True, kw_only=True):
    cluster: Annotated[str, key("Name of the cluster: the part of etcd's keys that it owns", min_length=1, max_length=128)] = (
        "default"
    )
    id: Annotated[str, key("Name of this owner in lists; empty: made from host and process", max_length=128)] = ""
    etcd: EtcdSection = EtcdSection()
    admin: AdminSection = AdminSection()
    http: OwnerHttpSection = OwnerHttpSection()
    tls: PeerTlsSection = PeerTlsSection()
    log: LogSection = LogSection()
    tick: OwnerTickSection = OwnerTickSection()
    exchange: OwnerExchangeSection = OwnerExchangeSection()
    scheduler: SchedulerSection = SchedulerSection()
    source: SourceSection = SourceSection()
    history: HistorySection = HistorySection()
