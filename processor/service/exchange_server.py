"""ExchangeServer: the processor's end of every Exchange, and the agents' Transports.

A handler (gRPC's pool, threads "exchange") decodes and checks a batch, hands it to the agents' loop, wakes it, and waits until
the loop says that this turn is answered, at most `exchange_wait_ms`. Then it takes what the agents have said by then, encodes it
and returns. What they say later stays in their bounded outboxes and goes with the next answer: nothing hangs on one call.

How the agents' loop (one thread) uses it:

    server = ExchangeServer(capture_id, host, port); server.start()
    while running:
        server.wait(timeout_s)                 # an Exchange has come, or wake() was called (executors call it)
        for pending in server.take():
            ...                                # open and close agents by pending.batch.active
            server.deliver(pending.batch)      # its messages are in the agents' next recv
        ...                                    # tick the agents; they send into server.transport(changefeed, epoch)
        ...                                    # pending.answer() for each turn that has nothing more to wait for
    server.stop(grace_s)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import grpc
import structlog

from tablewire.errors import ClosedError, CodecError
from tablewire.model.ids import CaptureID, ChangefeedID
from tablewire.model.messages import Batch, HeartbeatResponse, Message
from tablewire.runtime.fair_queue import BoundedFairQueue
from tablewire.runtime.grpc import add_health_and_reflection, listen, new_server
from tablewire.runtime.mailbox import Mailbox
from tablewire.runtime.rates import RateLimit
from tablewire.wire.codec import EXCHANGE_METHOD, EXCHANGE_SERVICE, BatchBuilder, decode_batch, rows_of
from tablewire.wire.versions import SPOKEN, ProtocolVersions

MAX_PENDING_EXCHANGES: Final = 16
"""Batches that the loop has not taken yet; one owner has one call in flight, so more are calls that it has given up."""
MAX_QUEUED_RESPONSES: Final = 1_024
"""Messages of one changefeed, in each direction; the newest are kept. A report that goes out in chunks must fit whole, else it
would never arrive whole: no less than what the owner joins."""
MAX_QUEUED_ROWS: Final = 2**22
MAX_REASON_CHARS: Final = 1_000
MAX_WORKERS: Final = 8
CALLS_PER_S_MAX: Final = 1_000
CALLS_BURST_MAX: Final = 2_000
"""One owner makes tens a second; what is more is a loop gone wild."""
SPARE_RPCS: Final = 64
"""Calls (health, reflection, an owner's next one) that may wait for a worker."""

_log = structlog.get_logger("processor.exchange")


@dataclass(frozen=True, slots=True)
class ExchangeStats:
    """Counts since the start. invalid: not a batch. refused: for another capture, or of an owner that was replaced.
    overflowed: the loop was too slow to take it. unanswered: the loop did not answer within exchange_wait_ms (what was said by
    then was sent). unsendable: an agent's messages that the codec refused. dropped: pushed out of a queue by newer ones.
    seen_revision: the newest owner's. last_exchange_at: of the last good one, on the server's clock (seconds)."""

    received: int = 0
    invalid: int = 0
    refused: int = 0
    overflowed: int = 0
    unanswered: int = 0
    unsendable: int = 0
    dropped: int = 0
    seen_revision: int = 0
    last_exchange_at: float | None = None


def _lane_of(message: Message) -> tuple[tuple[bool, ChangefeedID, int], int | None]:
    """The lane of the outbox, and its own bound: of the heartbeat responses of one changefeed the newest alone waits."""
    is_response = isinstance(message.body, HeartbeatResponse)
    return (is_response, message.changefeed, message.changefeed_epoch), 1 if is_response else None


class PendingExchange:
    """One turn of an owner that waits for its answer."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self._done = threading.Event()
        self._extra: tuple[Message, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether the owner still waits: False once it was answered, timed out, or has gone."""
        return not self._done.is_set()

    def answer(self, messages: Sequence[Message] = ()) -> None:
        """Loop's thread: answer now, with what the agents have sent by now (and these messages). Idempotent."""
        if self.is_open:
            self._extra = tuple(messages)
            self._done.set()

    def release(self) -> None:
        """Any thread: nobody waits any more."""
        self._done.set()

    def wait(self, timeout_s: float) -> bool:
        return self._done.wait(timeout_s)

    @property
    def extra(self) -> tuple[Message, ...]:
        return self._extra


class AgentTransport:
    """One changefeed's Transport on the processor's side; the loop's thread."""

    def __init__(self, server: ExchangeServer, changefeed: ChangefeedID, changefeed_epoch: int) -> None:
        self.changefeed, self.changefeed_epoch = changefeed, changefeed_epoch
        self._server = server
        self._inbox: BoundedFairQueue[Message] = BoundedFairQueue(MAX_QUEUED_RESPONSES, MAX_QUEUED_ROWS)
        self._closed = False

    def send(self, messages: Sequence[Message]) -> None:
        """Queues them for the next answer. Of the heartbeat responses that wait only the newest is kept."""
        if self._closed:
            raise ClosedError(f"the transport of {self.changefeed} is closed")
        self._server.queue(messages)

    def recv(self) -> Sequence[Message]:
        return self._inbox.take_all()

    def close(self) -> None:
        """Forgets what is queued in both directions. Idempotent."""
        if not self._closed:
            self._closed = True
            self._inbox.take_all()
            self._server.forget(self)

    def put(self, message: Message) -> int:
        return self._inbox.put("owner", message, rows_of(message))


class ExchangeServer:
    """take, deliver, transport: the loop's thread. wait and wake, stats: any. start, stop: the main thread.

    The port is bound (OperatingError when it cannot be had) but not served before `start`. interceptors: whom to let in at all
    (`tls.interceptors`).
    """

    def __init__(
        self,
        capture_id: CaptureID,
        host: str,
        port: int,
        *,
        exchange_wait_ms: int = 50,
        max_workers: int = MAX_WORKERS,
        max_pending: int = MAX_PENDING_EXCHANGES,
        credentials: grpc.ServerCredentials | None = None,
        interceptors: Sequence[grpc.ServerInterceptor] = (),
        versions: ProtocolVersions = SPOKEN,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capture_id = capture_id
        self._versions = versions
        self._wait_s = exchange_wait_ms / 1000
        self._clock = clock
        self._mailbox: Mailbox[PendingExchange] = Mailbox(max_pending)
        self._lock = threading.Lock()
        """Guards the outbox, the counts and the open turns."""
        self._drain_lock = threading.Lock()
        """One handler empties the outbox at a time, so that an agent's messages keep their order within an answer."""
        self._outbox: BoundedFairQueue[Message] = BoundedFairQueue(MAX_QUEUED_RESPONSES, MAX_QUEUED_ROWS)
        self._transports: dict[tuple[ChangefeedID, int], AgentTransport] = {}
        self._stats = ExchangeStats()
        self._open: set[PendingExchange] = set()
        self._stopping = False
        self._last_unsendable = ""
        self._server = new_server(
            max_workers=max_workers,
            max_concurrent_rpcs=max_workers + SPARE_RPCS,
            thread_name="exchange",
            interceptors=(RateLimit(CALLS_PER_S_MAX, CALLS_BURST_MAX), *interceptors),
        )
        # Bytes in and out: our decoder, not gRPC's, says what is wrong with a request.
        handler = grpc.method_handlers_generic_handler(
            EXCHANGE_SERVICE, {EXCHANGE_METHOD: grpc.unary_unary_rpc_method_handler(self._exchange)}
        )
        self._server.add_generic_rpc_handlers((handler,))
        self.health = add_health_and_reflection(self._server, [EXCHANGE_SERVICE])
        self.port = listen(self._server, host, port, credentials)

    # The main thread -------------------------------------------------------------------------------------------------

    def start(self, *, is_ready: bool = True) -> None:
        """Serves. is_ready: what health says at first."""
        self._server.start()
        self.health.set_serving(is_ready)

    def stop(self, grace_s: float) -> None:
        """Takes no new calls, lets those under way end within grace_s with what was said, then returns. Idempotent."""
        self.health.leave()
        with self._lock:
            self._stopping = True
            open_turns = list(self._open)
        stopped = self._server.stop(grace_s)
        for pending in open_turns:
            pending.answer()
        stopped.wait()

    # The loop --------------------------------------------------------------------------------------------------------

    def wait(self, timeout_s: float) -> bool:
        """True as soon as an Exchange has come or `wake` was called since the last wait; False after timeout_s."""
        return self._mailbox.wait(timeout_s)

    def wake(self) -> None:
        """Lets `wait` return. Any thread, never blocks: this is the executors' wake."""
        self._mailbox.wake()

    def take(self) -> list[PendingExchange]:
        """The turns that have come, in their order."""
        return self._mailbox.take()

    def deliver(self, batch: Batch) -> int:
        """Puts the batch's messages into the inboxes of the transports that are open; how many had none (dropped)."""
        strays = dropped = 0
        for message in batch.messages:
            transport = self._transports.get((message.changefeed, message.changefeed_epoch))
            if transport is None:
                strays += 1
            else:
                dropped += transport.put(message)
        if dropped:
            self._count(dropped=dropped)
        return strays

    def transport(self, changefeed: ChangefeedID, changefeed_epoch: int) -> AgentTransport:
        """A new transport with empty queues; an older one of the same run is closed."""
        older = self._transports.get((changefeed, changefeed_epoch))
        if older is not None:
            older.close()
        opened = self._transports[changefeed, changefeed_epoch] = AgentTransport(self, changefeed, changefeed_epoch)
        return opened

    @property
    def stats(self) -> ExchangeStats:
        return self._stats

    # For the transports ----------------------------------------------------------------------------------------------

    def queue(self, messages: Sequence[Message]) -> None:
        with self._lock:
            dropped = 0
            for message in messages:
                lane, max_items = _lane_of(message)
                pushed_out = self._outbox.put(lane, message, rows_of(message), max_items=max_items)
                dropped += pushed_out if max_items is None else 0
        if dropped:
            self._count(dropped=dropped)

    def forget(self, transport: AgentTransport) -> None:
        run = (transport.changefeed, transport.changefeed_epoch)
        if self._transports.get(run) is transport:
            del self._transports[run]
        with self._lock:
            self._outbox.remove(lambda lane: lane[1:] == run)  # type: ignore[index]

    # gRPC's threads --------------------------------------------------------------------------------------------------

    def _exchange(self, request: bytes, context: Any) -> bytes:
        """grpc.ServicerContext.abort raises: what stands behind it is not reached."""
        try:
            batch = decode_batch(request, self._versions)
        except CodecError as error:
            self._count(invalid=1)
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"bad batch: {error}"[:MAX_REASON_CHARS])
        refusal = self._refusal(batch)
        if refusal:
            self._count(refused=1)
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal[:MAX_REASON_CHARS])
        pending = PendingExchange(batch)
        with self._lock:
            stopping = self._stopping
            self._open.add(pending)
        try:
            if stopping or not context.add_callback(pending.release):
                context.abort(grpc.StatusCode.UNAVAILABLE, f"{self._capture_id} is stopping")
            if not self._mailbox.put(pending):
                self._count(overflowed=1)
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the agents' loop is behind; nothing was taken in")
            self._count(received=1, last_exchange_at=self._clock())
            if not pending.wait(self._wait_s):
                self._count(unanswered=1)
            pending.release()
            # What is taken out for a caller that has gone would be lost.
            return self._answer(batch, pending.extra) if context.is_active() else b""
        finally:
            with self._lock:
                self._open.discard(pending)

    def _refusal(self, batch: Batch) -> str:
        if batch.receiver != self._capture_id:
            return f"receiver: {batch.receiver!r} is not here, this is {self._capture_id!r}"
        with self._lock:
            seen = self._stats.seen_revision
            if batch.owner_revision < seen:
                return f"owner_revision: {batch.owner_revision} has been replaced by {seen}"
            if batch.owner_revision > seen:
                self._stats = replace(self._stats, seen_revision=batch.owner_revision)
        return ""

    def _answer(self, batch: Batch, extra: Sequence[Message]) -> bytes:
        """What was said to this owner in this term, as much as one batch takes. What was said to a former owner is dropped;
        what was said to a newer one waits for it."""
        builder = BatchBuilder(self._capture_id, batch.sender, batch.owner_revision, version=batch.version)
        later: list[Message] = []
        with self._drain_lock:
            for message in extra:
                self._add(builder, message, later)
            while (message_taken := self._take_outgoing()) is not None:
                if message_taken.owner_revision > batch.owner_revision:
                    later.append(message_taken)
                elif message_taken.owner_revision == batch.owner_revision and not self._add(builder, message_taken, later):
                    break
            with self._lock:
                for message in reversed(later):
                    lane, max_items = _lane_of(message)
                    self._outbox.put_back(lane, message, rows_of(message), max_items=max_items)
        return builder.finish()

    def _take_outgoing(self) -> Message | None:
        with self._lock:
            taken = self._outbox.take()
        return taken[1] if taken is not None else None

    def _add(self, builder: BatchBuilder, message: Message, later: list[Message]) -> bool:
        """False: the batch is full, and the message waits for the next one."""
        try:
            if builder.add(message):
                return True
        except CodecError as error:
            # One agent's bad message must not cost the others their answer.
            self._count(unsendable=1)
            if str(error) != self._last_unsendable:
                self._last_unsendable = str(error)
                _log.error("message_unsendable", changefeed=str(message.changefeed), error=str(error))
            return True
        later.append(message)
        return False

    def _count(self, *, last_exchange_at: float | None = None, **counts: int) -> None:
        with self._lock:
            now = self._stats
            raised = {name: getattr(now, name) + count for name, count in counts.items()}
            at = last_exchange_at if last_exchange_at is not None else now.last_exchange_at
            self._stats = replace(now, last_exchange_at=at, **raised)
