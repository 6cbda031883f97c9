"""The agents of one capture: which changefeeds run here, at which epoch, and the loop that ticks them.

The owner's batches name all active changefeeds. The host keeps a slot for each, which is level-triggered: `wanted` is the epoch
that was named last (0: none), and the slot moves towards it one step at a time:

    idle -> opening -> running -> closing -> idle        (a failed opening goes back to idle and is retried later)

Opening (reading etcd, making the executor) and closing (waiting until no write can follow) may block, so each runs on a thread
of its own and posts its result to the loop. An agent never starts before the former one of its changefeed has closed.

Invariant: from a failed opening on (or one that takes longer than SLOW_OPEN_S) until one succeeds, an agent with an
UnavailableExecutor answers the owner for the changefeed: it holds nothing and refuses every span with the reason.

The thread "agents" owns everything here. Calls into a plug-in that block therefore delay their own changefeed only.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

import structlog

from processor.agent.agent import Agent, new_agent
from processor.agent.dispatch_log import DispatchLog
from processor.agent.unavailable_executor import UnavailableExecutor
from processor.service.exchange_server import ExchangeServer, PendingExchange
from tablewire.errors import OperatingError
from tablewire.executor import ExecutorMeter, MeteredTableExecutor, TableExecutor
from tablewire.model.ids import CaptureID, ChangefeedID
from tablewire.model.liveness import Liveness
from tablewire.model.states import TableState
from tablewire.runtime.backoff import Backoff
from tablewire.runtime.message_queues import ChangefeedTransport
from tablewire.runtime.shutdown import run_thread
from tablewire.runtime.uris import redact_uri

RETRY_MIN_S = 0.2
RETRY_MAX_S = 10.0
METER_INTERVAL_S = 1.0
SLOW_OPEN_S = 10.0
"""An opening that takes longer is reported to the owner as a reason; it continues."""

_NO_SPANS: Mapping[TableState, int] = MappingProxyType({})

_log = structlog.get_logger("processor.host")

OpenExecutor = Callable[[ChangefeedID, int], TableExecutor]
"""Read the changefeed at this epoch and make its executor. Blocks; OperatingError when it cannot be made now."""


class SlotPhase(StrEnum):
    IDLE = "idle"
    OPENING = "opening"
    RUNNING = "running"
    CLOSING = "closing"


@dataclass(frozen=True, slots=True)
class SlotView:
    """One changefeed at this processor, for metrics and health. error: why it could not be opened or closed, "" if it could."""

    changefeed: ChangefeedID
    epoch: int
    phase: SlotPhase
    error: str
    spans: Mapping[TableState, int]
    meter: ExecutorMeter | None


@dataclass(slots=True, eq=False)
class _Serving:
    """An agent that answers the owner: that of the executor while the slot is RUNNING, else one that is unavailable."""

    epoch: int
    executor: TableExecutor
    agent: Agent
    transport: ChangefeedTransport
    meter: ExecutorMeter | None = None


@dataclass(slots=True, eq=False)
class _Slot:
    changefeed: ChangefeedID
    wanted: int = 0
    phase: SlotPhase = SlotPhase.IDLE
    epoch: int = 0  # what is being opened, runs or is being closed
    serving: _Serving | None = None
    error: str = ""
    backoff: Backoff = field(default_factory=lambda: Backoff(RETRY_MIN_S, RETRY_MAX_S))
    retry_at: float = 0.0
    opening_since: float = 0.0

    def view(self) -> SlotView:
        running = self.serving if self.phase is SlotPhase.RUNNING else None
        spans, meter = (running.agent.counts(), running.meter) if running is not None else (_NO_SPANS, None)
        return SlotView(self.changefeed, self.epoch or self.wanted, self.phase, self.error, spans, meter)


class AgentHost:
    """run: the thread "agents". views, held_spans, silence_s, close: any thread."""

    def __init__(
        self,
        *,
        capture_id: CaptureID,
        server: ExchangeServer,
        open_executor: OpenExecutor,
        may_act: Callable[[], bool],
        liveness: Liveness,
        interval_ms: int = 2_000,
        unsettled_interval_ms: int = 10,
    ) -> None:
        """may_act: whether this capture's lease is valid at this moment; no agent is ticked while it is not."""
        self._capture_id = capture_id
        self._server = server
        self._open_executor = open_executor
        self._may_act = may_act
        self._liveness = liveness
        self._interval_s = interval_ms / 1000
        self._unsettled_interval_s = unsettled_interval_ms / 1000
        self._slots: dict[ChangefeedID, _Slot] = {}
        self._results: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: list[tuple[PendingExchange, int]] = []  # and how many messages had been sent in its first round
        self._is_settled = True
        self._owner_revision = 0
        self._closing = False
        self._round_at = self._meter_at = time.monotonic()
        self._views: tuple[SlotView, ...] = ()
        self._dispatches = DispatchLog(capture_id)

    # Any thread ------------------------------------------------------------------------------------------------------

    def views(self) -> Sequence[SlotView]:
        """Return the changefeeds as the last round left them, in order."""
        return self._views

    def held_spans(self) -> int:
        """Return how many spans the agents held after the last round."""
        return sum(sum(view.spans.values()) for view in self._views)

    def silence_s(self) -> float:
        """Return the seconds since the last round began: many if a call of an executor does not return."""
        return time.monotonic() - self._round_at

    def close(self) -> None:
        """Make the loop close every agent and then end. Returns at once; idempotent."""
        self._closing = True
        self._server.wake()

    # The thread "agents" ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Return once `close` was called and no agent of this capture can write."""
        while not self._closing or self._slots:
            self._server.wait(self._pause_s())
            self._round_at = time.monotonic()
            arrived = self._server.take()
            for pending in arrived:
                self._receive(pending)
            while not self._results.empty():
                self._results.get_nowait()()
            for slot in list(self._slots.values()):
                self._step(slot)
            serving = [slot.serving for slot in self._slots.values() if slot.serving is not None]
            if self._may_act():
                for one in serving:
                    one.agent.tick()
            self._is_settled = all(one.agent.is_settled for one in serving)
            self._answer(arrived)
            self._publish()

    def _pause_s(self) -> float:
        """Return the longest time until the next round. What settled agents have to do is announced by a wake-up."""
        if not self._is_settled:
            return self._unsettled_interval_s
        retries = [slot.retry_at for slot in self._slots.values() if slot.phase is SlotPhase.IDLE and slot.wanted]
        return max(self._unsettled_interval_s, min([self._interval_s, *(at - time.monotonic() for at in retries)]))

    def _receive(self, pending: PendingExchange) -> None:
        """Note which changefeeds the owner wants, and hand its messages to the agents."""
        batch = pending.batch
        if batch.owner_revision < self._owner_revision or self._closing:
            pending.answer()
            return
        self._owner_revision = batch.owner_revision
        wanted = {active.changefeed: active.epoch for active in batch.active}
        for changefeed in wanted:
            if changefeed not in self._slots:
                self._slots[changefeed] = _Slot(changefeed)
        for changefeed, slot in self._slots.items():
            slot.wanted = wanted.get(changefeed, 0)
        self._dispatches.note(batch)
        self._server.transports.deliver(batch.messages)

    def _answer(self, arrived: Sequence[PendingExchange]) -> None:
        """Answer every Exchange once no agent has work under way; before that, one that waited already if an agent has sent
        something since, which is more than a response to its messages."""
        sent = self._server.outbox.accepted
        for pending, sent_before in self._waiting:
            if sent > sent_before:
                pending.answer()
        self._waiting += [(pending, sent) for pending in arrived]
        if self._is_settled:
            for pending, _ in self._waiting:
                pending.answer()
        self._waiting = [(pending, before) for pending, before in self._waiting if pending.is_open]

    def _publish(self) -> None:
        if time.monotonic() >= self._meter_at:
            self._meter_at = time.monotonic() + METER_INTERVAL_S
            for slot in self._slots.values():
                if slot.serving is not None:
                    slot.serving.meter = meter_of(slot.serving.executor)
        self._views = tuple(slot.view() for _, slot in sorted(self._slots.items()))

    def _step(self, slot: _Slot) -> None:
        """Take the slot's next step towards what is wanted of it."""
        if self._closing:
            slot.wanted = 0
        now = time.monotonic()
        if slot.serving is not None and slot.serving.epoch != slot.wanted:
            self._stop_serving(slot)
        if slot.phase is SlotPhase.OPENING and slot.epoch == slot.wanted and now >= slot.opening_since + SLOW_OPEN_S:
            self._refuse_spans(slot, f"its executor has not been made for {SLOW_OPEN_S:.0f} s")
        if slot.phase is SlotPhase.IDLE and not slot.wanted:
            del self._slots[slot.changefeed]
        elif slot.phase is SlotPhase.IDLE and now >= slot.retry_at and self._may_act():
            slot.phase, slot.epoch, slot.opening_since = SlotPhase.OPENING, slot.wanted, now
            run_thread(f"open {slot.changefeed}", lambda: self._open(slot, slot.epoch))

    def _serve(self, slot: _Slot, executor: TableExecutor) -> None:
        """Answer the owner by an agent with this executor."""
        transport = self._server.transports.open(slot.changefeed, slot.epoch)
        agent = new_agent(
            capture_id=self._capture_id,
            changefeed_id=slot.changefeed,
            changefeed_epoch=slot.epoch,
            transport=transport,
            executor=executor,
            liveness=self._liveness,
        )
        slot.serving = _Serving(slot.epoch, executor, agent, transport)

    def _refuse_spans(self, slot: _Slot, reason: str) -> None:
        """Answer the owner by an agent that refuses every span."""
        if slot.serving is None:
            self._serve(slot, UnavailableExecutor(reason))
        elif isinstance(slot.serving.executor, UnavailableExecutor):
            slot.serving.executor.reason = reason

    def _stop_serving(self, slot: _Slot) -> None:
        assert slot.serving is not None
        serving, slot.serving = slot.serving, None
        serving.transport.close()
        if slot.phase is SlotPhase.RUNNING:
            slot.phase = SlotPhase.CLOSING
            run_thread(f"close {slot.changefeed}", lambda: self._close(slot, serving.agent))
        else:
            serving.agent.close()  # it holds nothing, so this is done at once

    def _opened(self, slot: _Slot, executor: TableExecutor) -> None:
        if slot.serving is not None:
            self._stop_serving(slot)
        slot.backoff.reset()
        slot.error, slot.phase = "", SlotPhase.RUNNING
        self._serve(slot, executor)
        _log.info("agent_started", changefeed=str(slot.changefeed), epoch=slot.epoch, capture=self._capture_id)

    def _open_failed(self, slot: _Slot, error: str) -> None:
        if slot.error != error:
            _log.error("agent_cannot_start", changefeed=str(slot.changefeed), epoch=slot.epoch, error=error)
        pause_s = slot.backoff.next_s()
        if slot.wanted == slot.epoch:
            slot.retry_at = time.monotonic() + pause_s
            self._refuse_spans(slot, error)
        else:
            slot.retry_at = 0.0
        slot.phase, slot.epoch, slot.error = SlotPhase.IDLE, 0, error

    def _closed(self, slot: _Slot) -> None:
        slot.phase, slot.epoch, slot.error = SlotPhase.IDLE, 0, ""
        _log.info("agent_closed", changefeed=str(slot.changefeed), capture=self._capture_id)

    # The threads of a slot -------------------------------------------------------------------------------------------

    def _open(self, slot: _Slot, epoch: int) -> None:
        try:
            executor = self._open_executor(slot.changefeed, epoch)
            self._post(lambda: self._opened(slot, executor))
        except OperatingError as failure:
            error = redact_uri(str(failure))
            self._post(lambda: self._open_failed(slot, error))

    def _close(self, slot: _Slot, agent: Agent) -> None:
        """Close the agent, and retry until that succeeds: no other one may start before, since this one may still write."""
        backoff = Backoff(RETRY_MIN_S, RETRY_MAX_S)
        while True:
            try:
                agent.close()
                break
            except OperatingError as error:
                if not backoff.failures:
                    _log.error("agent_does_not_close", changefeed=str(slot.changefeed), epoch=slot.epoch, error=str(error))
                slot.error = f"does not close: {redact_uri(str(error))}"
                time.sleep(backoff.next_s())
        self._post(lambda: self._closed(slot))

    def _post(self, result: Callable[[], None]) -> None:
        """Make the loop call this."""
        self._results.put(result)
        self._server.wake()


def meter_of(executor: TableExecutor) -> ExecutorMeter | None:
    """Return the figures of an executor; None if it has none, or fails to return them."""
    if not isinstance(executor, MeteredTableExecutor):
        return None
    try:
        return executor.meter()
    except Exception:  # noqa: BLE001 - the border to a user's code: missing figures are no reason to stop
        return None
