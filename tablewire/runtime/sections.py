"""Configuration sections that both services have: etcd, TLS, logs, and listening addresses.

A server binds `host` and `port` (0: a free port); others connect to `advertise` where it differs
(containers, several interfaces).
"""

from __future__ import annotations

from typing import Annotated, Literal

from tablewire.runtime.addresses import parse_address
from tablewire.runtime.config import Section, key

Port = Annotated[int, key("TCP port to listen on; 0: any free port", ge=0, le=65535)]
Host = Annotated[str, key("Address to listen on", min_length=1)]

MARGIN_SHARE = 0.2
MARGIN_MIN_S = 0.3
MARGIN_MAX_S = 2.0


def default_margin_s(ttl_s: float) -> float:
    """Return how long before its lease can expire a process stops: a fifth of the TTL, bounded."""
    return min(MARGIN_MAX_S, max(MARGIN_MIN_S, ttl_s * MARGIN_SHARE))


class TlsSection(Section, frozen=True, kw_only=True):
    """The files of one TLS identity. Every new connection uses what they hold then."""

    ca_file: Annotated[
        str, key("PEM file of the certificate authorities that peers are verified with; empty: those of the system")
    ] = ""
    cert_file: Annotated[str, key("PEM file of this process's certificate and its chain; empty: none")] = ""
    key_file: Annotated[str, key("PEM file of the private key of cert_file")] = ""

    def __post_init__(self) -> None:
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError("cert_file and key_file belong together")


class ClientTlsSection(TlsSection, frozen=True, kw_only=True):
    enabled: Annotated[bool, key("Connect with TLS")] = False


class PeerTlsSection(TlsSection, frozen=True, kw_only=True):
    """TLS between owners, processors and the CLI, as server and as client."""

    enabled: Annotated[bool, key("Serve and connect with TLS; requires cert_file and key_file")] = False
    require_client_cert: Annotated[bool, key("Refuse clients that have no certificate signed by ca_file (mTLS)")] = True
    allowed_common_names: Annotated[
        tuple[str, ...], key("Common names of the client certificates that may connect; empty: any certificate signed by ca_file")
    ] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.enabled and not self.cert_file:
            raise ValueError("enabled needs cert_file and key_file")
        if self.enabled and self.require_client_cert and not self.ca_file:
            raise ValueError("require_client_cert needs ca_file")
        if self.allowed_common_names and not (self.enabled and self.require_client_cert):
            raise ValueError("allowed_common_names needs enabled and require_client_cert")


class EtcdSection(Section, frozen=True, kw_only=True):
    endpoints: Annotated[tuple[str, ...], key("host:port of each etcd member", min_length=1)] = ("127.0.0.1:2379",)
    request_timeout_ms: Annotated[int, key("Timeout of one attempt of one request", ge=50, le=60_000)] = 2_000
    lease_ttl_ms: Annotated[
        int,
        key(
            "How long etcd keeps the lease of a process that no longer renews it; rounded up to whole seconds",
            ge=2_000,
            le=600_000,
        ),
    ] = 10_000
    lease_margin_ms: Annotated[
        int,
        key(
            "How long before its lease can expire a process stops acting on it; 0: a fifth of the TTL, 0.3 to 2 s",
            ge=0,
            le=60_000,
        ),
    ] = 0
    start_timeout_ms: Annotated[
        int, key("How long a starting process waits for etcd before it exits; 0: without limit", ge=0, le=3_600_000)
    ] = 30_000
    username: Annotated[str, key("etcd user, if etcd requires authentication; empty: none", max_length=200)] = ""
    password_file: Annotated[str, key("Path of a file that contains the password of username and nothing else")] = ""
    tls: ClientTlsSection = ClientTlsSection()

    def __post_init__(self) -> None:
        if bool(self.username) != bool(self.password_file):
            raise ValueError("username and password_file belong together")
        if self.lease_margin_ms * 2 > self.lease_ttl_ms:
            raise ValueError("lease_margin_ms must be at most half of lease_ttl_ms")
        for endpoint in self.endpoints:
            try:
                parse_address(endpoint)
            except ValueError as error:
                raise ValueError(f"endpoints: {error}") from None

    @property
    def ttl_s(self) -> float:
        return self.lease_ttl_ms / 1000

    @property
    def margin_s(self) -> float:
        return self.lease_margin_ms / 1000 or default_margin_s(self.ttl_s)


class LogSection(Section, frozen=True, kw_only=True):
    level: Annotated[Literal["debug", "info", "warning", "error"], key("The lowest severity that is logged")] = "info"
    format: Annotated[
        Literal["auto", "json", "console"],
        key("json: one object per line; console: text; auto: console on a terminal, otherwise json"),
    ] = "auto"


class HttpSection(Section, frozen=True, kw_only=True):
    """/metrics, /healthz, /readyz."""

    host: Host = "127.0.0.1"
    port: Port = 0
    enabled: Annotated[bool, key("Serve /metrics, /healthz and /readyz")] = True


class GrpcSection(Section, frozen=True, kw_only=True):
    host: Host = "127.0.0.1"
    port: Port = 0
    advertise: Annotated[str, key("host:port that other processes connect to; empty: the address that is listened on")] = ""
