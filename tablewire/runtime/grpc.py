"""gRPC as both services use it: one set of limits and options, servers that listen, channels that come back, health, reflection.

Knows nothing of what is said over it: services are named by their full names. Everything here may be called from any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeAlias

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tablewire.errors import OperatingError
from tablewire.runtime.addresses import format_address

MAX_GRPC_MESSAGE_BYTES: Final = 64 * 1024 * 1024
"""Received or sent, request or answer; the codec refuses larger batches before gRPC does."""
MAX_GRPC_METADATA_BYTES: Final = 16 * 1024
KEEPALIVE_INTERVAL_MS: Final = 2_000
"""A client asks that often whether a silent connection is alive, so that one that a partition broke is not waited for."""
KEEPALIVE_TIMEOUT_MS: Final = 2_000
MIN_PING_INTERVAL_MS: Final = 1_000
"""What a server allows its clients; above, it would hang up on them."""
RECONNECT_MIN_MS: Final = 100
RECONNECT_MAX_MS: Final = 1_000
"""gRPC's own backoff between two attempts to connect: never longer, so that a peer that is back is used at once."""

GrpcOptions: TypeAlias = list[tuple[str, int]]

Renewed: TypeAlias = Callable[[], grpc.ChannelCredentials]
"""Credentials of now: another object once they have changed (`tls.renewed_channel_credentials`)."""

_SIZES: Final[GrpcOptions] = [
    ("grpc.max_receive_message_length", MAX_GRPC_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_GRPC_MESSAGE_BYTES),
    ("grpc.max_metadata_size", MAX_GRPC_METADATA_BYTES),
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
        # Each channel has its own connection and its own backoff; else a new process at a known address inherits the old one's.
        ("grpc.use_local_subchannel_pool", 1),
        # The protocol restates what was lost; a retry inside gRPC would be a second call in flight.
        ("grpc.enable_retries", 0),
        # Peers are reached directly, whatever proxy the environment names for the outside world.
        ("grpc.enable_http_proxy", 0),
    ]


def server_options() -> GrpcOptions:
    return [
        *_SIZES,
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", KEEPALIVE_INTERVAL_MS * 5),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS * 2),
        # Two processes on one port would each get half of the calls; the second one has to fail.
        ("grpc.so_reuseport", 0),
    ]


def open_channel(address: str, credentials: grpc.ChannelCredentials | None = None) -> grpc.Channel:
    """A channel to host:port that connects when it is first used; plain text without credentials. The caller closes it."""
    if credentials is None:
        return grpc.insecure_channel(address, options=channel_options())
    return grpc.secure_channel(address, credentials, options=channel_options())


class RenewedChannel:
    """A channel to one address, by one thread. A connection that stands goes on with the credentials it was made with; when it
    has failed and there are others by now, the next one is made with those."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | Renewed | None) -> None:
        self._address = address
        self._provide = credentials if callable(credentials) else None
        self._used = credentials() if callable(credentials) else credentials
        self.channel = open_channel(address, self._used)

    def renew(self) -> bool:
        """After a call has failed, and with none under way: whether `channel` is another one now."""
        now = self._provide() if self._provide is not None else self._used
        if now is self._used:
            return False
        self.channel.close()
        self.channel, self._used = open_channel(self._address, now), now
        return True

    def close(self) -> None:
        self.channel.close()


def new_server(
    *, max_workers: int, max_concurrent_rpcs: int, thread_name: str, interceptors: Sequence[grpc.ServerInterceptor] = ()
) -> grpc.Server:
    """A server that does not listen yet. Calls beyond max_concurrent_rpcs get RESOURCE_EXHAUSTED; those beyond max_workers
    wait for a thread. interceptors: see `tls.interceptors`."""
    return grpc.server(
        ThreadPoolExecutor(max_workers=max_workers, thread_name_prefix=thread_name),
        interceptors=interceptors,
        options=server_options(),
        maximum_concurrent_rpcs=max_concurrent_rpcs,
    )


def listen(server: grpc.Server, host: str, port: int, credentials: grpc.ServerCredentials | None = None) -> int:
    """Binds host:port (port 0: a free one) and returns the port. OperatingError when it cannot be had."""
    address = format_address(host, port)
    try:
        if credentials is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise OperatingError(f"cannot listen on {address}: {error}") from None
    if bound == 0:
        raise OperatingError(f"cannot listen on {address}")
    return int(bound)


class ServerHealth:
    """grpc.health.v1 for the whole server ("") and each of its services: all serving, or none."""

    def __init__(self, servicer: health.HealthServicer, services: Sequence[str]) -> None:
        self._servicer = servicer
        self._services = ("", *services)
        self.set_serving(False)

    def set_serving(self, is_serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in self._services:
            self._servicer.set(service, status)

    def leave(self) -> None:
        """Not serving, for good."""
        self._servicer.enter_graceful_shutdown()


def add_health_and_reflection(server: grpc.Server, services: Sequence[str]) -> ServerHealth:
    """Adds both to a server that has not started; not serving until `set_serving(True)`. services: full names."""
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return ServerHealth(servicer, services)
