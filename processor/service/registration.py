"""The registration of a processor in etcd: a key under a lease, and a callback before that lease can have expired.

    /tablewire/<cluster>/captures/<capture_id> = CaptureRecord

While `is_valid()` is True, the owner cannot have given this capture up. Once it is False, another processor may write the same
tables, so every effect outside the process asks it immediately before (see `tablewire.etcd.lease`). After a loss the capture id
is spent: a new registration needs a new id, under which nothing of the former one continues.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import msgspec
import structlog

from tablewire.errors import ClosedError, EtcdError, OperatingError
from tablewire.etcd import keys as etcd_keys
from tablewire.etcd.lease import LeaseKeeper
from tablewire.etcd.records import CaptureRecord, encode
from tablewire.etcd.session import EtcdSession
from tablewire.etcd.values import PrefixState, Put, is_absent, is_unchanged
from tablewire.etcd.watch import PrefixWatch
from tablewire.model.states import LivenessState
from tablewire.runtime.shutdown import run_thread

CLOSE_TIMEOUT_S = 5.0

_log = structlog.get_logger("processor.registration")


class Registration:
    """One capture id, registered once. All methods: any thread.

    on_lost(reason) is called once, on the thread "lease" or "watch capture", when the lease is in doubt: at least margin_s before
    etcd can let it expire, or as soon as the key is seen deleted (the owner gave this capture up). It must stop all effects
    before it returns, or make sure that they ask `is_valid` first. It is never called after `deregister`.
    """

    def __init__(
        self,
        session: EtcdSession,
        cluster: str,
        record: CaptureRecord,
        *,
        ttl_s: float,
        on_lost: Callable[[str], None],
        margin_s: float | None = None,
    ) -> None:
        self._session, self._record = session, record
        self._ttl_s, self._margin_s, self._on_lost = ttl_s, margin_s, on_lost
        self._key = etcd_keys.capture_key(cluster, record.id)
        self._lock = threading.Lock()
        self._keeper: LeaseKeeper | None = None
        self._watch: PrefixWatch | None = None
        self._thread: threading.Thread | None = None
        self._revision = self._mod_revision = 0
        self._deregistered = False

    @property
    def capture_id(self) -> str:
        return self._record.id

    @property
    def lease_id(self) -> int:
        """0 before `start`."""
        return self._keeper.lease_id if self._keeper is not None else 0

    @property
    def lost_reason(self) -> str:
        """Why the registration is lost; empty while it is not."""
        return self._keeper.lost_reason if self._keeper is not None else ""

    def deadline(self) -> float:
        """Return the time of `tablewire.etcd.lease.lease_clock` until which effects are allowed; the past if they are not."""
        return self._keeper.deadline() if self._keeper is not None else float("-inf")

    def is_valid(self) -> bool:
        """Return whether an effect is allowed at this moment. Cheap; ask immediately before each."""
        return self._keeper is not None and self._keeper.is_valid()

    def start(self) -> None:
        """Register. EtcdError: etcd did not answer, nothing is registered, retry on the same object. OperatingError: the id is
        taken."""
        if self._keeper is not None:
            raise ClosedError(f"capture {self.capture_id} was registered before: a new registration needs a new id")
        keeper = LeaseKeeper(self._session, ttl_s=self._ttl_s, margin_s=self._margin_s, on_lost=self._lost)
        try:
            result = self._session.put_if(is_absent(self._key), self._key, encode(self._record), lease=keeper.lease_id)
            if not result.applied:
                raise OperatingError(f"capture {self.capture_id} is registered already ({self._key})")
        except OperatingError:
            self._end(keeper)
            raise
        self._keeper = keeper
        self._revision = self._mod_revision = result.revision
        # Without signs of life: if etcd does not answer, the lease ends this registration first.
        self._watch = self._session.watch_prefix(self._key, self._key_changed, name="watch capture", progress_interval_s=None)
        self._thread = run_thread("lease", keeper.run)
        _log.info("registered", capture=self.capture_id, address=self._record.address, lease=f"{keeper.lease_id:016x}")

    def update_liveness(self, liveness: LivenessState) -> None:
        """Write the liveness into the record. EtcdError: etcd did not answer, retry. ClosedError: this registration is lost or
        over."""
        with self._lock:
            keeper = self._keeper
            if keeper is None or not keeper.is_valid():
                raise ClosedError(f"capture {self.capture_id} is not registered: {self.lost_reason or 'not started or over'}")
            if self._record.liveness is liveness:
                return
            record = msgspec.structs.replace(self._record, liveness=liveness)
            put = Put(self._key, encode(record), keeper.lease_id)
            result = self._session.transact([is_unchanged(self._key, self._mod_revision)], [put])
            if result.applied:
                self._record, self._mod_revision = record, result.revision
                return
            found = result.found.get(self._key)
            if found is not None and found.create_revision == self._revision:
                # An earlier attempt that seemed to have failed; nothing else may write this key.
                self._mod_revision = found.mod_revision
                raise EtcdError(f"etcd: {self._key} was changed meanwhile: try again")
        keeper.lose("the capture key is gone")
        raise ClosedError(f"capture {self.capture_id} is not registered: {self.lost_reason}")

    def deregister(self) -> None:
        """Delete the key at once. Idempotent, never raises: without etcd the lease expires by itself."""
        with self._lock:
            keeper, is_over = self._keeper, self._deregistered
            self._deregistered = keeper is not None
        if keeper is None or is_over:
            return
        self._end(keeper)
        if self._watch is not None:
            self._watch.close()
        if self._thread is not None and threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_TIMEOUT_S)

    def _end(self, keeper: LeaseKeeper) -> None:
        keeper.close()
        try:
            self._session.revoke(keeper.lease_id)
        except (EtcdError, ClosedError) as error:
            _log.warning("revoke_failed", capture=self.capture_id, reason=str(error))

    def _lost(self, reason: str) -> None:
        _log.error("registration_lost", capture=self.capture_id, reason=reason)
        self._on_lost(reason)

    def _key_changed(self, state: PrefixState) -> None:
        keeper = self._keeper
        if keeper is None or state.revision < self._revision:
            return
        found = state.entries.get(self._key)
        if found is None or found.create_revision != self._revision:
            keeper.lose("the capture key was deleted: the owner gave this capture up")
