"""A session with an etcd cluster: reads, guarded writes, leases and watches.

No type of `etcd3` or gRPC leaves tablewire/etcd, and every failure is an EtcdError. Each attempt at
a request takes at most `request_timeout_ms`, all attempts together twice that.

A **read** that fails is repeated on another member. A **write** is repeated only if it cannot be
applied twice: each key that it writes must be compared with the revision (or absence) that it had
before. If the repetition then finds its keys changed, they are read in the same transaction; when
all of them hold what this write says, written together, the first attempt was applied.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import etcd3.etcdrpc as rpc

from tablewire.errors import EtcdError
from tablewire.etcd.login import Login, etcd_login
from tablewire.etcd.members import Members
from tablewire.etcd.values import (
    Compare,
    KeyValue,
    LeaseLostError,
    Put,
    TransactionResult,
    compare_message,
    delete_message,
    get_message,
    is_repeatable,
    key_value,
    put_message,
    revision_if_applied,
    to_bytes,
)
from tablewire.etcd.watch import PROGRESS_INTERVAL_S, OnChange, PrefixWatch, WatchThread, read_prefix
from tablewire.runtime.sections import ClientTlsSection, EtcdSection
from tablewire.runtime.tls import PemFiles, PemTexts

REQUEST_TIMEOUT_MS = 2_000
SHOWN_KEYS_MAX = 3


def etcd_credentials(section: ClientTlsSection) -> Callable[[], PemTexts] | None:
    """Return what reads the TLS files, for `EtcdSession`; None for plain text."""
    return PemFiles(section, "etcd.tls").current if section.enabled else None


def open_session(section: EtcdSection) -> EtcdSession:
    """Return a session as configured. Raise ConfigError if a file cannot be used."""
    return EtcdSession(
        section.endpoints,
        request_timeout_ms=section.request_timeout_ms,
        credentials=etcd_credentials(section.tls),
        login=etcd_login(section),
    )


class EtcdSession:
    """See the module. Any thread.

    endpoints: host:port each. credentials: called again whenever a connection has failed; None for
    plain text.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        request_timeout_ms: int = REQUEST_TIMEOUT_MS,
        credentials: Callable[[], PemTexts] | None = None,
        login: Login | None = None,
    ) -> None:
        self.endpoints = tuple(endpoints)
        self.members = Members(endpoints, request_timeout_ms=request_timeout_ms, pem=credentials, login=login)
        self._lock = threading.Lock()
        self._watches: weakref.WeakSet[WatchThread] = weakref.WeakSet()

    # -- reads

    def get(self, key: str) -> KeyValue | None:
        """Read one key, linearizably; return None if it does not exist."""
        response = self.members.repeat(f"get {key}", lambda member: member.kv.Range, rpc.RangeRequest(key=to_bytes(key)))
        return key_value(response.kvs[0]) if response.kvs else None

    def get_prefix(self, prefix: str) -> tuple[list[KeyValue], int]:
        """Read all keys with this prefix, linearizably; return them in order, with the revision."""
        state = read_prefix(self.members, prefix)
        return list(state.entries.values()), state.revision

    # -- writes

    def transact(
        self,
        compares: Sequence[Compare],
        puts: Sequence[Put] = (),
        deletes: Sequence[str] = (),
        *,
        read_on_failure: Sequence[str] = (),
    ) -> TransactionResult:
        """Apply all puts and deletes if all compares hold, and none otherwise.

        Raise EtcdUnavailableError if it is unknown whether they were applied; they never are in part.
        """
        written = [put.key for put in puts] + list(deletes)
        request = rpc.TxnRequest(
            compare=[compare_message(compare) for compare in compares],
            success=[put_message(put) for put in puts] + [delete_message(key) for key in deletes],
            failure=[get_message(key) for key in dict.fromkeys([*read_on_failure, *written])],
        )
        what = f"write {', '.join(written[:SHOWN_KEYS_MAX])}{' ...' if len(written) > SHOWN_KEYS_MAX else ''}"
        attempts = self.members.attempts if is_repeatable(compares, written) else 1
        response, attempt = self.members.call(what, lambda member: member.kv.Txn, request, attempts)
        revision = response.header.revision
        if response.succeeded:
            return TransactionResult(True, revision)
        kvs = [key_value(found) for answer in response.responses for found in answer.response_range.kvs]
        found = {item.key: item for item in kvs}
        if attempt > 1 and (applied_at := revision_if_applied(found, puts, deletes)):
            return TransactionResult(True, applied_at)
        return TransactionResult(False, revision, MappingProxyType(found))

    def put_if(self, compare: Compare, key: str, value: bytes, *, lease: int = 0) -> TransactionResult:
        """Put one key if the compare holds."""
        return self.transact([compare], [Put(key, value, lease)])

    def put(self, key: str, value: bytes, *, lease: int = 0) -> int:
        """Put one key without a compare (for tools and tests); return its revision."""
        return self.transact([], [Put(key, value, lease)]).revision

    def delete(self, key: str) -> None:
        """Delete one key without a compare (for tools and tests)."""
        self.transact([], deletes=[key])

    # -- leases

    def grant(self, ttl_s: int) -> tuple[int, int]:
        """Grant a lease; return its id and its TTL in seconds, which may be longer than ttl_s.

        This may be repeated: a lease whose response was lost holds no key and expires.
        """
        request = rpc.LeaseGrantRequest(TTL=ttl_s)
        response = self.members.repeat("grant a lease", lambda member: member.lease.LeaseGrant, request)
        if response.error:
            raise EtcdError(f"etcd did not grant a lease: {response.error}")
        return response.ID, response.TTL

    def keep_alive_once(self, lease_id: int, *, timeout_s: float | None = None) -> int:
        """Renew the lease; return its TTL in seconds. Raise LeaseLostError if it does not exist.

        This is one attempt, on one member, of at most timeout_s; after a failure the next call uses
        another member.
        """
        request, most_s = rpc.LeaseKeepAliveRequest(ID=lease_id), self.members.request_timeout_s
        timeout_s = most_s if timeout_s is None else min(timeout_s, most_s)
        response, _ = self.members.call("keep a lease alive", lambda member: member.keep_alive, request, 1, timeout_s)
        if response.TTL <= 0:
            raise LeaseLostError(f"etcd lease {lease_id:016x} has expired or was revoked")
        return int(response.TTL)

    def revoke(self, lease_id: int) -> None:
        """End the lease and delete its keys. Do nothing if it no longer exists."""
        request = rpc.LeaseRevokeRequest(ID=lease_id)
        try:
            self.members.repeat("revoke a lease", lambda member: member.lease.LeaseRevoke, request)
        except LeaseLostError:
            return

    # -- watches

    def watch_prefix(
        self,
        prefix: str,
        on_change: OnChange | None = None,
        *,
        name: str = "watch",
        progress_interval_s: float | None = PROGRESS_INTERVAL_S,
    ) -> PrefixWatch:
        """Return a watch of all keys below the prefix; see `PrefixWatch` and `watch_prefixes`."""
        return self.watch_prefixes({prefix: on_change}, name=name, progress_interval_s=progress_interval_s)[0]

    def watch_prefixes(
        self, prefixes: Mapping[str, OnChange | None], *, name: str, progress_interval_s: float | None = PROGRESS_INTERVAL_S
    ) -> list[PrefixWatch]:
        """Return watches that share one stream and one thread, in the order of the prefixes.

        progress_interval_s: how often etcd is asked for a sign of life. Without one for three
        intervals the stream is replaced. None, for one prefix only: etcd is not asked, and only
        gRPC's keepalive finds out that a member does not answer (13 s); this costs the least.
        """
        with self._lock:
            self.members.require_open()
            thread = WatchThread(self.members, prefixes, name, progress_interval_s)
            self._watches.add(thread)
        return thread.watches

    def close(self) -> None:
        """End all watches and connections. Later calls raise ClosedError. Idempotent."""
        with self._lock:
            self.members.close()
            threads = list(self._watches)
        for thread in threads:
            thread.close()
