"""gRPC: limits and options, servers, channels, health and reflection. Any thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeAlias

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tablewire.errors import OperatingError
from tablewire.runtime.addresses import format_address
from tablewire.wire.limits import MAX_MESSAGE_BYTES

MAX_GRPC_METADATA_BYTES: Final = 16 * 1024
KEEPALIVE_INTERVAL_MS: Final = 2_000
"""How often a client checks an idle connection, so that one which a partition broke is noticed."""
KEEPALIVE_TIMEOUT_MS: Final = 2_000
MIN_PING_INTERVAL_MS: Final = 1_000
"""A server closes the connection of a client that pings more often."""
RECONNECT_MIN_MS: Final = 100
RECONNECT_MAX_MS: Final = 1_000
"""The backoff between two attempts to connect; short, so that a peer that is back is used soon."""

GrpcOptions: TypeAlias = list[tuple[str, int]]

CredentialsProvider: TypeAlias = Callable[[], grpc.ChannelCredentials]
"""Returns the current credentials; they are another object once they have changed."""

_SIZES: Final[GrpcOptions] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", MAX_GRPC_METADATA_BYTES),
    ("grpc.http2.bdp_probe", 0),
]


def channel_options() -> GrpcOptions:
    return [
        *_SIZES,
        ("grpc.keepalive_time_ms", KEEPALIVE_INTERVAL_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", RECONNECT_MIN_MS),
        ("grpc.min_reconnect_backoff_ms", RECONNECT_MAX_MS),
        ("grpc.max_reconnect_backoff_ms", RECONNECT_MAX_MS),
        # Each channel has its own connection and backoff; otherwise a new process would inherit
        # those of the previous one at its address.
        ("grpc.use_local_subchannel_pool", 1),
        # The protocol restates what was lost; a retry inside gRPC would be a second call at the
        # same time.
        ("grpc.enable_retries", 0),
        # Peers are reached directly, whatever proxy the environment names.
        ("grpc.enable_http_proxy", 0),
    ]


def server_options() -> GrpcOptions:
    return [
        *_SIZES,
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", KEEPALIVE_INTERVAL_MS * 5),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS * 2),
        # The second process on a port must fail, instead of getting half of the calls.
        ("grpc.so_reuseport", 0),
    ]


def open_channel(address: str, credentials: grpc.ChannelCredentials | None = None) -> grpc.Channel:
    """Return a channel to host:port, which connects at its first use."""
    if credentials is None:
        return grpc.insecure_channel(address, options=channel_options())
    return grpc.secure_channel(address, credentials, options=channel_options())


class RenewedChannel:
    """A channel whose credentials are renewed when a connection has failed. Used by one thread."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | CredentialsProvider | None) -> None:
        self._address = address
        self._provide = credentials if callable(credentials) else None
        self._used = credentials() if callable(credentials) else credentials
        self.channel = open_channel(address, self._used)

    def renew(self) -> bool:
        """After a failed call, replace `channel` if there are new credentials; return whether."""
        current = self._provide() if self._provide is not None else self._used
        if current is self._used:
            return False
        self.channel.close()
        self.channel, self._used = open_channel(self._address, current), current
        return True

    def close(self) -> None:
        self.channel.close()


def new_server(
    *, max_workers: int, max_concurrent_rpcs: int, thread_name: str, interceptors: Sequence[grpc.ServerInterceptor] = ()
) -> grpc.Server:
    """Return a server that does not listen yet.

    Calls beyond max_concurrent_rpcs get RESOURCE_EXHAUSTED, those beyond max_workers wait for a thread.
    """
    return grpc.server(
        ThreadPoolExecutor(max_workers=max_workers, thread_name_prefix=thread_name),
        interceptors=interceptors,
        options=server_options(),
        maximum_concurrent_rpcs=max_concurrent_rpcs,
    )


def listen(server: grpc.Server, host: str, port: int, credentials: grpc.ServerCredentials | None = None) -> int:
    """Bind host:port (0: a free port) and return the port. Raise OperatingError if that fails."""
    address = format_address(host, port)
    try:
        bound = server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise OperatingError(f"cannot listen on {address}: {error}") from None
    if bound == 0:
        raise OperatingError(f"cannot listen on {address}")
    return int(bound)


class ServerHealth(health.HealthServicer):  # type: ignore[misc]
    """grpc.health.v1 of a server ("") and of each of its services, always the same for all."""

    def __init__(self, services: Sequence[str]) -> None:
        super().__init__()
        self._services = ("", *services)
        self.set_serving(False)

    def set_serving(self, is_serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in self._services:
            self.set(service, status)

    def leave(self) -> None:
        """Report NOT_SERVING from now on, whatever `set_serving` says."""
        self.enter_graceful_shutdown()


def add_health_and_reflection(server: grpc.Server, services: Sequence[str]) -> ServerHealth:
    """Add both to a server that has not started; it reports NOT_SERVING at first."""
    servicer = ServerHealth(services)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return servicer
