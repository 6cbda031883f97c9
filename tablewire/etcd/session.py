"""One session with an etcd cluster: reads, guarded writes, leases and watches, with failover between endpoints.

Nothing of `etcd3` or gRPC leaves the etcd modules of this package: values are ours, and every failure is an EtcdError. We use
etcd3's generated stubs and not its MultiEndpointEtcd3Client, because that keeps its failover state and its stubs without a
lock (a late error of one thread marks the member that another thread has just moved to as failed), waits by the wall clock,
and ends a watch with one call of a callback.

Failover: all calls go to one member until it fails; then to the next one. A **read** that fails is tried again on another
member. A **write** is tried again only when its own compares make a repetition harmless: each key that it writes is pinned to
the revision (or absence) that it had before. When the repetition then finds its keys changed, they are read in the same
transaction: if all of them hold just what this write says, written together, the first attempt had been applied.

Every call is bounded: `request_timeout_ms` an attempt, two attempts at least, all attempts within twice that time.
Any thread may use a session; `close` ends its watches.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

import etcd3.etcdrpc as rpc
import grpc

from tablewire.errors import ClosedError, EtcdError
from tablewire.etcd.login import NO_TOKEN, Login, Metadata, is_refused_token
from tablewire.etcd.values import (
    CompactedError,
    Compare,
    CompareTarget,
    Credentials,
    EtcdUnavailableError,
    KeyValue,
    LeaseLostError,
    PrefixState,
    Put,
    Transaction,
    compare_message,
    delete_message,
    get_message,
    is_absent,
    is_created_at,
    is_repeatable,
    is_unchanged,
    key_value,
    prefix_end,
    put_message,
    revision_if_applied,
    to_bytes,
)
from tablewire.etcd.watch import PrefixWatch

__all__ = [
    "CompactedError",
    "Compare",
    "CompareTarget",
    "Credentials",
    "EtcdSession",
    "EtcdUnavailableError",
    "KeyValue",
    "LeaseLostError",
    "Login",
    "PrefixState",
    "PrefixWatch",
    "Put",
    "Transaction",
    "is_absent",
    "is_created_at",
    "is_unchanged",
]

REQUEST_TIMEOUT_MS = 2_000
ATTEMPTS_MIN = 2
MESSAGE_BYTES_MAX = 64 * 1024 * 1024
SHOWN_KEYS_MAX = 3

REQUIRE_LEADER = ("hasleader", "true")
"""A member that has lost its quorum ends such a stream instead of leaving it open and mute."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # A member that comes back is used at once, not after gRPC's default backoff of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # etcd refuses clients that ping more often than every 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.enable_http_proxy", 0),
)

_T = TypeVar("_T")


