"""A watch that holds the complete state of a prefix, and restarts by itself.

It is level-triggered: each change delivers the whole mapping, so no receiver depends on having seen
each event. Watches that were made together share a stream. Its thread runs this loop until they are
closed:

    load the prefix at revision R  ->  stream the changes after R  ->  (the stream broke)
                                            ^                                  |
                                            '--- resume after the last change <-'
                                    or load again, if that revision has been compacted

A stream that no longer delivers anything, although its connection is open, ends in three ways: etcd
ends it when the member loses its quorum (REQUIRE_LEADER); the watch ends it when progress requests
stay unanswered (a frozen process, a cut link); `close` cancels it. A stream
resumes after the revision of a change, never after that of a progress response: etcd 3.5.0 to 3.5.7
may send one before the changes that precede it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

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
STALLED_INTERVALS = 3
"""A stream that has delivered nothing for this many progress intervals is replaced."""
RETRY_MIN_S = 0.05
RETRY_MAX_S = 1.0
CLOSE_TIMEOUT_S = 2.0

OnChange: TypeAlias = Callable[[PrefixState], None]

_PUT = 0  # mvccpb.Event.PUT

_log = structlog.get_logger("tablewire.etcd")


def read_prefix(members: Members, prefix: str) -> PrefixState:
    """Read all keys that start with the prefix, linearizably."""
    request = rpc.RangeRequest(key=to_bytes(prefix), range_end=prefix_end(prefix))
    response = members.repeat(f"get {prefix}*", lambda member: member.kv.Range, request)
    items = map(key_value, response.kvs)
    return PrefixState(response.header.revision, MappingProxyType({item.key: item for item in items}))


class PrefixWatch:
    """The state of all keys below a prefix; made by `EtcdSession.watch_prefix` and
    `watch_prefixes`. Any thread.

    on_change(state) is called on the thread of the watch, first with the state at the start, then
    after each change. It must return soon; an exception in it ends the process.
    """

    def __init__(self, thread: WatchThread, prefix: str, on_change: OnChange | None) -> None:
        self.prefix = prefix
        self.state: PrefixState | None = None
        """The last known state; None until the prefix has been loaded."""
        self.resume_after: PrefixState | None = None
        """The state after which the stream resumes; None: load the prefix first. The watch
        thread's."""
        self._watch_thread = thread
        self._on_change = on_change
        self._condition = threading.Condition()

    @property
    def error(self) -> str:
        """Why the watch is broken at present; empty while it runs."""
        return self._watch_thread.error

    def silence_s(self) -> float:
        """Return the seconds since etcd last responded: at most about the progress
        interval while the watch works."""
        return self._watch_thread.silence_s()

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

    def publish(self, state: PrefixState) -> None:
        """Store the state and pass it on. The watch thread's."""
        with self._condition:
            self.state = state
            self._condition.notify_all()
        if self._on_change is not None and not self._watch_thread.is_closed:
            self._on_change(state)

    def close(self) -> None:
        """Stop this watch and those that share its stream. No call of on_change begins after this
        returns, unless on_change itself calls it. Idempotent."""
        self._watch_thread.close()


