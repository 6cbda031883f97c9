"""Who leads: one key a candidate, under a lease of its own; the lowest create revision leads.

    /tablewire/<cluster>/owner/<lease> = LeaderRecord       create revision = owner_revision, which grows with every election

A candidate that has lost its lease, resigned, or found its key deleted never leads again under that revision: it takes a new
lease and so stands at the end of the line, with a higher revision. That is what makes owner_revision a fencing token.

Three things end leadership, whichever comes first: the local deadline of the lease (see `tablewire.etcd.lease`; it passes
before etcd can let the key expire), the key seen deleted by the watch, a guarded write that finds the key gone. Look at
`leadership()` immediately before every effect; what it returned a while ago says nothing about now.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import structlog

from tablewire.errors import ClosedError, ConflictError, EtcdError, NotLeaderError, OperatingError
from tablewire.etcd import keys as etcd_keys
from tablewire.etcd.lease import LeaseKeeper, lease_clock
from tablewire.etcd.records import LeaderRecord, decode, encode
from tablewire.etcd.session import EtcdSession
from tablewire.etcd.values import Compare, KeyValue, PrefixState, Put, is_absent, is_created_at
from tablewire.etcd.watch import PrefixWatch
from tablewire.runtime.shutdown import run_thread

RETRY_MIN_S = 0.1
RETRY_MAX_S = 2.0
CLOSE_TIMEOUT_S = 5.0

_T = TypeVar("_T")

_log = structlog.get_logger("owner.election")


@dataclass(frozen=True, slots=True)
class Leadership:
    """revision: the create revision of our key, the owner_revision. deadline: until when we may act on it, a time of
    `tablewire.etcd.lease.lease_clock` (not of time.monotonic)."""

    revision: int
    deadline: float

    def remaining_s(self) -> float:
        """Seconds until the deadline; negative once it has passed. Each keep-alive moves it: ask the Election again."""
        return self.deadline - lease_clock()

    def is_valid(self) -> bool:
        return self.remaining_s() > 0


@dataclass(frozen=True, slots=True)
class Candidacy:
    """One candidacy: a lease, the key below it, and the revision at which the key was created."""

    keeper: LeaseKeeper
    key: str
    revision: int


class Election:
    """One candidate. Campaigns from `start` to `close`, on the thread "lease"; any thread may call anything here.

    address: host:port at which others reach this owner's admin API. on_change is called, on a thread of ours, after leadership
    was won or lost here or elsewhere; it must not block (wake a mailbox).
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
        on_change: Callable[[], None] | None = None,
    ) -> None:
        self._session = session
        self._cluster = cluster
        self._record = LeaderRecord(id=owner_id, address=address, version=version)
        self._ttl_s = ttl_s
        self._margin_s = margin_s
        self._on_change = on_change
        self._prefix = etcd_keys.owner_prefix(cluster)
        self._condition = threading.Condition()
        self._candidacy: Candidacy | None = None
        self._watch: PrefixWatch | None = None
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self._error = ""
        self._unreadable: set[tuple[str, int]] = set()

    # -- who leads

    def leadership(self) -> Leadership | None:
        """Ours, if we lead at this moment."""
        candidacy, watch = self._candidacy, self._watch
        if candidacy is None or watch is None or watch.state is None:
            return None
        first = _first(watch.state)
        if (
            first is None
            or (first.key, first.create_revision) != (candidacy.key, candidacy.revision)
            or not candidacy.keeper.is_valid()
        ):
            return None
        return Leadership(candidacy.revision, candidacy.keeper.deadline())

    def leader(self) -> LeaderRecord | None:
        """Who leads as far as etcd was last heard; None when nobody does or its record cannot be read."""
        state = self._watch.state if self._watch is not None else None
        first = _first(state) if state is not None else None
        return self._read(first) if first is not None else None

    def candidates(self) -> list[LeaderRecord]:
        """All owners that campaign, the leader first; unreadable records are left out."""
        state = self._watch.state if self._watch is not None else None
        found = [self._read(item) for item in _in_order(state)] if state is not None else []
        return [record for record in found if record is not None]

    @property
    def error(self) -> str:
        """Why this candidate is not in the line at present; empty while it is."""
        return self._error

    def wait_for_leadership(self, timeout_s: float) -> Leadership | None:
        """As soon as we lead, or None after timeout_s."""
        return self._wait(self.leadership, timeout_s)

    # -- writes

    def guard(self) -> Compare:
        """ "My leader key still exists at my revision", for a transaction; NotLeaderError when we do not lead."""
        candidacy = self._leading_candidacy()
        return is_created_at(candidacy.key, candidacy.revision)

    def guarded_write(self, puts: Sequence[Put], deletes: Sequence[str] = (), extra_compares: Sequence[Compare] = ()) -> int:
        """Writes all of it if we still lead at etcd and the compares hold, and nothing otherwise; its revision, which is the new
        mod_revision of what was put.

        NotLeaderError: our key is gone, step down. ConflictError: we lead, but another compare failed, read again.
        EtcdUnavailableError: nobody knows whether it was written. Pin each key by `is_unchanged` or `is_absent`: then it is tried
        again on another member before that, and no late first attempt can overwrite a later write.
        """
        candidacy = self._leading_candidacy()
        guard = is_created_at(candidacy.key, candidacy.revision)
        result = self._session.transact(
            [guard, *extra_compares],
            puts,
            deletes,
            read_on_failure=[candidacy.key, *(compare.key for compare in extra_compares)],
        )
        if result.applied:
            return result.revision
        mine = result.found.get(candidacy.key)
        if mine is None or mine.create_revision != candidacy.revision:
            candidacy.keeper.lose("a guarded write found the leader key gone")
            raise NotLeaderError(f"etcd: the leader key of {self._record.id} is gone: another owner leads or will")
        raise ConflictError(f"etcd: lost a race for {', '.join(compare.key for compare in extra_compares)}: read again")

    # -- lifetime

    def start(self, timeout_s: float | None = None) -> None:
        """Enters the line of candidates. timeout_s: wait so long until it stands there, EtcdError with the reason after it (and
        the election is closed); None: do not wait, keep trying for ever."""
        self._watch = self._session.watch_prefix(self._prefix, self._candidates_changed, name="watch owner")
        self._thread = run_thread("lease", self._campaign)
        if timeout_s is None:
            return
        entered = self._wait(self._entered, timeout_s)
        if entered is None:
            reason = self._error or self._watch.error or "no answer"
            self.close()
            raise EtcdError(f"no election within {timeout_s:g} s: {reason}")

    def resign(self) -> None:
        """Hands over at once, and goes to the end of the line. Does nothing when not in the line.

        EtcdError: we lead no more in any case, but the next owner has to wait until our lease expires.
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
        """Resigns and leaves the line for good. Idempotent. Never raises: without etcd the lease expires by itself."""
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
        failures = 0
        while not self._closed.is_set():
            try:
                candidacy = self._enter()
            except ClosedError:
                return
            except EtcdError as error:
                failures += 1
                self._error = str(error)
                if failures == 1:
                    _log.warning("campaign_failed", owner=self._record.id, reason=str(error))
                self._closed.wait(min(RETRY_MAX_S, RETRY_MIN_S * 2 ** min(failures, 10)) * random.uniform(0.5, 1.0))
                continue
            failures = 0
            self._error = ""
            self._check_key(candidacy)
            self._changed()
            candidacy.keeper.run()
            self._leave(candidacy)

    def _enter(self) -> Candidacy:
        """A new lease and the key below it."""
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
        """The candidacy is over. Its lease may still stand at etcd, and its key with it, in everybody's way."""
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
        """Called after the candidacy was set and after the state was: whichever is later sees both."""
        state = self._watch.state if self._watch is not None else None
        if state is None or state.revision < candidacy.revision:
            return
        mine = state.entries.get(candidacy.key)
        if mine is None or mine.create_revision != candidacy.revision:
            candidacy.keeper.lose("the leader key was deleted")

    # -- helpers

    def _leading_candidacy(self) -> Candidacy:
        candidacy = self._candidacy
        if candidacy is None or self.leadership() is None:
            raise NotLeaderError(f"owner {self._record.id} does not lead")
        return candidacy

    def _entered(self) -> Candidacy | None:
        """The candidacy once our own watch has seen it."""
        candidacy, state = self._candidacy, self._watch.state if self._watch is not None else None
        return candidacy if candidacy is not None and state is not None and state.revision >= candidacy.revision else None

    def _changed(self) -> None:
        with self._condition:
            self._condition.notify_all()
        if self._on_change is not None:
            self._on_change()

    def _wait(self, ask: Callable[[], _T | None], timeout_s: float) -> _T | None:
        deadline = time.monotonic() + timeout_s
        with self._condition:
            while True:
                answer = ask()
                left_s = deadline - time.monotonic()
                if answer is not None or left_s <= 0 or self._closed.is_set():
                    return answer
                self._condition.wait(left_s)

    def _read(self, item: KeyValue) -> LeaderRecord | None:
        try:
            return decode(LeaderRecord, item.key, item.value)
        except OperatingError as error:
            seen = (item.key, item.mod_revision)
            if seen not in self._unreadable:
                self._unreadable = {seen}
                _log.warning("unreadable_candidate", reason=str(error))
            return None


def _in_order(state: PrefixState) -> list[KeyValue]:
    return sorted(state.entries.values(), key=lambda item: item.create_revision)


def _first(state: PrefixState) -> KeyValue | None:
    return min(state.entries.values(), key=lambda item: item.create_revision, default=None)
