"""One capture as the owner's process sees it: an outbox, a channel, a thread, one Exchange in flight.

The thread "exchange-<capture>" does all that can be slow (encoding, the call, decoding), so that a slow or dead capture costs
its own latency and nobody else's. What is queued meanwhile is bounded and coalesces: of one changefeed the newest heartbeat, and
the newest dispatches; the protocol restates what was lost. A turn that failed is not repeated: the next tick says it again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

import grpc
import structlog

from tablewire.errors import CodecError
from tablewire.model.ids import CaptureInfo, ChangefeedID
from tablewire.model.messages import PROTOCOL_VERSION, ActiveChangefeed, Batch, Heartbeat, Message
from tablewire.runtime.fair_queue import BoundedFairQueue
from tablewire.runtime.grpc import Renewed, RenewedChannel
from tablewire.runtime.shutdown import run_thread
from tablewire.wire.codec import EXCHANGE_METHOD, EXCHANGE_SERVICE, BatchBuilder, decode_batch, rows_of
from tablewire.wire.versions import ProtocolVersions

MAX_QUEUED_DISPATCHES: Final = 64
"""Of one changefeed to one capture."""
MAX_QUEUED_ROWS: Final = 2**20
"""Of one changefeed's dispatches to one capture."""
MAX_ERROR_CHARS: Final = 500
"""Of the last error that is kept for the status."""

_log = structlog.get_logger("owner.exchange")


