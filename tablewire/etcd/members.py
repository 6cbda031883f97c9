"""The members of an etcd cluster: failover between them, and how one request is sent.

All requests go to one member until it fails, then to the next. We use etcd3's generated stubs
instead of its MultiEndpointEtcd3Client, which keeps its failover state without a lock (a late error
of one thread marks the member that another thread has just chosen as failed) and waits by the wall
clock. Any thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import etcd3.etcdrpc as rpc
import grpc
from grpc.experimental import ChannelOptions

from tablewire.errors import ClosedError, EtcdError
from tablewire.etcd.login import NO_TOKEN, Login, Metadata, is_token_refusal
from tablewire.etcd.values import CompactedError, EtcdUnavailableError, LeaseLostError
from tablewire.runtime.tls import PemTexts

ATTEMPTS_MIN = 2
MESSAGE_BYTES_MAX = 64 * 1024 * 1024
REQUIRE_LEADER = ("hasleader", "true")
"""Metadata that makes a member without a quorum end a stream, which would otherwise stay silent."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # A member that is back is used at once, not after gRPC's default backoff of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # etcd refuses clients that ping more often than every 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.bdp_probe", 0),
    (ChannelOptions.SingleThreadedUnaryStream, 1),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.enable_http_proxy", 0),
)

_UNAVAILABLE = frozenset(
    getattr(grpc.StatusCode, name) for name in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL", "UNKNOWN", "CANCELLED", "ABORTED")
)

_T = TypeVar("_T")


class Member:
    """One endpoint and its stubs. The channel connects at its first use, and reconnects by itself."""

    def __init__(self, endpoint: str, pem: Callable[[], PemTexts] | None) -> None:
        self.endpoint = endpoint
        self._provide_pem = pem
        self._pem = pem() if pem is not None else None
        self._retired: Any = None
        self._open()

    def renew(self) -> None:
        """Open a new channel if the TLS files have changed; close the previous one at the next call."""
        pem = self._provide_pem() if self._provide_pem is not None else None
        if pem == self._pem:
            return
        if self._retired is not None:
            self._retired.close()
        self._retired, self._pem = self.channel, pem
        self._open()

    def close(self) -> None:
        self.channel.close()
        if self._retired is not None:
            self._retired.close()

    def keep_alive(self, request: Any, timeout_s: float, metadata: Metadata) -> Any:
        """Renew a lease once. A member without a quorum refuses at once, so that the next one is tried in time."""
        return self._keep_alive(request, timeout_s, (REQUIRE_LEADER, *metadata))

    def _open(self) -> None:
        if self._pem is None:
            self.channel = grpc.insecure_channel(self.endpoint, options=CHANNEL_OPTIONS)
        else:
            credentials = grpc.ssl_channel_credentials(self._pem.root, self._pem.key, self._pem.chain)
            self.channel = grpc.secure_channel(self.endpoint, credentials, options=CHANNEL_OPTIONS)
        self.kv = rpc.KVStub(self.channel)
        self.lease = rpc.LeaseStub(self.channel)
        # A stream of one message for etcd, and a unary call here, which needs no thread.
        self._keep_alive = self.channel.unary_unary(
            "/etcdserverpb.Lease/LeaseKeepAlive",
            request_serializer=rpc.LeaseKeepAliveRequest.SerializeToString,
            response_deserializer=rpc.LeaseKeepAliveResponse.FromString,
        )
        self.watch = rpc.WatchStub(self.channel)
        # A watch that sends nothing but its first request, and waits without a thread of gRPC.
        self.watch_silently = self.channel.unary_stream(
            "/etcdserverpb.Watch/Watch",
            request_serializer=rpc.WatchRequest.SerializeToString,
            response_deserializer=rpc.WatchResponse.FromString,
        )
        self.auth = rpc.AuthStub(self.channel)


Method: TypeAlias = Callable[[Member], Callable[[Any, float, Metadata], _T]]
"""Picks the method of a member: (request, timeout in seconds, metadata) -> response."""


