"""A watch that cannot be lost: it keeps the whole state of a prefix and starts again by itself.

Level-triggered: whoever listens is handed the whole mapping each time it has changed, so that nothing depends on having seen
an edge. The thread of a watch does this until it is closed:

    load the prefix at revision R  ->  stream the changes from R + 1 on  ->  (the stream broke)
                                            ^                                       |
                                            '--- resume from the last revision <----'
                                    or load again, when that revision has been compacted away

Three things end a stream that has become useless though its connection stands: etcd does so itself when the member has lost
its quorum ("hasleader"); a member that does not answer our progress requests (a frozen process, a cut line) is given up after
STALL_TIMEOUT_S; closing the watch cancels it. Only the revision of a change is resumed from, never that of a progress answer:
etcd 3.5.0-3.5.7 may send one before the changes that precede it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import etcd3.etcdrpc as rpc
import grpc
import structlog

from tablewire.errors import ClosedError, EtcdError
from tablewire.etcd.values import CompactedError, EtcdUnavailableError, KeyValue, PrefixState, key_value, prefix_end
from tablewire.runtime.backoff import Backoff
from tablewire.runtime.shutdown import run_thread

if TYPE_CHECKING:
    from tablewire.etcd.session import EtcdSession

PROGRESS_INTERVAL_S = 1.0
STALL_TIMEOUT_S = 3.0
RETRY_MIN_S = 0.05
RETRY_MAX_S = 1.0
CLOSE_TIMEOUT_S = 2.0

REQUIRE_LEADER = ("hasleader", "true")

_PUT = 0  # mvccpb.Event.PUT

_log = structlog.get_logger("tablewire.etcd")


class PrefixWatch:
    """The state of all keys below a prefix. Made by `EtcdSession.watch_prefix`; its thread is named after it.

    on_change(state) is called on that thread, first with the first state, then whenever a key was put or deleted. It must
    not block long; an exception of it ends the process (it is our bug).
    """

    def __init__(
        self, session: EtcdSession, prefix: str, on_change: Callable[[PrefixState], None] | None, *, name: str = "watch"
    ) -> None:
        self.prefix = prefix
        self._session = session
        self._on_change = on_change
        self._condition = threading.Condition()
        self._state: PrefixState | None = None
        self._closed = threading.Event()
        self._call: Any = None
        self._heard_at = time.monotonic()
        self._seen_revision = 0
        """Of all of etcd, as far as this watch has heard; `state.revision` is that of the prefix."""
        self._error = ""
        self._thread = run_thread(name, self._run)

    @property
    def state(self) -> PrefixState | None:
        """What is known now; None until the first load."""
        return self._state

    @property
    def error(self) -> str:
        """Why the watch is not running at present; empty while it is."""
        return self._error

    def silence_s(self) -> float:
        """Seconds since etcd was last heard by this watch: about PROGRESS_INTERVAL_S at most while all is well."""
        return time.monotonic() - self._heard_at

    def wait_until(self, condition: Callable[[PrefixState], bool], timeout_s: float) -> PrefixState:
        """The first state that meets the condition; EtcdError after timeout_s."""
        deadline = time.monotonic() + timeout_s
        with self._condition:
            while True:
                if self._state is not None and condition(self._state):
                    return self._state
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise EtcdError(
                        f"etcd: no such state of {self.prefix} within {timeout_s:g} s: {self._error or 'it did not change'}"
                    )
                self._condition.wait(left_s)

    def wait_loaded(self, timeout_s: float) -> PrefixState:
        """The state once there is one; EtcdError (with what is wrong) after timeout_s."""
        return self.wait_until(lambda _state: True, timeout_s)

    def close(self) -> None:
        """No call of on_change begins after this returns (unless it is called by on_change itself). Idempotent."""
        self._closed.set()
        call = self._call
        if call is not None:
            call.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_TIMEOUT_S + 2 * self._session.request_timeout_s)
        self._session.forget(self)

    # -- the thread

    def _run(self) -> None:
        state: PrefixState | None = None
        backoff = Backoff(RETRY_MIN_S, RETRY_MAX_S)
        while not self._closed.is_set():
            try:
                if state is None:
                    state = self._load()
                    backoff.reset()
                for changed in self._stream(state):
                    backoff.reset()
                    state = changed  # the next stream resumes from here
                    self._publish(state)
            except ClosedError:
                return
            except CompactedError:
                _log.info("watch_reloads", prefix=self.prefix)
                state = None
            except EtcdError as error:
                if self._closed.is_set():
                    return
                if backoff.failures == 0:
                    _log.warning("watch_broke", prefix=self.prefix, reason=str(error))
                self._error = str(error)
                self._closed.wait(backoff.next_s())

    def _load(self) -> PrefixState:
        items, revision = self._session.get_prefix(self.prefix)
        state = PrefixState(revision, MappingProxyType({item.key: item for item in items}))
        self._seen_revision = revision
        self._heard()
        if self._state is None or dict(self._state.entries) != dict(state.entries):
            self._publish(state)
        return state

    def _stream(self, state: PrefixState) -> Iterator[PrefixState]:
        """The states after `state`, one an answer of etcd; returns or raises when the stream is over."""
        who = self._session.who()
        member = self._session.pick()
        ended = threading.Event()
        self._heard_at = time.monotonic()
        try:
            self._call = call = member.watch.Watch(self._requests(state.revision + 1, ended), metadata=(REQUIRE_LEADER, *who))
            if self._closed.is_set():
                call.cancel()
            for answer in call:
                if answer.compact_revision:
                    raise CompactedError(f"etcd: watch {self.prefix}: revisions before {answer.compact_revision} are gone")
                if answer.canceled:
                    self._session.forget_refused(who, answer.cancel_reason)
                    raise EtcdUnavailableError(
                        f"etcd {member.endpoint}: watch {self.prefix}: {answer.cancel_reason or 'ended by etcd'}"
                    )
                if answer.header.revision < self._seen_revision:
                    # Made anew, or restored from a backup: what is known here never was in this etcd.
                    raise CompactedError(f"etcd: watch {self.prefix}: its revision went back to {answer.header.revision}")
                self._seen_revision = answer.header.revision
                self._heard()
                if answer.events:
                    state = _apply(state, answer)
                    yield state
            raise EtcdUnavailableError(f"etcd {member.endpoint}: watch {self.prefix}: the stream ended")
        except (grpc.RpcError, ValueError) as error:
            failure = self._session.explain(f"watch {self.prefix}", member, error)
            self._session.forget_refused(who, str(failure))
            self._session.failed(member)
            raise failure from error
        except EtcdUnavailableError:
            self._session.failed(member)
            raise
        finally:
            ended.set()
            if self._call is not None:
                self._call.cancel()
                self._call = None

    def _requests(self, start_revision: int, ended: threading.Event) -> Iterator[Any]:
        """What is sent on the stream, on a thread of gRPC's: the watch, then a sign of life to be answered now and then."""
        create = rpc.WatchCreateRequest(
            key=self.prefix.encode(), range_end=prefix_end(self.prefix), start_revision=start_revision
        )
        yield rpc.WatchRequest(create_request=create)
        while not ended.wait(PROGRESS_INTERVAL_S):
            call = self._call
            if call is not None and self.silence_s() > STALL_TIMEOUT_S:
                call.cancel()
                return
            yield rpc.WatchRequest(progress_request=rpc.WatchProgressRequest())

    def _heard(self) -> None:
        self._heard_at = time.monotonic()
        self._error = ""

    def _publish(self, state: PrefixState) -> None:
        with self._condition:
            self._state = state
            self._condition.notify_all()
        if self._on_change is not None and not self._closed.is_set():
            self._on_change(state)


def _apply(state: PrefixState, answer: Any) -> PrefixState:
    """The state after the changes of one answer. etcd sends all changes of one revision in one answer."""
    entries: dict[str, KeyValue] = dict(state.entries)
    for event in answer.events:
        item = key_value(event.kv)
        if event.type == _PUT:
            entries[item.key] = item
        else:
            entries.pop(item.key, None)
    revision = max(state.revision, *(event.kv.mod_revision for event in answer.events))
    return PrefixState(revision, MappingProxyType(entries))