class EtcdSession:
    """See the module's docstring. endpoints: host:port each. credentials None: plain text; else they are asked for again
    whenever a connection has failed, so that the next one is made with those of then. login: who we are to etcd, None: nobody."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        request_timeout_ms: int = REQUEST_TIMEOUT_MS,
        credentials: Callable[[], Credentials] | None = None,
        login: Login | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not endpoints:
            raise ValueError("an etcd session needs at least one endpoint")
        self.endpoints = tuple(endpoints)
        self.request_timeout_s = request_timeout_ms / 1000
        self._clock = clock
        self._members = [_Member(endpoint, credentials) for endpoint in self.endpoints]
        self._login = login
        self._lock = threading.Lock()
        self._current = 0
        self._watches: list[PrefixWatch] = []
        self._closed = False

    # -- reads

    def get(self, key: str) -> KeyValue | None:
        """The key now (linearizable), None when it does not exist."""
        request = rpc.RangeRequest(key=to_bytes(key))
        answer = self._read(f"get {key}", lambda member, timeout, who: member.kv.Range(request, timeout, who))
        return key_value(answer.kvs[0]) if answer.kvs else None

    def get_prefix(self, prefix: str) -> tuple[list[KeyValue], int]:
        """All keys that start with the prefix, by key, and the revision at which all of them stood so (linearizable)."""
        request = rpc.RangeRequest(key=to_bytes(prefix), range_end=prefix_end(prefix))
        answer = self._read(f"get {prefix}*", lambda member, timeout, who: member.kv.Range(request, timeout, who))
        return [key_value(found) for found in answer.kvs], answer.header.revision

    # -- writes

    def transact(
        self,
        compares: Sequence[Compare],
        puts: Sequence[Put] = (),
        deletes: Sequence[str] = (),
        *,
        read_on_failure: Sequence[str] = (),
    ) -> Transaction:
        """Puts and deletes everything if all compares hold, and nothing otherwise.

        EtcdUnavailableError: nobody knows whether it was applied (read again); it never is a half of it.
        """
        written = [put.key for put in puts] + list(deletes)
        request = rpc.TxnRequest(
            compare=[compare_message(compare) for compare in compares],
            success=[put_message(put) for put in puts] + [delete_message(key) for key in deletes],
            failure=[get_message(key) for key in dict.fromkeys([*read_on_failure, *written])],
        )
        what = f"write {', '.join(written[:SHOWN_KEYS_MAX])}{' ...' if len(written) > SHOWN_KEYS_MAX else ''}"
        attempts = max(ATTEMPTS_MIN, len(self._members)) if is_repeatable(compares, written) else 1
        answer, attempt = self._call(what, lambda member, timeout, who: member.kv.Txn(request, timeout, who), attempts)
        revision = answer.header.revision
        if answer.succeeded:
            return Transaction(True, revision)
        kvs = [key_value(found) for response in answer.responses for found in response.response_range.kvs]
        found = {item.key: item for item in kvs}
        mine = revision_if_applied(found, puts, deletes) if attempt > 1 else 0
        if mine:
            return Transaction(True, mine)
        return Transaction(False, revision, MappingProxyType(found))

    def put_if(self, compare: Compare, key: str, value: bytes, *, lease: int = 0) -> Transaction:
        """Puts one key if the compare holds."""
        return self.transact([compare], [Put(key, value, lease)])

    def put(self, key: str, value: bytes, *, lease: int = 0) -> int:
        """Puts without any guard (tools and tests); its revision."""
        return self.transact([], [Put(key, value, lease)]).revision

    def delete(self, key: str) -> None:
        """Deletes without any guard (tools and tests)."""
        self.transact([], deletes=[key])

    # -- leases

    def grant(self, ttl_s: int) -> tuple[int, int]:
        """A new lease: its id and the TTL in seconds that etcd chose, which may be longer than asked for.

        Tried on other members too: a lease that was granted without our knowing it holds no key and just expires.
        """
        request = rpc.LeaseGrantRequest(TTL=ttl_s)
        answer = self._read("grant a lease", lambda member, timeout, who: member.lease.LeaseGrant(request, timeout, who))
        if answer.error:
            raise EtcdError(f"etcd did not grant a lease: {answer.error}")
        return answer.ID, answer.TTL

    def keep_alive_once(self, lease_id: int, *, timeout_s: float | None = None) -> int:
        """Renews the lease; its TTL in seconds from when etcd did so. LeaseLostError when it does not exist.

        One attempt, on one member; the next call goes to another one if this failed. timeout_s: at most this long.
        """
        bound_s = self.request_timeout_s if timeout_s is None else min(timeout_s, self.request_timeout_s)

        def keep_alive(member: _Member, timeout: float, who: Metadata) -> Any:
            request = rpc.LeaseKeepAliveRequest(ID=lease_id)
            call = member.lease.LeaseKeepAlive(iter((request,)), timeout, (REQUIRE_LEADER, *who))
            try:
                return next(call, None)
            finally:
                call.cancel()

        answer, _ = self._call("keep a lease alive", keep_alive, 1, bound_s)
        if answer is None:
            raise EtcdUnavailableError("etcd: keep a lease alive: the member closed the stream without an answer")
        if answer.TTL <= 0:
            raise LeaseLostError(f"etcd lease {lease_id:016x} has expired or was revoked")
        return int(answer.TTL)

    def revoke(self, lease_id: int) -> None:
        """Ends the lease and deletes its keys. One that does not exist (any more) is fine."""
        request = rpc.LeaseRevokeRequest(ID=lease_id)
        try:
            self._read("revoke a lease", lambda member, timeout, who: member.lease.LeaseRevoke(request, timeout, who))
        except LeaseLostError:
            return

    # -- watches, lifetime

    def watch_prefix(
        self, prefix: str, on_change: Callable[[PrefixState], None] | None = None, *, name: str = "watch"
    ) -> PrefixWatch:
        """Keeps the whole state of a prefix, and hands it over whenever it changed; see `etcd_watch.PrefixWatch`."""
        with self._lock:
            if self._closed:
                raise ClosedError("the etcd session is closed")
            watch = PrefixWatch(self, prefix, on_change, name=name)
            self._watches.append(watch)
        return watch

    def close(self) -> None:
        """Ends all watches and connections. Idempotent; later calls raise ClosedError."""
        with self._lock:
            self._closed = True
            watches, self._watches = self._watches, []
        for watch in watches:
            watch.close()
        for member in self._members:
            member.close()

    # -- for etcd_watch

    def compact(self, revision: int) -> None:
        """Forgets all history before the revision (tools and tests)."""
        request = rpc.CompactionRequest(revision=revision)
        self._read("compact", lambda member, timeout, who: member.kv.Compact(request, timeout, who))

    def pick(self) -> _Member:
        """The member in use now."""
        with self._lock:
            if self._closed:
                raise ClosedError("the etcd session is closed")
            return self._members[self._current]

    def failed(self, member: _Member) -> None:
        """Moves on from this member, unless another thread has already done so; its next connection is made with the credentials
        of now."""
        with self._lock:
            if self._closed:
                return
            member.renew()
            if self._members[self._current] is member:
                self._current = (self._current + 1) % len(self._members)

    def who(self) -> Metadata:
        """What tells etcd who we are. EtcdError: it did not let us log in."""
        if self._login is None:
            return NO_TOKEN

        def authenticate(username: str, password: str) -> str:
            # One thread at a time comes here: the next one must not wait for the same frozen member.
            member, request = self.pick(), rpc.AuthenticateRequest(name=username, password=password)
            try:
                return str(member.auth.Authenticate(request, self.request_timeout_s).token)
            except (grpc.RpcError, ValueError) as error:
                failure = self.explain(f"log in as {username}", member, error)
                if isinstance(failure, EtcdUnavailableError):
                    self.failed(member)
                raise failure from error

        return self._login.metadata(authenticate)

    def forget_refused(self, who: Metadata, text: str) -> bool:
        """Whether what etcd refuses may be due to the token that went along, which is not used again then."""
        if self._login is None or not is_refused_token(text):
            return False
        self._login.forget(who)
        return True

    def forget(self, watch: PrefixWatch) -> None:
        with self._lock:
            if watch in self._watches:
                self._watches.remove(watch)

    # -- calls

    def _read(self, what: str, call: _CallMember[_T]) -> _T:
        return self._call(what, call, max(ATTEMPTS_MIN, len(self._members)))[0]

    def _call(self, what: str, call: _CallMember[_T], attempts: int, timeout_s: float | None = None) -> tuple[_T, int]:
        """The answer and the number of the attempt that got it."""
        timeout_s = self.request_timeout_s if timeout_s is None else timeout_s
        deadline = self._clock() + 2 * timeout_s
        attempt, logins = 0, 0
        while True:
            attempt += 1
            try:
                who = self.who()
            except EtcdUnavailableError:  # nothing was asked yet, and the next login goes to another member
                if attempt >= attempts or self._clock() >= deadline:
                    raise
                continue
            member = self.pick()
            try:
                return call(member, min(timeout_s, max(0.001, deadline - self._clock())), who), attempt
            except (grpc.RpcError, ValueError) as error:
                failure = self.explain(what, member, error)
                if self.forget_refused(who, str(failure)) and not logins:
                    attempt, logins = attempt - 1, 1  # nothing was applied: once more as whoever we are now
                    continue
                if not isinstance(failure, EtcdUnavailableError):
                    raise failure from error
                self.failed(member)
                if attempt >= attempts or self._clock() >= deadline:
                    raise failure from error

    def explain(self, what: str, member: _Member, error: Exception) -> EtcdError | ClosedError:
        """gRPC's error as ours, with what was tried and where."""
        where = f"etcd {member.endpoint}: {what}"
        if not isinstance(error, grpc.RpcError):
            if self._closed:
                return ClosedError("the etcd session is closed")
            return EtcdError(f"{where}: {error}")  # a value that no request can carry
        code, details = error.code(), error.details() or "no details"
        if code in _UNAVAILABLE:
            if self._closed:
                return ClosedError("the etcd session is closed")
            reason = "no answer in time" if code is grpc.StatusCode.DEADLINE_EXCEEDED else details
            return EtcdUnavailableError(f"{where}: {reason}")
        if code is grpc.StatusCode.NOT_FOUND and "lease" in details:
            return LeaseLostError(f"{where}: {details}")
        if code is grpc.StatusCode.OUT_OF_RANGE and "compacted" in details:
            return CompactedError(f"{where}: {details}")
        return EtcdError(f"{where}: {code.name}: {details}")


