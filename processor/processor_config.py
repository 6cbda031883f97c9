"""The configuration of the processor service: every key with its default, bounds and unit. See `tablewire.runtime.config`."""

from __future__ import annotations

from typing import Annotated

import msgspec

from tablewire.runtime.config import Section, key
from tablewire.runtime.sections import EtcdSection, GrpcSection, HttpSection, LogSection, PeerTlsSection

DEFAULT_EXCHANGE_PORT = 7450
DEFAULT_HTTP_PORT = 7451


class ProcessorExchangeSection(GrpcSection, frozen=True, kw_only=True):
    """The Exchange service, which owners call."""

    port: Annotated[int, key("TCP port of the Exchange service; 0: any free port", ge=0, le=65535)] = DEFAULT_EXCHANGE_PORT
    wait_ms: Annotated[
        int, key("How long an Exchange call waits at most for tables that are being prepared or stopped", ge=1, le=2_000)
    ] = 50


class ProcessorHttpSection(HttpSection, frozen=True, kw_only=True):
    port: Annotated[int, key("TCP port of /metrics, /healthz and /readyz; 0: any free port", ge=0, le=65535)] = DEFAULT_HTTP_PORT


class ProcessorTickSection(Section, frozen=True, kw_only=True):
    interval_ms: Annotated[int, key("The maximum time between two ticks of an agent", ge=5, le=10_000)] = 2_000
    unsettled_interval_ms: Annotated[
        int, key("The maximum time between two ticks of an agent while a table is being prepared or stopped", ge=1, le=10_000)
    ] = 10


class StopSection(Section, frozen=True, kw_only=True):
    """How a processor stops, on SIGTERM and after it has lost its lease."""

    drain_timeout_ms: Annotated[
        int, key("How long a processor that received SIGTERM waits for its tables to move away", ge=0, le=3_600_000)
    ] = 60_000
    close_timeout_ms: Annotated[int, key("How long executors may take to stop before the process exits", ge=100, le=600_000)] = (
        20_000
    )


class ProcessorConfig(Section, frozen=True, kw_only=True):
    cluster: Annotated[
        str, key("Name of the cluster; all its etcd keys begin with /tablewire/ and this name", min_length=1, max_length=128)
    ] = "default"
    name: Annotated[str, key("Prefix of the ids of this processor; empty: the host name", max_length=100)] = ""
    labels: Annotated[dict[str, str], key("name=value pairs that listings show beside this processor")] = msgspec.field(
        default_factory=dict
    )
    etcd: EtcdSection = EtcdSection()
    exchange: ProcessorExchangeSection = ProcessorExchangeSection()
    http: ProcessorHttpSection = ProcessorHttpSection()
    tls: PeerTlsSection = PeerTlsSection()
    log: LogSection = LogSection()
    tick: ProcessorTickSection = ProcessorTickSection()
    stop: StopSection = StopSection()
