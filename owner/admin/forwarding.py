"""An owner that does not lead passes admin calls on to the leader, as bytes, whatever the call is.

A passed-on call carries the metadata key FORWARDED_KEY, and an owner that gets one without leading refuses it: one hop, so that
two owners with different views of the election cannot pass a call to and fro. A refusal for want of a leader carries
RETRY_KEY in its trailing metadata: nothing was done, so a client may simply ask again. Runs in gRPC's pool.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn
from urllib.parse import quote

import grpc

from owner.admin.caller_identity import CALLER_KEY, caller_of
from owner.admin.ports import OwnerPort
from owner.admin.probe import NO_RESPONSE, RETRY_KEY, OpenChannel, probe, why_unreachable
from owner.admin.resolve import leads
from tablewire.etcd.records import LeaderRecord

SERVICE = "tablewire.v1.Admin"
ANSWERED_BY_ANY = f"/{SERVICE}/GetStatus"
FORWARDED_KEY = "tablewire-forwarded"
CONNECT_TIMEOUT_S = 1.0
UNARY_TIMEOUT_S = 120.0
STREAM_TIMEOUT_S = 24 * 3_600.0


class ForwardToLeader(grpc.ServerInterceptor):  # type: ignore[misc]  # grpc has no annotations
    """Answers here what this owner can answer, and passes on the rest. Call `close` after the server has stopped."""

    def __init__(self, owner: OwnerPort, open_channel: OpenChannel) -> None:
        self._owner = owner
        self._open_channel = open_channel
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._former: grpc.Channel | None = None
        self._address = ""

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        handler = continuation(details)
        if handler is None or not details.method.startswith(f"/{SERVICE}/") or leads(self._owner):
            return handler
        marked = any(key == FORWARDED_KEY for key, _ in details.invocation_metadata)
        leader = self._owner.election.leader()
        if leader is not None and leader.id == self._owner.owner_id:
            leader = None  # elected, but not leading yet
        if details.method == ANSWERED_BY_ANY and (leader is None or marked):
            return handler
        if marked or leader is None:
            return self._refusal(handler.response_streaming, marked)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(self._stream(details.method, leader))
        return grpc.unary_unary_rpc_method_handler(self._unary(details.method, leader))

    def close(self) -> None:
        with self._lock:
            channels, self._channel, self._former = (self._channel, self._former), None, None
        for channel in channels:
            if channel is not None:
                channel.close()

    def _refusal(self, streams: bool, marked: bool) -> Any:
        text, why = f"owner {self._owner.owner_id} does not lead", self._owner.election.error
        if why:
            text += f" and cannot be elected: {why}"
        else:
            text += " (any more)" if marked else ", and no leader is known: an election is under way"

        def refuse(_request: bytes, context: Any) -> NoReturn:
            abort_for_retry(context, f"{text}; try again")

        def refuse_stream(_request: bytes, context: Any) -> Iterator[bytes]:
            abort_for_retry(context, f"{text}; try again")
            yield b""  # makes this a generator; abort raises

        if streams:
            return grpc.unary_stream_rpc_method_handler(refuse_stream)
        return grpc.unary_unary_rpc_method_handler(refuse)

    def _unary(self, method: str, leader: LeaderRecord) -> Callable[[bytes, Any], bytes]:
        def forward(request: bytes, context: Any) -> bytes:
            channel = self._to(leader, context)
            timeout_s = min(context.time_remaining() or UNARY_TIMEOUT_S, UNARY_TIMEOUT_S)
            call = channel.unary_unary(method).future(request, timeout=timeout_s, metadata=self._mark(context))
            if not context.add_callback(call.cancel):
                call.cancel()
            try:
                answer: bytes = call.result()
            except grpc.FutureCancelledError:
                context.abort(grpc.StatusCode.CANCELLED, "the caller went away")
            except grpc.RpcError as error:
                _pass_on(error, leader, context)
            return answer

        return forward

    def _stream(self, method: str, leader: LeaderRecord) -> Callable[[bytes, Any], Iterator[bytes]]:
        def forward(request: bytes, context: Any) -> Iterator[bytes]:
            channel = self._to(leader, context)
            timeout_s = min(context.time_remaining() or STREAM_TIMEOUT_S, STREAM_TIMEOUT_S)
            call = channel.unary_stream(method)(request, timeout=timeout_s, metadata=self._mark(context))
            if not context.add_callback(call.cancel):
                call.cancel()
            try:
                yield from call
            except grpc.RpcError as error:
                _pass_on(error, leader, context)
            finally:
                call.cancel()

        return forward

    def _mark(self, context: Any) -> tuple[tuple[str, str], ...]:
        return ((FORWARDED_KEY, self._owner.owner_id), (CALLER_KEY, quote(caller_of(context))))

    def _to(self, leader: LeaderRecord, context: Any) -> grpc.Channel:
        """A channel that is connected to the leader of now; else the call ends here, where nothing was done yet."""
        channel = self._channel_to(leader)
        why_not = why_unreachable(probe(channel, CONNECT_TIMEOUT_S))
        if why_not:
            if why_not != NO_RESPONSE:
                self._drop(channel)
            abort_for_retry(context, f"the leader {leader.id} at {leader.address} does not answer ({why_not}); try again")
        return channel

    def _channel_to(self, leader: LeaderRecord) -> grpc.Channel:
        """One channel at a time. The former leader's is closed, which ends what is still under way on it."""
        with self._lock:
            if self._channel is None or self._address != leader.address:
                if self._channel is not None:
                    self._channel.close()
                self._channel, self._address = self._open_channel(leader.address), leader.address
            return self._channel

    def _drop(self, channel: grpc.Channel) -> None:
        """Nobody is connected by it: the next call opens another one, with the credentials of then."""
        with self._lock:
            if self._channel is channel:
                if self._former is not None:
                    self._former.close()
                self._former, self._channel = channel, None  # another call's connection may just have come up on it


def abort_for_retry(context: Any, text: str) -> NoReturn:
    """Ends the call as UNAVAILABLE where nothing was done yet."""
    context.set_trailing_metadata(((RETRY_KEY, "1"),))
    context.abort(grpc.StatusCode.UNAVAILABLE, text)
    raise AssertionError("abort returned")


def _pass_on(error: grpc.RpcError, leader: LeaderRecord, context: Any) -> NoReturn:
    """The leader's own refusal as it is; a leader that does not answer by name."""
    code, text = error.code(), error.details() or ""
    trailing = tuple((key, value) for key, value in error.trailing_metadata() or () if key == RETRY_KEY)
    if trailing:
        context.set_trailing_metadata(trailing)
    elif code == grpc.StatusCode.UNAVAILABLE:
        text = f"the leader {leader.id} at {leader.address} does not answer: {text}"
    context.abort(code, text)
    raise AssertionError("abort returned")
