"""The gRPC server of a processor's Exchange: batches of the owner in, messages of the agents out.

A handler (gRPC's pool, threads "exchange") decodes and checks a batch, puts it into the mailbox of the agents' loop and waits
until the loop has answered it, at most `exchange_wait_ms`. Then it returns what is in the outbox. What the agents send later
goes with the next answer.

The agents' loop (one thread, `AgentHost.run`) waits, takes the Exchanges that have come, delivers their messages to the open
`transports`, ticks the agents, and answers each Exchange that has nothing more to wait for.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import grpc
import structlog

from tablewire.errors import CodecError
from tablewire.model.ids import CaptureID
from tablewire.model.messages import Batch
from tablewire.runtime.grpc import add_health_and_reflection, listen, new_server
from tablewire.runtime.mailbox import Mailbox
from tablewire.runtime.message_queues import MAX_INBOX_MESSAGES, MAX_INBOX_ROWS, ChangefeedTransports, Outbox
from tablewire.runtime.rates import RateLimit
from tablewire.wire.codec import EXCHANGE_METHOD, EXCHANGE_SERVICE, BatchBuilder, decode_batch
from tablewire.wire.versions import SUPPORTED_VERSIONS, ProtocolVersions

MAX_PENDING_EXCHANGES: Final = 16
"""Batches that the loop has not taken yet. An owner has one call in flight, so more are calls that it has given up."""
MAX_REASON_CHARS: Final = 1_000
MAX_WORKERS: Final = 8
CALLS_PER_S_MAX: Final = 1_000
CALLS_BURST_MAX: Final = 2_000
"""An owner makes tens of calls a second."""
SPARE_RPCS: Final = 64
"""Calls (health, reflection, an owner's next one) that may wait for a worker."""

_log = structlog.get_logger("processor.exchange")


@dataclass(slots=True)
class ExchangeStats:
    """Counts since the start.

    invalid: not a batch. refused: for another capture, or from a replaced owner. overflowed: the mailbox was full. unanswered:
    the loop did not answer within exchange_wait_ms. dropped, unsendable: messages of agents that newer ones pushed out of the
    outbox, or that the codec refused. seen_revision: the highest owner_revision so far.
    """

    received: int = 0
    invalid: int = 0
    refused: int = 0
    overflowed: int = 0
    unanswered: int = 0
    unsendable: int = 0
    dropped: int = 0
    seen_revision: int = 0


class PendingExchange:
    """An Exchange that waits for its answer. Any thread."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self._answered = threading.Event()

    @property
    def is_open(self) -> bool:
        """Whether the owner still waits: it has no answer, and its call has not ended."""
        return not self._answered.is_set()

    def answer(self) -> None:
        """Return to the owner what the agents have sent by now. Idempotent."""
        self._answered.set()

    def wait(self, timeout_s: float) -> bool:
        return self._answered.wait(timeout_s)


class ExchangeServer:
    """take: the loop's thread. start, stop: the main thread. Everything else: any thread.

    The constructor binds the port (OperatingError when it cannot), `start` serves. interceptors: see `tls.interceptors`.
    """

    def __init__(
        self,
        capture_id: CaptureID,
        host: str,
        port: int,
        *,
        exchange_wait_ms: int = 50,
        max_pending: int = MAX_PENDING_EXCHANGES,
        credentials: grpc.ServerCredentials | None = None,
        interceptors: Sequence[grpc.ServerInterceptor] = (),
        versions: ProtocolVersions = SUPPORTED_VERSIONS,
    ) -> None:
        self._capture_id = capture_id
        self._versions = versions
        self._wait_s = exchange_wait_ms / 1000
        self._mailbox: Mailbox[PendingExchange] = Mailbox(max_pending)
        self.outbox = Outbox(MAX_INBOX_MESSAGES, MAX_INBOX_ROWS)
        self.transports = ChangefeedTransports(self.outbox.put, self.outbox.forget)
        self._lock = threading.Lock()
        """Guards the counts and the open Exchanges."""
        self._stats = ExchangeStats()
        self._open: set[PendingExchange] = set()
        self._stopping = False
        self._last_unsendable = ""
        self._server = new_server(
            max_workers=MAX_WORKERS,
            max_concurrent_rpcs=MAX_WORKERS + SPARE_RPCS,
            thread_name="exchange",
            interceptors=(RateLimit(CALLS_PER_S_MAX, CALLS_BURST_MAX), *interceptors),
        )
        # Bytes in and out: our decoder, not gRPC's, explains what is wrong with a request.
        handler = grpc.method_handlers_generic_handler(
            EXCHANGE_SERVICE, {EXCHANGE_METHOD: grpc.unary_unary_rpc_method_handler(self._exchange)}
        )
        self._server.add_generic_rpc_handlers((handler,))
        self.health = add_health_and_reflection(self._server, [EXCHANGE_SERVICE])
        self.port = listen(self._server, host, port, credentials)

    def start(self, *, is_ready: bool = True) -> None:
        """Serve. is_ready: what health reports at first."""
        self._server.start()
        self.health.set_serving(is_ready)

    def stop(self, grace_s: float) -> None:
        """Refuse new calls, answer those under way, and return when they have ended, at the latest after grace_s. Idempotent."""
        self.health.leave()
        with self._lock:
            self._stopping = True
            pending = list(self._open)
        stopped = self._server.stop(grace_s)
        for one in pending:
            one.answer()
        stopped.wait()

    def wait(self, timeout_s: float) -> bool:
        """Return True as soon as an Exchange has come or `wake` was called since the last wait, False after timeout_s."""
        return self._mailbox.wait(timeout_s)

    def wake(self) -> None:
        """Make `wait` return. Never blocks: this is the executors' wake."""
        self._mailbox.wake()

    def take(self) -> list[PendingExchange]:
        """Return the Exchanges that have come since the last call, in their order."""
        return self._mailbox.take()

    @property
    def stats(self) -> ExchangeStats:
        with self._lock:
            return replace(self._stats, overflowed=self._mailbox.refused, dropped=self.outbox.dropped)

    # gRPC's threads --------------------------------------------------------------------------------------------------

    def _exchange(self, request: bytes, context: Any) -> bytes:
        """Serve one call. `context.abort` raises."""
        try:
            batch = decode_batch(request, self._versions)
        except CodecError as error:
            with self._lock:
                self._stats.invalid += 1
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"bad batch: {error}"[:MAX_REASON_CHARS])
        pending = PendingExchange(batch)
        with self._lock:
            refusal = self._refusal(batch)
            stopping = self._stopping
            self._open.add(pending)
        try:
            if refusal:
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal[:MAX_REASON_CHARS])
            if stopping or not context.add_callback(pending.answer):
                context.abort(grpc.StatusCode.UNAVAILABLE, f"{self._capture_id} is stopping")
            if not self._mailbox.put(pending):
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the agents' loop is behind; nothing was taken in")
            is_answered = pending.wait(self._wait_s)
            pending.answer()
            with self._lock:
                self._stats.received += 1
                self._stats.unanswered += not is_answered
            # A caller that has gone would lose what is taken out for it.
            return self._answer(batch) if context.is_active() else b""
        finally:
            with self._lock:
                self._open.discard(pending)

    def _refusal(self, batch: Batch) -> str:
        """Return why a batch is refused, "" if it is not. Call with the lock held."""
        seen = self._stats.seen_revision
        if batch.receiver != self._capture_id:
            reason = f"receiver: {batch.receiver!r} is not here, this is {self._capture_id!r}"
        elif batch.owner_revision < seen:
            reason = f"owner_revision: {batch.owner_revision} has been replaced by {seen}"
        else:
            self._stats.seen_revision = batch.owner_revision
            return ""
        self._stats.refused += 1
        return reason

    def _answer(self, batch: Batch) -> bytes:
        """Encode what the agents have sent to this owner in this term, as much as one batch takes."""
        builder = BatchBuilder(self._capture_id, batch.sender, batch.owner_revision, version=batch.version)
        for message, error in self.outbox.fill(builder, batch.owner_revision):
            with self._lock:
                self._stats.unsendable += 1
                is_new, self._last_unsendable = str(error) != self._last_unsendable, str(error)
            if is_new:
                _log.error("message_unsendable", changefeed=str(message.changefeed), error=str(error))
        return builder.finish()
