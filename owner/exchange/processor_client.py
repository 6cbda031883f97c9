"""The client of one processor: an Outbox, a channel and a thread, with one Exchange in flight.

The thread "exchange-<capture>" does all that can be slow (encoding, the call, decoding), so that a slow or dead processor delays
only itself. A call that failed is not repeated: the next tick restates what was in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import grpc
import structlog

from owner.owner_config import OwnerExchangeSection
from tablewire.errors import CodecError
from tablewire.model.ids import CaptureInfo, ChangefeedID
from tablewire.model.messages import ActiveChangefeed, Batch, Message
from tablewire.runtime.grpc import CredentialsProvider, RenewedChannel
from tablewire.runtime.message_queues import Outbox
from tablewire.runtime.shutdown import run_thread
from tablewire.wire.codec import EXCHANGE_METHOD, EXCHANGE_SERVICE, BatchBuilder, decode_batch
from tablewire.wire.versions import ProtocolVersions

MAX_QUEUED_DISPATCHES: Final = 64
"""For one changefeed at one processor."""
MAX_QUEUED_ROWS: Final = 2**20
"""In the queued dispatches of one changefeed to one processor."""
MAX_ERROR_CHARS: Final = 500

_log = structlog.get_logger("owner.exchange")


@dataclass(frozen=True, slots=True, eq=False)
class LeadershipToken:
    """Permission to call processors, and what every call contains: the owner's revision and all changefeeds that it schedules.

    Compared by identity: the hub makes another one when the revision or the set changes.
    """

    owner_revision: int
    active: tuple[ActiveChangefeed, ...]


@dataclass(slots=True)
class ProcessorClientView:
    """The state of one client, for status and metrics.

    version: of the wire. exchange_s: total duration of the calls that have ended. failing_ms: since the first of the consecutive
    failures, None after a success. last_error stays after a success. in_flight_ms: age of the call under way. queued, dropped:
    messages in the outbox, and those pushed out of it or refused by the codec.
    """

    capture_id: str
    address: str
    version: int
    exchanges: int = 0
    failures: int = 0
    exchange_s: float = 0.0
    consecutive_failures: int = 0
    failing_ms: int | None = None
    last_error: str = ""
    in_flight_ms: int | None = None
    queued: int = 0
    dropped: int = 0


class ProcessorClientHost(Protocol):
    """What a client needs of its hub. Called on the client's thread."""

    @property
    def token(self) -> LeadershipToken | None:
        """None: nothing may be sent."""
        ...

    def start_call(self, token: LeadershipToken, start: Callable[[], grpc.Future]) -> grpc.Future | None:
        """Start the call if this token's revision still leads; check and start are one step. None: it was not started."""
        ...

    def deliver(self, answer: Batch) -> None: ...


