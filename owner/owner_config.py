"""The configuration of the owner service: every key with its default, bounds and unit. See
`tablewire.runtime.config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from owner.core.scheduler_config import SchedulerConfig, setting
from tablewire.runtime.config import Section, key
from tablewire.runtime.sections import EtcdSection, GrpcSection, HttpSection, LogSection, PeerTlsSection

DEFAULT_ADMIN_PORT = 7440
DEFAULT_HTTP_PORT = 7441


class AdminSection(GrpcSection, frozen=True, kw_only=True):
    """The admin API, which the CLI and the other owners call."""

    port: Annotated[int, key("TCP port of the admin API; 0: any free port", ge=0, le=65535)] = DEFAULT_ADMIN_PORT


class OwnerHttpSection(HttpSection, frozen=True, kw_only=True):
    port: Annotated[int, key("TCP port of /metrics, /healthz and /readyz; 0: any free port", ge=0, le=65535)] = DEFAULT_HTTP_PORT


class OwnerTickSection(Section, frozen=True, kw_only=True):
    interval_ms: Annotated[int, key("The maximum time between two ticks of a changefeed", ge=10, le=10_000)] = 100
    idle_interval_ms: Annotated[
        int,
        key("The same while nothing moves in any changefeed; at most a third of scheduler.capture_silent_ms", ge=10, le=10_000),
    ] = 1_000
    status_interval_ms: Annotated[int, key("How often an advanced checkpoint is stored in etcd", ge=50, le=600_000)] = 200


class OwnerExchangeSection(Section, frozen=True, kw_only=True):
    """The Exchange calls to the processors."""

    timeout_ms: Annotated[int, key("Timeout of one Exchange with a processor", ge=100, le=60_000)] = 5_000
    idle_ms: Annotated[int, key("How often a processor is called when there is nothing to send to it", ge=10, le=10_000)] = 2_000
    failure_pause_ms: Annotated[int, key("The shortest time between a failed Exchange and the next one", ge=1, le=10_000)] = 100


@dataclass(frozen=True, slots=True)
class SchedulerSection(SchedulerConfig):
    """The settings of every changefeed's scheduler, and of what the owner service does with what
    schedulers find."""

    capture_evict_ms: int = setting(
        60_000,
        "A processor that has been silent for this long although its lease is alive is evicted; 0: never",
        ge=0,
        le=3_600_000,
    )

    def __post_init__(self) -> None:
        SchedulerConfig.__post_init__(self)
        if self.capture_silent_ms <= self.heartbeat_interval_ms:
            raise ValueError("capture_silent_ms must be above heartbeat_interval_ms")


class SourceSection(Section, frozen=True, kw_only=True):
    """How the leader polls the source of each changefeed."""

    poll_interval_ms: Annotated[
        int, key("How often the tables are listed and the replication slot is advanced", ge=50, le=600_000)
    ] = 1_000
    idle_poll_interval_ms: Annotated[
        int, key("How often the WAL that a paused or failed changefeed retains is measured", ge=100, le=3_600_000)
    ] = 10_000
    retry_min_ms: Annotated[
        int, key("The first pause after an error of a source; it doubles with each error", ge=10, le=600_000)
    ] = 500
    retry_max_ms: Annotated[int, key("The longest pause after an error of a source", ge=10, le=3_600_000)] = 30_000

    def __post_init__(self) -> None:
        if self.retry_max_ms < self.retry_min_ms:
            raise ValueError("retry_max_ms must not be below retry_min_ms")


class HistorySection(Section, frozen=True, kw_only=True):
    """The events that `owner events` shows."""

    events_max: Annotated[int, key("The maximum number of events in etcd; the oldest are deleted", ge=10, le=5_000)] = 1_000


class OwnerConfig(Section, frozen=True, kw_only=True):
    cluster: Annotated[
        str, key("Name of the cluster; all its etcd keys begin with /tablewire/ and this name", min_length=1, max_length=128)
    ] = "default"
    id: Annotated[str, key("Name of this owner in listings; empty: the host name and a random suffix", max_length=128)] = ""
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
