"""Finds an owner that answers, and asks it.

All endpoints are tried at once and the first that is ready is asked, so a dead one costs nothing; what answers there without
being an owner (a proxy, a processor) is left out. "There is no leader now" is answered before anything was done (RETRY_KEY), so
it is asked again until the time is over. A call that may have been done when its connection broke is not asked again unless it
only reads.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import grpc

from owner.admin.forwarding import RETRY_KEY, OpenChannel, knock, why_silent
from tablewire.v1 import admin_pb2_grpc

ANSWER_BYTES_MAX = 64 << 20
CONNECT_TIMEOUT_S = 5.0
OTHERS_TIMEOUT_S = 1.0
RETRY_INTERVAL_S = 0.2
ENDPOINTS_MAX = 32

_T = TypeVar("_T")


class CallError(Exception):
    """The call failed or was refused. code: lower-case name of the gRPC status; text: one line for the operator."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class AdminClient:
    """Calls on the admin API of whichever owner answers. One thread. Close it."""

    def __init__(self, endpoints: Sequence[str], open_channel: OpenChannel, clock: Callable[[], float] = time.monotonic) -> None:
        self.endpoints = tuple(dict.fromkeys(endpoints))[:ENDPOINTS_MAX]
        self.endpoint = ""  # that answered last
        self._open_channel = open_channel
        self._clock = clock
        self._channel: grpc.Channel | None = None

    def close(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def call(self, method: str, request: Any, timeout_s: float, *, reads: bool = False) -> Any:
        """The answer to a unary call. CallError otherwise."""
        return self._ask(lambda stub, left_s: getattr(stub, method)(request, timeout=left_s), timeout_s, reads)

    def stream(self, method: str, request: Any, timeout_s: float, *, reads: bool = False) -> Iterator[Any]:
        """The messages of a streaming call, which has begun when this returns. CallError, here or while iterating."""

        def start(stub: Any, left_s: float) -> tuple[Any, Any]:
            call = getattr(stub, method)(request, timeout=left_s)
            return call, next(call, None)

        call, first = self._ask(start, timeout_s, reads)
        return self._rest(call, first, timeout_s, reads)

    def _rest(self, call: Any, first: Any, timeout_s: float, reads: bool) -> Iterator[Any]:
        try:
            if first is not None:
                yield first
            yield from call
        except grpc.RpcError as error:
            raise self._error(error, timeout_s, reads) from None
        finally:
            call.cancel()

    def _ask(self, ask: Callable[[Any, float], _T], timeout_s: float, reads: bool) -> _T:
        deadline = self._clock() + timeout_s
        failed: set[str] = set()  # asked, and found without a way to the leader: the others first
        strangers: set[str] = set()  # no owners: never again
        last: CallError | None = None  # what was said to the last call
        while True:
            try:
                channel = self._channel or self._connect(deadline, failed, strangers)
            except CallError as error:
                # Found again or not, the call was answered, and that answer is the reason why it was not done.
                raise error if last is None else CallError(last.code, f"{last.text}; then {error.text}") from None
            self._channel = channel
            stub = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]  # generated
            left_s = max(deadline - self._clock(), 0.001)
            try:
                return ask(stub, left_s)
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                    strangers.add(self.endpoint)
                again = _is_undone(error) or (reads and error.code() == grpc.StatusCode.UNAVAILABLE)
                again = again or (self.endpoint in strangers and not strangers.issuperset(self.endpoints))
                last = self._error(error, timeout_s, reads)
                if not again or self._clock() + RETRY_INTERVAL_S >= deadline:
                    raise last from None
            self.close()
            failed.add(self.endpoint)
            time.sleep(RETRY_INTERVAL_S)

    def _connect(self, deadline: float, failed: set[str], strangers: set[str]) -> grpc.Channel:
        """A channel to the first endpoint that is ready, those in `failed` last; CallError naming all when none is."""
        endpoints = [endpoint for endpoint in self.endpoints if endpoint not in strangers]
        others = [endpoint for endpoint in endpoints if endpoint not in failed]
        if failed and others:
            try:
                return self._connect_to(others, min(deadline, self._clock() + OTHERS_TIMEOUT_S))
            except CallError:
                pass
        failed.clear()
        return self._connect_to(endpoints, deadline)

    def _connect_to(self, endpoints: Sequence[str], deadline: float) -> grpc.Channel:
        timeout_s = min(CONNECT_TIMEOUT_S, max(deadline - self._clock(), 0.001))
        ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        channels = {endpoint: self._open_channel(endpoint) for endpoint in endpoints}
        self.endpoint, why = "", {}
        try:
            calls = {endpoint: knock(channel, timeout_s) for endpoint, channel in channels.items()}
            for endpoint, call in calls.items():
                call.add_done_callback(lambda _call, endpoint=endpoint: ended.put(endpoint))
            for _ in calls:
                endpoint = ended.get()  # each ends by its timeout
                why[endpoint] = why_silent(calls[endpoint])
                if not why[endpoint]:
                    self.endpoint = endpoint
                    return channels[endpoint]
        finally:
            for endpoint, channel in channels.items():
                if endpoint != self.endpoint:
                    channel.close()
        tried = ", ".join(f"{endpoint} ({why[endpoint]})" for endpoint in endpoints)
        raise CallError("unavailable", f"no owner answers; tried {tried}")

    def _error(self, error: grpc.RpcError, timeout_s: float, reads: bool) -> CallError:
        code, text = error.code(), error.details() or ""
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            text = f"no answer from {self.endpoint} within {timeout_s:g} s"
            text += "" if reads else "; what was asked may still happen"
        elif code == grpc.StatusCode.UNAVAILABLE and reads and not _is_undone(error):
            text = f"{self.endpoint}: {text}"
        elif code == grpc.StatusCode.UNAVAILABLE and not _is_undone(error):
            text = f"{self.endpoint} did not answer to the end, so what was asked may or may not have happened: {text}"
        elif code == grpc.StatusCode.UNIMPLEMENTED:
            text = f"{self.endpoint} does not know this call: it is of another version, or not an owner ({text})"
        return CallError(code.name.lower(), text or code.name.lower())


def _is_undone(error: grpc.RpcError) -> bool:
    return any(key == RETRY_KEY for key, _ in error.trailing_metadata() or ())
