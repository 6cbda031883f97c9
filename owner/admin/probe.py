"""What a forwarding owner and the CLI need to find an owner that answers."""

from __future__ import annotations

from collections.abc import Callable

import grpc

SERVICE = "tablewire.v1.Admin"
RETRY_KEY = "tablewire-retry"
"""Trailing metadata of a refusal before anything was done, since there is no leader: the call may be repeated."""
NO_RESPONSE = "no response"
REASON_LENGTH_MAX = 200

_HEALTH_CHECK = "/grpc.health.v1.Health/Check"

OpenChannel = Callable[[str], grpc.Channel]
"""Opens a channel to the admin address of an owner, with the credentials of this cluster."""


def probe(channel: grpc.Channel, timeout_s: float) -> grpc.Future:
    """Start a call that changes nothing and that every server answers in some way.

    Watching the connectivity of a channel instead would need a thread of grpc that fails noisily
    when the channel is closed.
    """
    return channel.unary_unary(_HEALTH_CHECK).future(b"", timeout=timeout_s)


def why_unreachable(call: grpc.Future) -> str:
    """Wait for the end of a `probe`; return why no server answered, or "" if one did, whatever it said."""
    try:
        call.result()
    except grpc.FutureCancelledError:
        return "cancelled"
    except grpc.RpcError as error:
        code, text = error.code(), error.details() or ""
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return NO_RESPONSE
        if code == grpc.StatusCode.UNAVAILABLE:
            return "refused" if "refused" in text else text[:REASON_LENGTH_MAX]
    return ""