@dataclass(frozen=True, slots=True)
class ExchangeConfig:
    """exchange_timeout_ms: deadline of one call. idle_exchange_ms: a capture to which nothing is queued is called that often,
    so that it learns the active changefeeds and can say what it has to say. failure_pause_ms: least time between a call that
    failed and the next one to that capture."""

    exchange_timeout_ms: int = 5_000
    idle_exchange_ms: int = 500
    failure_pause_ms: int = 100

    def __post_init__(self) -> None:
        for name in ("exchange_timeout_ms", "idle_exchange_ms", "failure_pause_ms"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class LeadershipToken:
    """Under which revision the owner speaks, and of what. active None: not known yet, and nothing may be said before it is,
    because a processor closes the agents of every changefeed that is not in the set."""

    owner_revision: int = 0
    sending: bool = False
    active: tuple[ActiveChangefeed, ...] | None = None
    generation: int = 0


@dataclass(frozen=True, slots=True)
class ProcessorClientView:
    """What the status says of one capture. version: of the wire that is spoken with it. exchange_s: spent in
    all exchanges that have ended.

    failing_ms: since the first of the consecutive failures, None when the last call
    succeeded (or none was made). in_flight_ms: age of the call under way. last_error stays after a success, for the operator."""

    capture_id: str
    address: str
    version: int
    exchanges: int
    failures: int
    exchange_s: float
    consecutive_failures: int
    failing_ms: int | None
    last_error: str
    in_flight_ms: int | None
    queued: int
    dropped: int


class ProcessorClientHost(Protocol):
    """What a peer needs of its hub. Every call is made on the peer's thread."""

    @property
    def token(self) -> LeadershipToken: ...

    def start_call(self, token: LeadershipToken, start: Callable[[], grpc.Future]) -> grpc.Future | None:
        """Starts the call unless the term is over, which is decided and done as one step; None: it must not be sent."""
        ...

    def deliver(self, answer: Batch) -> None: ...


@dataclass(slots=True)
class _Counts:
    exchanges: int = 0
    failures: int = 0
    exchange_s: float = 0.0
    consecutive_failures: int = 0
    failing_since: float | None = None
    last_error: str = ""
    dropped: int = 0
    in_flight_since: float | None = None


@dataclass(slots=True)
class _Due:
    """When the next turn may and must happen, on the hub's clock (seconds)."""

    not_before: float = 0.0
    idle_at: float = 0.0
    generation: int = field(default=-1)
    """The newest active set that this capture has confirmed."""


def lane_of(message: Message) -> tuple[bool, ChangefeedID, int]:
    return isinstance(message.body, Heartbeat), message.changefeed, message.changefeed_epoch


class ProcessorClient:
    """put, wake, forget, view, close: any thread. The rest belongs to the peer's own thread."""

    def __init__(
        self,
        capture: CaptureInfo,
        owner_id: str,
        host: ProcessorClientHost,
        config: ExchangeConfig,
        credentials: grpc.ChannelCredentials | Renewed | None,
        clock: Callable[[], float],
        version: int = PROTOCOL_VERSION,
    ) -> None:
        """version: of the wire, which this owner and that capture both speak."""
        self.capture = capture
        self.version = version
        self._owner_id, self._host, self._config, self._clock = owner_id, host, config, clock
        self._condition = threading.Condition()
        self._outbox: BoundedFairQueue[Message] = BoundedFairQueue(MAX_QUEUED_DISPATCHES, MAX_QUEUED_ROWS)
        self._counts = _Counts()
        self._due = _Due()
        self._closed = False
        self._call: grpc.Future | None = None
        self._line = RenewedChannel(capture.address, credentials)
        self._method = self._exchange()
        self.thread = run_thread(f"exchange-{capture.id}", self._run)

    def put(self, messages: list[Message]) -> None:
        """Queues them; never blocks on the capture."""
        with self._condition:
            for message in messages:
                if isinstance(message.body, Heartbeat):
                    self._outbox.put(lane_of(message), message, max_items=1)
                else:
                    self._counts.dropped += self._outbox.put(lane_of(message), message, rows_of(message))
            self._condition.notify()

    def wake(self) -> None:
        with self._condition:
            self._condition.notify()

    def forget(self, changefeed: ChangefeedID, changefeed_epoch: int) -> None:
        """Nothing that is queued for this run of the changefeed is sent any more."""
        with self._condition:
            self._outbox.remove(lambda lane: lane[1:] == (changefeed, changefeed_epoch))  # type: ignore[index]

    def forget_all(self) -> None:
        """For the end of a token: the queue is emptied, and a call under way is given up."""
        with self._condition:
            self._outbox.take_all()
            self._due = _Due()
            call = self._call
        if call is not None:
            call.cancel()

    def view(self) -> ProcessorClientView:
        now = self._clock()
        with self._condition:
            counts = self._counts
            return ProcessorClientView(
                capture_id=self.capture.id,
                address=self.capture.address,
                version=self.version,
                exchanges=counts.exchanges,
                failures=counts.failures,
                exchange_s=counts.exchange_s,
                consecutive_failures=counts.consecutive_failures,
                failing_ms=_age_ms(counts.failing_since, now),
                last_error=counts.last_error,
                in_flight_ms=_age_ms(counts.in_flight_since, now),
                queued=len(self._outbox),
                dropped=counts.dropped,
            )

    def close(self) -> None:
        """Ends the thread soon; does not wait for it. Idempotent."""
        with self._condition:
            self._closed = True
            self._condition.notify()
            call = self._call
        if call is not None:
            call.cancel()

    # -----------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (token := self._wait_for_turn()) is not None:
            self._take_turn(token)
        self._line.close()

    def _wait_for_turn(self) -> LeadershipToken | None:
        """The term in which something is to be said; None when this peer is closed."""
        with self._condition:
            while not self._closed:
                token = self._host.token
                wait_s = self._wait_s(token)
                if wait_s == 0.0:
                    return token
                self._condition.wait(wait_s)
            return None

    def _wait_s(self, token: LeadershipToken) -> float | None:
        """0: now. None: until somebody wakes this thread."""
        if not token.sending or token.active is None:
            return None
        due, now = self._due, self._clock()
        at = due.not_before
        # A new active set is told at once, but to a capture that does not answer no more often than an idle one is called.
        is_told = due.generation == token.generation or self._counts.consecutive_failures > 0
        if is_told and len(self._outbox) == 0:
            at = max(at, due.idle_at)
        return max(0.0, at - now)

    def _take_turn(self, token: LeadershipToken) -> None:
        try:
            request = self._fill(token)
        except CodecError as error:
            self._failed(f"cannot be sent: {error}")
            return
        call = self._host.start_call(token, lambda: self._start(request))
        if call is None:
            self._pause()
            return
        try:
            data = call.result()
        except grpc.RpcError as error:
            self._failed(_describe(error))
            if self._line.renew():
                self._method = self._exchange()
        except grpc.FutureCancelledError:
            self._pause()
        else:
            self._answered(token, data)
        finally:
            with self._condition:
                self._call = None
                if self._counts.in_flight_since is not None:
                    self._counts.exchange_s += self._clock() - self._counts.in_flight_since
                self._counts.in_flight_since = None

    def _fill(self, token: LeadershipToken) -> bytes:
        """As much of the queue as one batch takes; the rest waits for the next turn."""
        builder = BatchBuilder(self._owner_id, self.capture.id, token.owner_revision, token.active or (), self.version)
        unsendable = ""
        while (taken := self._take()) is not None:
            if taken.owner_revision != token.owner_revision:
                self._drop()
                continue
            try:
                if builder.add(taken):
                    continue
            except CodecError as error:
                # One message that cannot be sent must not cost the others their turn.
                unsendable = str(error)
                self._drop()
                continue
            self._put_back(taken)
            break
        if unsendable:
            with self._condition:
                self._counts.last_error = f"a message cannot be sent: {unsendable}"[:MAX_ERROR_CHARS]
        return builder.finish()

    def _take(self) -> Message | None:
        with self._condition:
            taken = self._outbox.take()
        return taken[1] if taken is not None else None

    def _put_back(self, message: Message) -> None:
        with self._condition:
            max_items = 1 if isinstance(message.body, Heartbeat) else None
            if not self._outbox.put_back(lane_of(message), message, rows_of(message), max_items=max_items):
                self._counts.dropped += not isinstance(message.body, Heartbeat)

    def _drop(self) -> None:
        with self._condition:
            self._counts.dropped += 1

    def _exchange(self) -> grpc.UnaryUnaryMultiCallable:
        return self._line.channel.unary_unary(f"/{EXCHANGE_SERVICE}/{EXCHANGE_METHOD}")

    def _start(self, request: bytes) -> grpc.Future:
        call = self._method.future(request, timeout=self._config.exchange_timeout_ms / 1000, wait_for_ready=False)
        now = self._clock()
        with self._condition:
            self._call = call
            self._counts.exchanges += 1
            self._counts.in_flight_since = now
            self._due.idle_at = now + self._config.idle_exchange_ms / 1000
            closed = self._closed
        if closed:
            call.cancel()
        return call

    def _answered(self, token: LeadershipToken, data: bytes) -> None:
        try:
            answer = decode_batch(data, ProtocolVersions(self.version, self.version))
            if (answer.sender, answer.receiver) != (self.capture.id, self._owner_id):
                raise CodecError(f"from {answer.sender!r} to {answer.receiver!r}: not between this owner and this capture")
            if answer.owner_revision != token.owner_revision:
                raise CodecError(f"owner_revision: {answer.owner_revision} is not that of the call, {token.owner_revision}")
        except CodecError as error:
            self._failed(f"bad answer: {error}")
            return
        with self._condition:
            self._due.generation = token.generation
            failing_ms = _age_ms(self._counts.failing_since, self._clock())
            self._counts.consecutive_failures = 0
            self._counts.failing_since = None
        if failing_ms is not None:
            _log.info("exchange_recovered", capture=self.capture.id, failed_for_ms=failing_ms)
        self._host.deliver(answer)

    def _failed(self, what: str) -> None:
        now = self._clock()
        with self._condition:
            counts = self._counts
            counts.failures += 1
            counts.consecutive_failures += 1
            counts.last_error = what[:MAX_ERROR_CHARS]
            is_first = counts.failing_since is None
            if is_first:
                counts.failing_since = now
        if is_first:
            _log.warning("exchange_failed", capture=self.capture.id, address=self.capture.address, error=what[:MAX_ERROR_CHARS])
        self._pause()

    def _pause(self) -> None:
        with self._condition:
            self._due.not_before = self._clock() + self._config.failure_pause_ms / 1000


def _age_ms(since: float | None, now: float) -> int | None:
    return None if since is None else max(0, round((now - since) * 1000))


def _describe(error: grpc.RpcError) -> str:
    return f"{error.code().name}: {error.details()}"
