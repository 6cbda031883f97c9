"""A watch that holds the complete state of a prefix, and restarts by itself.

It is level-triggered: each change delivers the whole mapping, so no receiver depends on having seen each event. The thread of
a watch runs this loop until the watch is closed:

    load the prefix at revision R  ->  stream the changes after R  ->  (the stream broke)
                                            ^                                  |
                                            '--- resume after the last change <-'
                                    or load again, if that revision has been compacted

A stream that no longer delivers anything, although its connection is open, ends in three ways: etcd ends it when the member
loses its quorum (REQUIRE_LEADER); the watch ends it when progress requests were unanswered for STALL_TIMEOUT_S (a frozen
process, a cut link); `close` cancels it. A stream resumes after the revision of a change, never after that of a progress
response: etcd 3.5.0 to 3.5.7 may send one before the changes that precede it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import etcd3.etcdrpc as rpc
import grpc
import structlog

from tablewire.errors import ClosedError, EtcdError
from tablewire.etcd.members import REQUIRE_LEADER, Members
from tablewire.etcd.values import (
    CompactedError,
    EtcdUnavailableError,
    KeyValue,
    PrefixState,
    key_value,
    prefix_end,
    to_bytes,
)
from tablewire.runtime.backoff import Backoff
from tablewire.runtime.shutdown import run_thread

PROGRESS_INTERVAL_S = 1.0
STALL_TIMEOUT_S = 3.0
RETRY_MIN_S = 0.05
RETRY_MAX_S = 1.0
CLOSE_TIMEOUT_S = 2.0

_PUT = 0  # mvccpb.Event.PUT

_log = structlog.get_logger("tablewire.etcd")


def read_prefix(members: Members, prefix: str) -> PrefixState:
    """Read all keys that start with the prefix, linearizably."""
    request = rpc.RangeRequest(key=to_bytes(prefix), range_end=prefix_end(prefix))
    response = members.repeat(f"get {prefix}*", lambda member: member.kv.Range, request)
    items = map(key_value, response.kvs)
    return PrefixState(response.header.revision, MappingProxyType({item.key: item for item in items}))


class PrefixWatch:
    """The state of all keys below a prefix; made by `EtcdSession.watch_prefix`. Its thread is called `name`.

    on_change(state) is called on that thread, first with the state at the start, then after each change. It must return soon; an
    exception in it ends the process.
    """

    def __init__(
        self, members: Members, prefix: str, on_change: Callable[[PrefixState], None] | None, *, name: str = "watch"
    ) -> None:
        self.prefix = prefix
        self.state: PrefixState | None = None
        """The last known state; None until the prefix has been loaded."""
        self.error = ""
        """Why the watch is broken at present; empty while it runs."""
        self._members = members
        self._on_change = on_change
        self._condition = threading.Condition()
        self._closed = threading.Event()
        self._call: Any = None
        self._heard_at = time.monotonic()
        self._seen_revision = 0
        """The latest revision of etcd, which may be later than the prefix's last change."""
        self._thread = run_thread(name, self._run)

    def silence_s(self) -> float:
        """Return the seconds since etcd last responded: at most about PROGRESS_INTERVAL_S while the watch works."""
        return time.monotonic() - self._heard_at

    def wait_until(self, condition: Callable[[PrefixState], bool], timeout_s: float) -> PrefixState:
        """Return the first state that meets the condition; raise EtcdError after timeout_s."""

        def is_met() -> bool:
            return self.state is not None and condition(self.state)

        with self._condition:
            if not self._condition.wait_for(is_met, timeout_s):
                raise EtcdError(
                    f"etcd: no such state of {self.prefix} within {timeout_s:g} s: {self.error or 'it did not change'}"
                )
            assert self.state is not None
            return self.state

    def wait_loaded(self, timeout_s: float) -> PrefixState:
        """Return the state when it is known; raise EtcdError with the reason after timeout_s."""
        return self.wait_until(lambda _state: True, timeout_s)

    def close(self) -> None:
        """Stop. No call of on_change begins after this returns, unless on_change itself calls it. Idempotent."""
        self._closed.set()
        if (call := self._call) is not None:
            call.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_TIMEOUT_S + 2 * self._members.request_timeout_s)

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
                    state = changed  # the next stream resumes here
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
                self.error = str(error)
                self._closed.wait(backoff.next_s())

    def _load(self) -> PrefixState:
        state = read_prefix(self._members, self.prefix)
        self._seen_revision = state.revision
        self._heard()
        if self.state is None or self.state.entries != state.entries:
            self._publish(state)
        return state

    def _stream(self, state: PrefixState) -> Iterator[PrefixState]:
        """Yield the states after `state`, one for each response with changes; return or raise when the stream has ended."""
        members = self._members
        metadata = members.metadata()
        member = members.pick()
        where = f"etcd {member.endpoint}: watch {self.prefix}"
        ended = threading.Event()
        self._heard_at = time.monotonic()
        try:
            self._call = call = member.watch.Watch(
                self._requests(state.revision + 1, ended), metadata=(REQUIRE_LEADER, *metadata)
            )
            if self._closed.is_set():
                call.cancel()
            for response in call:
                if response.compact_revision:
                    raise CompactedError(f"{where}: revisions before {response.compact_revision} are gone")
                if response.canceled:
                    members.forget_token(metadata, response.cancel_reason)
                    raise EtcdUnavailableError(f"{where}: {response.cancel_reason or 'ended by etcd'}")
                if response.header.revision < self._seen_revision:
                    # etcd was created again, or restored from a backup: what is known here was never in this etcd.
                    raise CompactedError(f"{where}: its revision went back to {response.header.revision}")
                self._seen_revision = response.header.revision
                self._heard()
                if response.events:
                    state = _apply(state, response)
                    yield state
            raise EtcdUnavailableError(f"{where}: the stream ended")
        except (grpc.RpcError, ValueError) as error:
            failure = members.explain(f"watch {self.prefix}", member, error)
            members.forget_token(metadata, str(failure))
            members.fail_over(member)
            raise failure from error
        except EtcdUnavailableError:
            members.fail_over(member)
            raise
        finally:
            ended.set()
            if self._call is not None:
                self._call.cancel()
                self._call = None

    def _requests(self, start_revision: int, ended: threading.Event) -> Iterator[Any]:
        """Yield what is sent on the stream, on a thread of gRPC: the watch, then a progress request every interval."""
        create = rpc.WatchCreateRequest(
            key=to_bytes(self.prefix), range_end=prefix_end(self.prefix), start_revision=start_revision
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
        self.error = ""

    def _publish(self, state: PrefixState) -> None:
        with self._condition:
            self.state = state
            self._condition.notify_all()
        if self._on_change is not None and not self._closed.is_set():
            self._on_change(state)


def _apply(state: PrefixState, response: Any) -> PrefixState:
    """Return the state after the changes of one response. etcd sends all changes of a revision in one response."""
    entries: dict[str, KeyValue] = dict(state.entries)
    for event in response.events:
        item = key_value(event.kv)
        if event.type == _PUT:
            entries[item.key] = item
        else:
            entries.pop(item.key, None)
    revision = max(state.revision, *(event.kv.mod_revision for event in response.events))
    return PrefixState(revision, MappingProxyType(entries))
