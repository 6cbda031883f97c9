"""A limit on the calls per second of a gRPC server: one token bucket for all callers.

A refused call costs the server almost nothing: it uses no worker thread and its request is not
read. Any thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import grpc


class RateLimit(grpc.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls above the limit: `per_s` on average, `burst` at once after a quiet period."""

    def __init__(self, per_s: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s, self._burst, self._clock = per_s, burst, clock
        self._lock = threading.Lock()
        self._tokens = float(burst)
        self._at = clock()
        self._refusal = grpc.unary_unary_rpc_method_handler(self._refuse)

    def allows(self) -> bool:
        """Take a token; return whether there was one."""
        with self._lock:
            now = self._clock()
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._per_s)
            self._at = now
            if self._tokens < 1.0:
                return False
            self._tokens -= 1.0
            return True

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        return continuation(details) if self.allows() else self._refusal

    def _refuse(self, _request: bytes, context: Any) -> NoReturn:
        context.abort(
            grpc.StatusCode.RESOURCE_EXHAUSTED, f"more than {self._per_s:g} calls per second; nothing was done, try again"
        )
        raise AssertionError("abort returned")
