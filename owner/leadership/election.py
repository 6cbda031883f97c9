"""Leader election: each candidate has one key under a lease of its own; the key with the lowest
create revision leads.

    /tablewire/<cluster>/owner/<lease> = LeaderRecord       create revision = owner_revision, which grows with every election

A candidate that has lost its lease, resigned, or found its key deleted never leads again with that
revision: it takes a new lease, and so has a higher revision than all other candidates. This makes
owner_revision a fencing token.

Leadership ends with the first of three events: the local deadline of the lease passes
(`tablewire.etcd.lease`; before etcd can delete the key), the watch sees the key deleted, or a
guarded write finds the key gone. Call `leadership()` immediately before every effect; an earlier
result does not count.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import structlog

from tablewire.errors import ClosedError, ConflictError, EtcdError, NotLeaderError
from tablewire.etcd import keys as etcd_keys
from tablewire.etcd.lease import LeaseKeeper, lease_clock
from tablewire.etcd.record_reader import RecordReader
from tablewire.etcd.records import LeaderRecord, encode
from tablewire.etcd.session import EtcdSession
from tablewire.etcd.values import Compare, KeyValue, PrefixState, Put, is_absent, is_created_at
from tablewire.etcd.watch import PrefixWatch
from tablewire.runtime.backoff import Backoff
from tablewire.runtime.shutdown import run_thread

RETRY_MIN_S = 0.1
RETRY_MAX_S = 2.0
CLOSE_TIMEOUT_S = 5.0

_T = TypeVar("_T")

_log = structlog.get_logger("owner.election")


@dataclass(frozen=True, slots=True)
class Leadership:
    """revision: the create revision of our key, the owner_revision. deadline: the time of
    `lease_clock` (not of time.monotonic) until which we may act on it."""

    revision: int
    deadline: float

    def remaining_s(self) -> float:
        """Return the seconds until the deadline; negative once it has passed. Only a new
        `leadership()` has a later one."""
        return self.deadline - lease_clock()


@dataclass(frozen=True, slots=True)
class Candidacy:
    """A lease, the key that it holds, and the revision at which the key was created."""

    keeper: LeaseKeeper
    key: str
    revision: int


class Election:
    """One candidate, which campaigns on the thread "lease" from `start` to `close`. Any thread may
    call any method.

    address: host:port of this owner's admin API. on_change: called on an internal thread after
    leadership was won or lost, here or elsewhere; it must not block.
    """

    def __init__(
        self,
        session: EtcdSession,
        cluster: str,
        owner_id: str,
        address: str,
        *,
        ttl_s: float,
        version: str = "",
        margin_s: float | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.error = ""
        """Why this process is not a candidate at present; empty while it is."""
        self._session = session
        self._cluster = cluster
        self._record = LeaderRecord(id=owner_id, address=address, version=version)
        self._ttl_s = ttl_s
        self._margin_s = margin_s
        self._on_change = on_change
        self._condition = threading.Condition()
        self._candidacy: Candidacy | None = None
        self._watch: PrefixWatch | None = None
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self._reader = RecordReader(lambda reason: _log.warning("unreadable_candidate", reason=reason))

    # -- who leads

    def leadership(self) -> Leadership | None:
        """Return our leadership, if we lead at this moment."""
        candidacy, keys = self._candidacy, self._keys()
        if candidacy is None or not keys or (keys[0].key, keys[0].create_revision) != (candidacy.key, candidacy.revision):
            return None
        return Leadership(candidacy.revision, candidacy.keeper.deadline()) if candidacy.keeper.is_valid() else None

    def leader(self) -> LeaderRecord | None:
        """Return the leader as far as this process has heard from etcd; None if there is none or
        its record is unreadable."""
        keys = self._keys()
        return self._reader.read(LeaderRecord, keys[0]) if keys else None

    def candidates(self) -> list[LeaderRecord]:
        """Return all candidates, the leader first; unreadable records are left out."""
        return [record for key in self._keys() if (record := self._reader.read(LeaderRecord, key)) is not None]

    def wait_for_leadership(self, timeout_s: float) -> Leadership | None:
        """Return our leadership as soon as we lead; None after timeout_s."""
        return self._wait(self.leadership, timeout_s)

    # -- writes

    def guard(self) -> Compare:
        """Return the compare "my leader key still exists at my revision"; NotLeaderError if we do
        not lead."""
        candidacy = self._leading_candidacy()
        return is_created_at(candidacy.key, candidacy.revision)

    def guarded_write(self, puts: Sequence[Put], deletes: Sequence[str] = (), extra_compares: Sequence[Compare] = ()) -> int:
        """Write all of it if we still lead in etcd and the compares hold, otherwise nothing. Return
        the revision of the write, which is the mod_revision of every put.

        NotLeaderError: our key is gone, step down. ConflictError: we lead, but another compare
        failed: read again. EtcdUnavailableError: it is not known whether it was written. Compare
        each key by `is_unchanged` or `is_absent`: then the write is first repeated on another
        member, and a delayed first attempt cannot overwrite a later write.
        """
        candidacy = self._leading_candidacy()
        result = self._session.transact(
            [is_created_at(candidacy.key, candidacy.revision), *extra_compares],
            puts,
            deletes,
            read_on_failure=[candidacy.key, *(compare.key for compare in extra_compares)],
        )
        if result.applied:
            return result.revision
        mine = result.found.get(candidacy.key)
        if mine is None or mine.create_revision != candidacy.revision:
            candidacy.keeper.lose("a guarded write found the leader key gone")
            raise NotLeaderError(f"etcd: the leader key of {self._record.id} is gone: another owner leads or will lead")
        raise ConflictError(f"etcd: lost a race for {', '.join(compare.key for compare in extra_compares)}: read again")

    # -- lifetime

    def start(self, timeout_s: float | None = None) -> None:
        """Become a candidate. timeout_s: how long to wait for that; then close the election and
        raise EtcdError with the reason. None: do not wait, and retry without limit."""
        prefix = etcd_keys.owner_prefix(self._cluster)
        self._watch = self._session.watch_prefix(prefix, self._candidates_changed, name="watch owner")
        self._thread = run_thread("lease", self._campaign)
        if timeout_s is not None and self._wait(self._seen_candidacy, timeout_s) is None:
            reason = self.error or self._watch.error or "no answer"
            self.close()
            raise EtcdError(f"no election within {timeout_s:g} s: {reason}")

    def resign(self) -> None:
        """Give up leadership at once, and become the last candidate. Do nothing if this process is
        no candidate.

        EtcdError: we do not lead any longer, but the next owner has to wait until our lease
        expires.
        """
        with self._condition:
            candidacy, self._candidacy = self._candidacy, None
        if candidacy is None:
            return
        candidacy.keeper.close()
        _log.info("resigns", owner=self._record.id, owner_revision=candidacy.revision)
        self._changed()
        self._session.revoke(candidacy.keeper.lease_id)

    def close(self) -> None:
        """Resign and stop campaigning. Idempotent. Never raises: without etcd the lease expires."""
        self._closed.set()
        try:
            self.resign()
        except (EtcdError, ClosedError) as error:
            _log.warning("resign_failed", owner=self._record.id, reason=str(error))
        with self._condition:
            self._condition.notify_all()
        if self._watch is not None:
            self._watch.close()
        if self._thread is not None and threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_TIMEOUT_S)

    # -- the thread "lease"

    def _campaign(self) -> None:
        backoff = Backoff(RETRY_MIN_S, RETRY_MAX_S)
        while not self._closed.is_set():
            try:
                candidacy = self._enter()
            except ClosedError:
                return
            except EtcdError as error:
                self.error = str(error)
                if backoff.failures == 0:
                    _log.warning("campaign_failed", owner=self._record.id, reason=str(error))
                self._closed.wait(backoff.next_s())
                continue
            backoff.reset()
            self.error = ""
            self._check_key(candidacy)
            self._changed()
            candidacy.keeper.run()
            self._leave(candidacy)

    def _enter(self) -> Candidacy:
        """Take a new lease and create the key under it."""
        keeper = LeaseKeeper(self._session, ttl_s=self._ttl_s, margin_s=self._margin_s, on_lost=self._candidacy_lost)
        key = etcd_keys.owner_key(self._cluster, keeper.lease_id)
        try:
            result = self._session.put_if(is_absent(key), key, encode(self._record), lease=keeper.lease_id)
            if not result.applied:
                raise EtcdError(f"etcd: {key} exists already")
        except EtcdError:
            keeper.close()
            self._revoke(keeper)
            raise
        candidacy = Candidacy(keeper, key, result.revision)
        with self._condition:
            if not self._closed.is_set():
                self._candidacy = candidacy
                return candidacy
        keeper.close()
        self._revoke(keeper)
        raise ClosedError("the election is closed")

    def _leave(self, candidacy: Candidacy) -> None:
        """End a candidacy. Its lease may still exist in etcd, and its key would be in the way of
        all other candidates."""
        with self._condition:
            if self._candidacy is candidacy:
                self._candidacy = None
        if candidacy.keeper.lost_reason:
            self._revoke(candidacy.keeper)

    def _revoke(self, keeper: LeaseKeeper) -> None:
        try:
            self._session.revoke(keeper.lease_id)
        except (EtcdError, ClosedError) as error:
            _log.warning("revoke_failed", owner=self._record.id, reason=str(error))

    def _candidacy_lost(self, reason: str) -> None:
        _log.warning("left_the_line", owner=self._record.id, reason=reason)
        self._changed()

    # -- the thread "watch owner"

    def _candidates_changed(self, _state: PrefixState) -> None:
        candidacy = self._candidacy
        if candidacy is not None:
            self._check_key(candidacy)
        self._changed()

    def _check_key(self, candidacy: Candidacy) -> None:
        """End a candidacy whose key is gone. Called after the candidacy was set and after the watch
        has changed; the later call sees both."""
        state = self._watch.state if self._watch is not None else None
        if state is None or state.revision < candidacy.revision:
            return
        mine = state.entries.get(candidacy.key)
        if mine is None or mine.create_revision != candidacy.revision:
            candidacy.keeper.lose("the leader key was deleted")

    # -- helpers

    def _keys(self) -> list[KeyValue]:
        """Return the keys of all candidates, the leader first."""
        state = self._watch.state if self._watch is not None else None
        return sorted(state.entries.values(), key=lambda item: item.create_revision) if state is not None else []

    def _leading_candidacy(self) -> Candidacy:
        candidacy = self._candidacy
        if candidacy is None or self.leadership() is None:
            raise NotLeaderError(f"owner {self._record.id} does not lead")
        return candidacy

    def _seen_candidacy(self) -> Candidacy | None:
        """Return the candidacy once our own watch has seen its key."""
        candidacy, state = self._candidacy, self._watch.state if self._watch is not None else None
        return candidacy if candidacy is not None and state is not None and state.revision >= candidacy.revision else None

    def _changed(self) -> None:
        with self._condition:
            self._condition.notify_all()
        self._on_change()

    def _wait(self, ask: Callable[[], _T | None], timeout_s: float) -> _T | None:
        """Return the first result that is not None; None after timeout_s, or once the election is
        closed."""
        with self._condition:
            self._condition.wait_for(lambda: ask() is not None or self._closed.is_set(), timeout_s)
        return ask()