class WatchThread:
    """The thread and the stream of one or more watches. Several on one stream cost little more than
    one."""

    def __init__(
        self, members: Members, prefixes: Mapping[str, OnChange | None], name: str, progress_interval_s: float | None
    ) -> None:
        """progress_interval_s: see `EtcdSession.watch_prefixes`; None for one prefix only."""
        self.watches = [PrefixWatch(self, prefix, on_change) for prefix, on_change in prefixes.items()]
        self.error = ""
        self._members = members
        self._name = ", ".join(prefixes)
        self._progress_interval_s = progress_interval_s
        self._closed = threading.Event()
        self._call: Any = None
        self._heard_at = time.monotonic()
        self._seen_revision = 0
        """The latest revision of etcd, which may be later than the last change of any prefix."""
        self._thread = run_thread(name, self._run)

    @property
    def is_closed(self) -> bool:
        return self._closed.is_set()

    def silence_s(self) -> float:
        return time.monotonic() - self._heard_at

    def close(self) -> None:
        self._closed.set()
        if (call := self._call) is not None:
            call.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_TIMEOUT_S + 2 * self._members.request_timeout_s)

    def _run(self) -> None:
        backoff = Backoff(RETRY_MIN_S, RETRY_MAX_S)
        while not self._closed.is_set():
            try:
                for watch in self.watches:
                    if watch.resume_after is None:
                        self._load(watch)
                        backoff.reset()
                self._stream(backoff)
            except ClosedError:
                return
            except CompactedError:
                _log.info("watch_reloads", prefix=self._name)
            except EtcdError as error:
                if self._closed.is_set():
                    return
                if backoff.failures == 0:
                    _log.warning("watch_broke", prefix=self._name, reason=str(error))
                self.error = str(error)
                self._closed.wait(backoff.next_s())

    def _load(self, watch: PrefixWatch) -> None:
        state = watch.resume_after = read_prefix(self._members, watch.prefix)
        self._seen_revision = state.revision
        self._heard()
        if watch.state is None or watch.state.entries != state.entries:
            watch.publish(state)

    def _stream(self, backoff: Backoff) -> None:
        """Publish the states after each response with changes; raise when the stream has ended."""
        members = self._members
        metadata = members.metadata()
        member = members.pick()
        where = f"etcd {member.endpoint}: watch {self._name}"
        ended = threading.Event()
        self._heard_at = time.monotonic()
        created: dict[int, PrefixWatch] = {}  # by the id that etcd gave, in the order of the requests
        try:
            requests, headers = self._requests(ended), (REQUIRE_LEADER, *metadata)
            if self._progress_interval_s is None:
                self._call = call = member.watch_silently(next(requests), metadata=headers)
            else:
                self._call = call = member.watch.Watch(requests, metadata=headers)
            if self._closed.is_set():
                call.cancel()
            for response in call:
                if response.created:
                    created[response.watch_id] = self.watches[len(created)]
                watch = created.get(response.watch_id)  # None: a progress response, which is for all
                if response.compact_revision:
                    self._forget([watch] if watch is not None else self.watches)
                    raise CompactedError(f"{where}: revisions before {response.compact_revision} are gone")
                if response.canceled:
                    members.forget_token(metadata, response.cancel_reason)
                    raise EtcdUnavailableError(f"{where}: {response.cancel_reason or 'ended by etcd'}")
                if response.header.revision < self._seen_revision:
                    # etcd was created again, or restored from a backup: what is known here was
                    # never in this etcd.
                    self._forget(self.watches)
                    raise CompactedError(f"{where}: its revision went back to {response.header.revision}")
                self._seen_revision = response.header.revision
                self._heard()
                if response.events and watch is not None and watch.resume_after is not None:
                    backoff.reset()
                    watch.resume_after = _apply(watch.resume_after, response)
                    watch.publish(watch.resume_after)
            raise EtcdUnavailableError(f"{where}: the stream ended")
        except (grpc.RpcError, ValueError) as error:
            failure = members.explain(f"watch {self._name}", member, error)
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

    def _requests(self, ended: threading.Event) -> Iterator[Any]:
        """Yield what is sent on the stream, on a thread of gRPC: the watches, then a progress
        request every interval."""
        for watch in self.watches:
            assert watch.resume_after is not None
            create = rpc.WatchCreateRequest(
                key=to_bytes(watch.prefix), range_end=prefix_end(watch.prefix), start_revision=watch.resume_after.revision + 1
            )
            yield rpc.WatchRequest(create_request=create)
        while (interval_s := self._progress_interval_s) is not None and not ended.wait(interval_s):
            call = self._call
            if call is not None and self.silence_s() > STALLED_INTERVALS * interval_s:
                call.cancel()
                return
            yield rpc.WatchRequest(progress_request=rpc.WatchProgressRequest())

    def _heard(self) -> None:
        self._heard_at = time.monotonic()
        self.error = ""

    @staticmethod
    def _forget(watches: Iterable[PrefixWatch]) -> None:
        """Have the prefixes loaded again."""
        for watch in watches:
            watch.resume_after = None


def _apply(state: PrefixState, response: Any) -> PrefixState:
    """Return the state after the changes of one response. etcd sends all changes of a revision in
    one response."""
    entries: dict[str, KeyValue] = dict(state.entries)
    for event in response.events:
        item = key_value(event.kv)
        if event.type == _PUT:
            entries[item.key] = item
        else:
            entries.pop(item.key, None)
    revision = max(state.revision, *(event.kv.mod_revision for event in response.events))
    return PrefixState(revision, MappingProxyType(entries))
