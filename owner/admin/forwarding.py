"""An owner that does not lead forwards admin calls to the leader, as bytes, whatever the call is.

A forwarded call carries the metadata key FORWARDED_KEY, and an owner that receives one without
leading refuses it: one hop, so that two owners with different views of the election cannot forward
a call to each other. Runs in gRPC's thread pool.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn
from urllib.parse import quote

import grpc

from owner.admin.caller_identity import CALLER_KEY, caller_of
from owner.admin.ports import OwnerPort
from owner.admin.probe import NO_RESPONSE, RETRY_KEY, SERVICE, OpenChannel, probe, why_unreachable
from owner.admin.resolve import leads
from tablewire.etcd.records import LeaderRecord

ANSWERED_BY_ANY = f"/{SERVICE}/GetStatus"
FORWARDED_KEY = "tablewire-forwarded"
CONNECT_TIMEOUT_S = 1.0
UNARY_TIMEOUT_S = 120.0
STREAM_TIMEOUT_S = 24 * 3_600.0


class ForwardToLeader(grpc.ServerInterceptor):  # type: ignore[misc]  # grpc has no annotations
    """Lets this owner answer what it can, and forwards the rest. Call `close` after the server has stopped."""

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
        is_forwarded = any(key == FORWARDED_KEY for key, _ in details.invocation_metadata)
        leader = self._owner.election.leader()
        if leader is not None and leader.id == self._owner.owner_id:
            leader = None  # elected, but has not read the state in etcd yet
        if details.method == ANSWERED_BY_ANY and (leader is None or is_forwarded):
            return handler
        method: Callable[..., Any]
        if is_forwarded or leader is None:
            method = partial(_refuse, self._refusal(is_forwarded))
        else:
            method = partial(self._stream if handler.response_streaming else self._unary, details.method, leader)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(method)
        return grpc.unary_unary_rpc_method_handler(method)

    def close(self) -> None:
        with self._lock:
            channels, self._channel, self._former = (self._channel, self._former), None, None
        for channel in channels:
            if channel is not None:
                channel.close()

    def _refusal(self, is_forwarded: bool) -> str:
        text, why = f"owner {self._owner.owner_id} does not lead", self._owner.election.error
        if why:
            return f"{text} and cannot be elected: {why}; try again"
        return f"{text}{'' if is_forwarded else ', and no leader is known: an election is under way'}; try again"

    def _unary(self, method: str, leader: LeaderRecord, request: bytes, context: Any) -> bytes:
        (response,) = self._stream(method, leader, request, context, UNARY_TIMEOUT_S)  # on the wire a stream of one message
        return response

    def _stream(
        self, method: str, leader: LeaderRecord, request: bytes, context: Any, timeout_s: float = STREAM_TIMEOUT_S
    ) -> Iterator[bytes]:
        channel = self._connect(leader, context)
        timeout_s = min(context.time_remaining() or timeout_s, timeout_s)
        metadata = ((FORWARDED_KEY, self._owner.owner_id), (CALLER_KEY, quote(caller_of(context))))
        call = channel.unary_stream(method)(request, timeout=timeout_s, metadata=metadata)
        if not context.add_callback(call.cancel):
            call.cancel()
        try:
            yield from call
        except grpc.RpcError as error:
            _abort_as(error, leader, context)
        finally:
            call.cancel()

    def _connect(self, leader: LeaderRecord, context: Any) -> grpc.Channel:
        """Return a channel that is connected to the leader, or end the call, since nothing is done yet."""
        channel = self._channel_to(leader)
        why_not = why_unreachable(probe(channel, CONNECT_TIMEOUT_S))
        if why_not:
            if why_not != NO_RESPONSE:
                self._drop(channel)
            abort_for_retry(context, f"the leader {leader.id} at {leader.address} does not answer ({why_not}); try again")
        return channel

    def _channel_to(self, leader: LeaderRecord) -> grpc.Channel:
        """Return the channel to this leader. Closing the one to a former leader ends the calls on it."""
        with self._lock:
            if self._channel is None or self._address != leader.address:
                if self._channel is not None:
                    self._channel.close()
                self._channel, self._address = self._open_channel(leader.address), leader.address
            return self._channel

    def _drop(self, channel: grpc.Channel) -> None:
        """Make the next call open another channel, with the credentials as they are then."""
        with self._lock:
            if self._channel is channel:
                if self._former is not None:
                    self._former.close()
                self._former, self._channel = channel, None  # another call may just have connected on it


def _refuse(text: str, _request: bytes, context: Any) -> NoReturn:
    abort_for_retry(context, text)


def abort_for_retry(context: Any, text: str) -> NoReturn:
    """End the call as UNAVAILABLE where nothing has been done."""
    context.set_trailing_metadata(((RETRY_KEY, "1"),))
    context.abort(grpc.StatusCode.UNAVAILABLE, text)
    raise AssertionError("abort returned")


def _abort_as(error: grpc.RpcError, leader: LeaderRecord, context: Any) -> NoReturn:
    """End the call as the leader did; if the leader became unreachable, say so by its name."""
    code, text = error.code(), error.details() or ""
    trailing = tuple((key, value) for key, value in error.trailing_metadata() or () if key == RETRY_KEY)
    if trailing:
        context.set_trailing_metadata(trailing)
    elif code == grpc.StatusCode.UNAVAILABLE:
        text = f"the leader {leader.id} at {leader.address} does not answer: {text}"
    context.abort(code, text)
    raise AssertionError("abort returned")
