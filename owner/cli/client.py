"""A client of the admin API that finds an owner that answers.

All endpoints are tried at once and the first that is ready is asked, so a dead endpoint costs no
time. A server that is not an owner (a proxy, a processor) is left out. An owner that knows no
leader refuses before anything is done (RETRY_KEY); the call is then repeated until its time has
passed. A call whose connection broke is repeated only if it reads, since a write may have been
done.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
from google.protobuf.message_factory import GetMessageClass

from owner.admin.probe import RETRY_KEY, SERVICE, OpenChannel, probe, why_unreachable
from owner.cli.output import CommandError
from tablewire.v1 import admin_pb2

CONNECT_TIMEOUT_S = 5.0
OTHERS_TIMEOUT_S = 1.0
RETRY_INTERVAL_S = 0.2
ENDPOINTS_MAX = 32

_READS = ("Get", "List", "Query", "Plan")
"""What the names of methods that change nothing begin with."""
_METHODS = admin_pb2.DESCRIPTOR.services_by_name["Admin"].methods_by_name


class AdminClient:
    """A client of any owner that answers, for one thread. Close it after use."""

    def __init__(self, endpoints: Sequence[str], open_channel: OpenChannel) -> None:
        self.endpoints = tuple(dict.fromkeys(endpoints))[:ENDPOINTS_MAX]
        self.endpoint = ""
        """The endpoint that was asked last."""
        self._open_channel = open_channel
        self._channel: grpc.Channel | None = None

    def close(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def call(self, method: str, timeout_s: float, **fields: Any) -> Any:
        """Call a unary method with these fields of its request, and return the response."""
        (response,) = self.stream(method, timeout_s, **fields)  # on the wire a stream of one message
        return response

    def stream(self, method: str, timeout_s: float, **fields: Any) -> Iterator[Any]:
        """Call a streaming method and return its messages.

        CommandError is raised here if the call cannot be started, and by the iterator if it fails
        later.
        """
        messages, first = self._start(method, timeout_s, GetMessageClass(_METHODS[method].input_type)(**fields))

        def read() -> Iterator[Any]:
            try:
                if first is not None:
                    yield first
                yield from messages
            except grpc.RpcError as error:
                raise self._error(error, method, timeout_s) from None
            finally:
                messages.cancel()

        return read()

    def _start(self, method: str, timeout_s: float, request: Any) -> tuple[Any, Any]:
        """Find an owner that answers; return the messages of the call, and the first of them."""
        response_type = GetMessageClass(_METHODS[method].output_type)
        deadline = time.monotonic() + timeout_s
        failed: set[str] = set()  # owners without a connection to the leader: tried last
        not_owners: set[str] = set()  # never tried again
        last: CommandError | None = None
        while True:
            try:
                channel = self._channel or self._connect(deadline, failed, not_owners)
            except CommandError as error:
                # The last response says why the call was not done, whether or not an owner is found again.
                raise error if last is None else CommandError(last.code, f"{last.message}; then {error.message}") from None
            self._channel = channel
            call = channel.unary_stream(f"/{SERVICE}/{method}", type(request).SerializeToString, response_type.FromString)
            try:
                messages = call(request, timeout=max(deadline - time.monotonic(), 0.001))
                return messages, next(messages, None)
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                    not_owners.add(self.endpoint)
                again = _is_undone(error) or (method.startswith(_READS) and error.code() == grpc.StatusCode.UNAVAILABLE)
                again = again or (self.endpoint in not_owners and not not_owners.issuperset(self.endpoints))
                last = self._error(error, method, timeout_s)
                if not again or time.monotonic() + RETRY_INTERVAL_S >= deadline:
                    raise last from None
            self.close()
            failed.add(self.endpoint)
            time.sleep(RETRY_INTERVAL_S)

    def _connect(self, deadline: float, failed: set[str], not_owners: set[str]) -> grpc.Channel:
        """Return a channel to the first endpoint that is ready; those in `failed` are tried last."""
        endpoints = [endpoint for endpoint in self.endpoints if endpoint not in not_owners]
        others = [endpoint for endpoint in endpoints if endpoint not in failed]
        if failed and others:
            try:
                return self._connect_to(others, min(deadline, time.monotonic() + OTHERS_TIMEOUT_S))
            except CommandError:
                pass
        failed.clear()
        return self._connect_to(endpoints, deadline)

    def _connect_to(self, endpoints: Sequence[str], deadline: float) -> grpc.Channel:
        timeout_s = min(CONNECT_TIMEOUT_S, max(deadline - time.monotonic(), 0.001))
        ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        channels = {endpoint: self._open_channel(endpoint) for endpoint in endpoints}
        self.endpoint, why = "", {}
        try:
            calls = {endpoint: probe(channel, timeout_s) for endpoint, channel in channels.items()}
            for endpoint, call in calls.items():
                call.add_done_callback(lambda _call, endpoint=endpoint: ended.put(endpoint))
            for _ in calls:
                endpoint = ended.get()  # each call ends by its timeout
                why[endpoint] = why_unreachable(calls[endpoint])
                if not why[endpoint]:
                    self.endpoint = endpoint
                    return channels[endpoint]
        finally:
            for endpoint, channel in channels.items():
                if endpoint != self.endpoint:
                    channel.close()
        tried = ", ".join(f"{endpoint} ({why[endpoint]})" for endpoint in endpoints)
        raise CommandError("unavailable", f"no owner answers; tried {tried}")

    def _error(self, error: grpc.RpcError, method: str, timeout_s: float) -> CommandError:
        code, text = error.code(), error.details() or ""
        reads = method.startswith(_READS)
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            text = f"no answer from {self.endpoint} within {timeout_s:g} s"
            text += "" if reads else "; the request may still be carried out"
        elif code == grpc.StatusCode.UNAVAILABLE and not _is_undone(error):
            unknown = "" if reads else " closed the connection, so the request may or may not have been carried out"
            text = f"{self.endpoint}{unknown}: {text}"
        elif code == grpc.StatusCode.UNIMPLEMENTED:
            text = f"{self.endpoint} does not know this call: it is not an owner, or has another version ({text})"
        return CommandError(code.name.lower(), text or code.name.lower())


def _is_undone(error: grpc.RpcError) -> bool:
    """Return whether the owner says that nothing was done."""
    return any(key == RETRY_KEY for key, _ in error.trailing_metadata() or ())