class ProcessorClient:
    """send, wake, forget, reset, view, close: any thread, none blocks. The rest belongs to the client's own thread."""

    def __init__(
        self,
        capture: CaptureInfo,
        version: int,
        owner_id: str,
        host: ProcessorClientHost,
        config: OwnerExchangeSection,
        credentials: grpc.ChannelCredentials | CredentialsProvider | None,
        clock: Callable[[], float],
    ) -> None:
        """version: of the wire, which this owner and that processor both support."""
        self.capture, self.version = capture, version
        self._owner_id, self._host, self._config, self._clock = owner_id, host, config, clock
        self._outbox = Outbox(MAX_QUEUED_DISPATCHES, MAX_QUEUED_ROWS)
        self._condition = threading.Condition()
        """Guards all below. Never held while the hub's lock is taken."""
        self._closed = False
        self._call: grpc.Future | None = None
        self._call_at: float | None = None
        self._not_before = 0.0
        self._idle_at = 0.0
        self._confirmed: LeadershipToken | None = None  # the last one under which the processor answered
        self._failing_since: float | None = None
        self._view = ProcessorClientView(capture.id, capture.address, version)
        self._channel = RenewedChannel(capture.address, credentials)
        self.thread = run_thread(f"exchange-{capture.id}", self._run)

    def send(self, messages: Sequence[Message]) -> None:
        self._outbox.put(messages)
        self.wake()

    def wake(self) -> None:
        with self._condition:
            self._condition.notify()

    def forget(self, changefeed: ChangefeedID, changefeed_epoch: int) -> None:
        """Drop what is queued for this run of the changefeed."""
        self._outbox.forget(changefeed, changefeed_epoch)

    def reset(self) -> None:
        """Drop what is queued and cancel the call under way: the term is over."""
        self._outbox.clear()
        with self._condition:
            self._not_before = self._idle_at = 0.0
            call = self._call
        if call is not None:
            call.cancel()

    def close(self) -> None:
        """End the thread soon, without waiting for it. Idempotent."""
        with self._condition:
            self._closed = True
            self._condition.notify()
            call = self._call
        if call is not None:
            call.cancel()

    def view(self) -> ProcessorClientView:
        now = self._clock()
        with self._condition:
            return replace(
                self._view,
                failing_ms=_age_ms(self._failing_since, now),
                in_flight_ms=_age_ms(self._call_at, now),
                queued=len(self._outbox),
                dropped=self._view.dropped + self._outbox.dropped,
            )

    # The client's thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (token := self._wait_for_turn()) is not None:
            self._exchange(token)
        self._channel.close()

    def _wait_for_turn(self) -> LeadershipToken | None:
        """Return the token to call under once a call is due; None when this client is closed."""
        with self._condition:
            while not self._closed:
                token = self._host.token
                wait_s = self._due_at(token) - self._clock() if token is not None else None
                if wait_s is not None and wait_s <= 0:
                    return token
                self._condition.wait(wait_s)
            return None

    def _due_at(self, token: LeadershipToken) -> float:
        # A new active set goes out at once, but not more often than idle calls while the processor does not answer.
        is_new = self._confirmed is not token and not self._view.consecutive_failures
        return self._not_before if is_new or len(self._outbox) else max(self._not_before, self._idle_at)

    def _exchange(self, token: LeadershipToken) -> None:
        """Send one batch and deliver its answer. After anything but a success the next call waits for failure_pause_ms."""
        try:
            request = self._request(token)
            call = self._host.start_call(token, lambda: self._start(request))
            if call is not None:
                answer = self._checked(call.result(), token)
                self._succeeded(token)
                self._host.deliver(answer)
                return
        except grpc.FutureCancelledError:
            pass  # by reset or close
        except grpc.RpcError as error:
            self._failed(f"{error.code().name}: {error.details()}")
            self._channel.renew()
        except CodecError as error:
            self._failed(str(error))
        finally:
            self._ended()
        with self._condition:
            self._not_before = self._clock() + self._config.failure_pause_ms / 1000

    def _request(self, token: LeadershipToken) -> bytes:
        """Encode as much of the outbox as one batch takes; the rest waits for the next one."""
        try:
            builder = BatchBuilder(self._owner_id, self.capture.id, token.owner_revision, token.active, self.version)
        except CodecError as error:
            raise CodecError(f"cannot be sent: {error}") from None
        for _, reason in self._outbox.fill(builder, token.owner_revision):
            with self._condition:
                self._view.dropped += 1
                self._view.last_error = f"a message cannot be sent: {reason}"[:MAX_ERROR_CHARS]
        return builder.finish()

    def _start(self, request: bytes) -> grpc.Future:
        method = self._channel.channel.unary_unary(f"/{EXCHANGE_SERVICE}/{EXCHANGE_METHOD}")
        call = method.future(request, timeout=self._config.timeout_ms / 1000)
        with self._condition:
            self._call, self._call_at = call, self._clock()
            self._view.exchanges += 1
            self._idle_at = self._call_at + self._config.idle_ms / 1000
            closed = self._closed
        if closed:
            call.cancel()
        return call

    def _checked(self, data: bytes, token: LeadershipToken) -> Batch:
        try:
            answer = decode_batch(data, ProtocolVersions(self.version, self.version))
            if (answer.sender, answer.receiver) != (self.capture.id, self._owner_id):
                raise CodecError(f"from {answer.sender!r} to {answer.receiver!r}: not between this owner and this capture")
            if answer.owner_revision != token.owner_revision:
                raise CodecError(f"owner_revision: {answer.owner_revision} is not that of the call, {token.owner_revision}")
        except CodecError as error:
            raise CodecError(f"bad answer: {error}") from None
        return answer

    def _succeeded(self, token: LeadershipToken) -> None:
        with self._condition:
            self._confirmed = token
            failed_for_ms = _age_ms(self._failing_since, self._clock())
            self._view.consecutive_failures, self._failing_since = 0, None
        if failed_for_ms is not None:
            _log.info("exchange_recovered", capture=self.capture.id, failed_for_ms=failed_for_ms)

    def _failed(self, reason: str) -> None:
        reason = reason[:MAX_ERROR_CHARS]
        with self._condition:
            self._view.failures += 1
            self._view.consecutive_failures += 1
            self._view.last_error = reason
            is_first = self._failing_since is None
            if is_first:
                self._failing_since = self._clock()
        if is_first:
            _log.warning("exchange_failed", capture=self.capture.id, address=self.capture.address, error=reason)

    def _ended(self) -> None:
        with self._condition:
            if self._call_at is not None:
                self._view.exchange_s += self._clock() - self._call_at
            self._call = self._call_at = None


def _age_ms(since: float | None, now: float) -> int | None:
    return None if since is None else max(0, round((now - since) * 1000))
