"""All keys of the owner service, with their defaults, bounds and units; `tablewire.runtime.config` says how to give them."""

from __future__ import annotations

from typing import Annotated

from tablewire.runtime.config import Section, key
from tablewire.runtime.sections import EtcdSection, GrpcSection, HttpSection, LogSection, PeerTlsSection

DEFAULT_ADMIN_PORT = 7440
DEFAULT_HTTP_PORT = 7441


class AdminSection(GrpcSection, frozen=True, kw_only=True):
    """The admin API, which the CLI and the other owners call."""

    port: Annotated[int, key("TCP port of the admin API; 0 takes a free one", ge=0, le=65535)] = DEFAULT_ADMIN_PORT


class OwnerHttpSection(HttpSection, frozen=True, kw_only=True):
    port: Annotated[int, key("TCP port of /metrics, /healthz, /readyz; 0 takes a free one", ge=0, le=65535)] = DEFAULT_HTTP_PORT


class TickSection(Section, frozen=True, kw_only=True):
    interval_ms: Annotated[int, key("The longest time between two ticks of a changefeed", ge=10, le=10_000)] = 100


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
    tick: TickSection = TickSection()