class _Member:
    """One endpoint and its stubs. A gRPC channel connects when it is first used and again by itself."""

    def __init__(self, endpoint: str, credentials: Callable[[], Credentials] | None) -> None:
        self.endpoint = endpoint
        self._provide = credentials
        self._used = credentials() if credentials is not None else None
        self._retired: Any = None
        self._open()

    def renew(self) -> None:
        """A new channel if the credentials have changed since this one was opened. What is under way on the former one may end
        there; it is closed with the next renewal."""
        now = self._provide() if self._provide is not None else None
        if now == self._used:
            return
        if self._retired is not None:
            self._retired.close()
        self._retired, self._used = self.channel, now
        self._open()

    def close(self) -> None:
        self.channel.close()
        if self._retired is not None:
            self._retired.close()

    def _open(self) -> None:
        if self._used is None:
            self.channel = grpc.insecure_channel(self.endpoint, options=CHANNEL_OPTIONS)
        else:
            tls = grpc.ssl_channel_credentials(self._used.root, self._used.key, self._used.chain)
            self.channel = grpc.secure_channel(self.endpoint, tls, options=CHANNEL_OPTIONS)
        self.kv = rpc.KVStub(self.channel)
        self.lease = rpc.LeaseStub(self.channel)
        self.watch = rpc.WatchStub(self.channel)
        self.auth = rpc.AuthStub(self.channel)


_CallMember: TypeAlias = Callable[[_Member, float, Metadata], _T]
"""One attempt: (member, timeout in seconds, what tells it who we are) -> its answer."""

_UNAVAILABLE = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.ABORTED,
    }
)