class Members:
    """The members, of which one is in use. Arguments: see `EtcdSession`."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        request_timeout_ms: int,
        pem: Callable[[], PemTexts] | None,
        login: Login | None,
    ) -> None:
        if not endpoints:
            raise ValueError("an etcd session needs at least one endpoint")
        self.request_timeout_s = request_timeout_ms / 1000
        self.attempts = max(ATTEMPTS_MIN, len(endpoints))
        """How many attempts a request gets that may be repeated."""
        self._members = [Member(endpoint, pem) for endpoint in endpoints]
        self._login = login
        self._lock = threading.Lock()
        self._current = 0
        self._is_closed = False

    def repeat(self, what: str, method: Method[_T], request: Any) -> _T:
        """Send a request that may be applied twice. what: for the text of an error."""
        return self.call(what, method, request, self.attempts)[0]

    def call(self, what: str, method: Method[_T], request: Any, attempts: int, timeout_s: float | None = None) -> tuple[_T, int]:
        """Return the response, and the number of the attempt that got it.

        timeout_s: of one attempt; all attempts together take at most twice as long.
        """
        timeout_s = self.request_timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + 2 * timeout_s
        made, has_logged_in = 0, False
        while True:
            made += 1
            is_last = made >= attempts
            try:
                metadata = self.metadata()
            except EtcdUnavailableError:  # nothing was sent yet, and the next login goes to another member
                if is_last or time.monotonic() >= deadline:
                    raise
                continue
            member = self.pick()
            try:
                return method(member)(request, min(timeout_s, max(0.001, deadline - time.monotonic())), metadata), made
            except (grpc.RpcError, ValueError) as error:
                failure = self.explain(what, member, error)
                if self.forget_token(metadata, str(failure)) and not has_logged_in:
                    made, has_logged_in = made - 1, True  # nothing was applied: send it again with a new token
                    continue
                if not isinstance(failure, EtcdUnavailableError):
                    raise failure from error
                self.fail_over(member)
                if is_last or time.monotonic() >= deadline:
                    raise failure from error

    def pick(self) -> Member:
        """Return the member in use."""
        with self._lock:
            self.require_open()
            return self._members[self._current]

    def fail_over(self, failed: Member) -> None:
        """Use the next member, unless another thread already does, and renew the failed one."""
        with self._lock:
            if self._is_closed:
                return
            failed.renew()
            if self._members[self._current] is failed:
                self._current = (self._current + 1) % len(self._members)

    def metadata(self) -> Metadata:
        """Return the token of the user, if one is configured. Raise EtcdError if the login fails."""
        return NO_TOKEN if self._login is None else self._login.metadata(self._authenticate)

    def forget_token(self, used: Metadata, text: str) -> bool:
        """Return whether a new token may help after an error with this text, and drop the old one."""
        if self._login is None or not is_token_refusal(text):
            return False
        self._login.forget(used)
        return True

    def explain(self, what: str, member: Member, error: Exception) -> EtcdError | ClosedError:
        """Translate an error of gRPC; its text says what was tried and where."""
        where = f"etcd {member.endpoint}: {what}"
        code, details = (error.code(), error.details() or "no details") if isinstance(error, grpc.RpcError) else (None, "")
        if self._is_closed and (code is None or code in _UNAVAILABLE):
            return ClosedError("the etcd session is closed")
        if code is None:
            return EtcdError(f"{where}: {error}")  # a value that no request can carry
        if code in _UNAVAILABLE:
            reason = "no answer in time" if code is grpc.StatusCode.DEADLINE_EXCEEDED else details
            return EtcdUnavailableError(f"{where}: {reason}")
        if code is grpc.StatusCode.NOT_FOUND and "lease" in details:
            return LeaseLostError(f"{where}: {details}")
        if code is grpc.StatusCode.OUT_OF_RANGE and "compacted" in details:
            return CompactedError(f"{where}: {details}")
        return EtcdError(f"{where}: {code.name}: {details}")

    def require_open(self) -> None:
        if self._is_closed:
            raise ClosedError("the etcd session is closed")

    def close(self) -> None:
        """End all connections; requests that are running fail with ClosedError."""
        with self._lock:
            self._is_closed = True
        for member in self._members:
            member.close()

    def _authenticate(self, username: str, password: str) -> str:
        # One thread at a time comes here: the next one must not wait for the same frozen member.
        member, request = self.pick(), rpc.AuthenticateRequest(name=username, password=password)
        try:
            return str(member.auth.Authenticate(request, self.request_timeout_s).token)
        except (grpc.RpcError, ValueError) as error:
            failure = self.explain(f"log in as {username}", member, error)
            if isinstance(failure, EtcdUnavailableError):
                self.fail_over(member)
            raise failure from error
