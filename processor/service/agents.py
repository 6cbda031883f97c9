"""The agents of one capture: which changefeeds run here, at which epoch, and the loop that ticks them.

The owner's batches name all active changefeeds. For each the host keeps a `Slot`, which is level-triggered: `wanted` is the
epoch that was named last (0: none), and the slot walks towards it, one step at a time:

    idle -> opening -> running -> closing -> idle        (a failed opening goes back to idle and is tried again later)

Opening (reading etcd, making the executor) and closing (waiting until no write can follow) may block, so each runs on a thread
of its own and tells the loop when it is done. An agent never starts before the former one of its changefeed has closed.

Invariant: *from a failed opening on (or one that takes longer than OPEN_PATIENCE_S) until one works, somebody answers the owner
for the changefeed*: a vacant agent, which holds nothing and refuses everything with the reason. It is no phase of its own, since
opening is tried beside it.

One thread, "agents", owns everything here; the threads of a slot only fill its result. What blocks in a plug-in therefore costs
its own changefeed alone.
"""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

import structlog

from processor.agent.agent import Agent, AgentConfig, new_agent
from processor.agent.dispatch_log import DispatchLog
from processor.agent.unavailable_executor import UnavailableExecutor
from processor.service.exchange_server import AgentTransport, ExchangeServer, PendingExchange
from processor.service.executor_plugins import meter_of
from tablewire.errors import OperatingError
from tablewire.executor import ExecutorMeter, TableExecutor
from tablewire.model.ids import CaptureID, ChangefeedID
from tablewire.model.liveness import Liveness
from tablewire.model.messages import Message
from tablewire.model.states import TableState
from tablewire.runtime.shutdown import run_thread
from tablewire.runtime.uris import redact_uri

RETRY_MIN_S = 0.2
RETRY_MAX_S = 10.0
METER_INTERVAL_S = 1.0
OPEN_PATIENCE_S = 10.0
"""An opening that takes longer is told to the owner as a reason; it goes on."""
MAX_OPEN_EXCHANGES = 64
"""Turns that the loop may hold at a time; the handlers give up by themselves after exchange_wait_ms."""

_log = structlog.get_logger("processor.host")

OpenExecutor = Callable[[ChangefeedID, int], TableExecutor]
"""Reads the changefeed at this epoch and makes its executor. Blocks; OperatingError when it cannot be made now."""


class SlotPhase(StrEnum):
    IDLE = "idle"
    OPENING = "opening"
    RUNNING = "running"
    CLOSING = "closing"


@dataclass(frozen=True, slots=True)
class SlotView:
    """One changefeed at this processor, for metrics and the status. error: why it could not be opened or closed, "" = fine."""

    changefeed: ChangefeedID
    epoch: int
    phase: SlotPhase
    error: str
    spans: Mapping[TableState, int] = field(default_factory=lambda: MappingProxyType({}))
    meter: ExecutorMeter | None = None


class _SlotTransport:
    """The agent's transport, closed by the loop and not by the agent (whose close runs on another thread), and counted: what is
    sent after the round in which a batch came is news that its owner waits for."""

    def __init__(self, inner: AgentTransport) -> None:
        self.inner = inner
        self.sent = 0

    def send(self, messages: Sequence[Message]) -> None:
        self.sent += len(messages)
        self.inner.send(messages)

    def recv(self) -> Sequence[Message]:
        return self.inner.recv()

    def close(self) -> None:
        """The loop has done it already."""


@dataclass(slots=True, eq=False)
class _Slot:
    changefeed: ChangefeedID
    wanted: int = 0
    epoch: int = 0
    phase: SlotPhase = SlotPhase.IDLE
    agent: Agent | None = None
    transport: _SlotTransport | None = None
    executor: TableExecutor | None = None
    meter: ExecutorMeter | None = None
    failures: int = 0
    retry_at: float = 0.0
    patient_until: float = 0.0
    error: str = ""
    vacancy: UnavailableExecutor | None = None  # the agent's executor, while it is a vacant one
    vacant_epoch: int = 0


@dataclass(frozen=True, slots=True)
class _Opened:
    slot: _Slot
    executor: TableExecutor | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class _Closed:
    slot: _Slot


@dataclass(slots=True)
class _Turn:
    """An Exchange that waits, and what had been sent when its messages had been taken in."""

    pending: PendingExchange
    sent: int = -1


class AgentHost:
    """run: the thread "agents". close, closed, views: any thread."""

    def __init__(
        self,
        *,
        capture_id: CaptureID,
        server: ExchangeServer,
        open_executor: OpenExecutor,
        may_act: Callable[[], bool],
        liveness: Liveness,
        interval_ms: int = 50,
        unsettled_interval_ms: int = 10,
        agent_config: AgentConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """may_act: whether this capture's lease can be relied on at this moment; while it cannot, no agent is ticked."""
        self._capture_id = capture_id
        self._server = server
        self._open_executor = open_executor
        self._may_act = may_act
        self._liveness = liveness
        self._interval_s = interval_ms / 1000
        self._unsettled_interval_s = unsettled_interval_ms / 1000
        self._agent_config = agent_config if agent_config is not None else AgentConfig()
        self._clock = clock
        self._slots: dict[ChangefeedID, _Slot] = {}
        self._results: queue.SimpleQueue[_Opened | _Closed] = queue.SimpleQueue()
        self._turns: list[_Turn] = []
        self._owner_revision = 0
        self._sent = 0
        self._closing = False
        self._round_at = clock()
        self._views: tuple[SlotView, ...] = ()
        self._meter_at = 0.0
        self._orders = DispatchLog(capture_id)
        self._jitter = random.Random()

    # -- any thread ---------------------------------------------------------------------------------------------------

    def views(self) -> Sequence[SlotView]:
        """What the last round left, by changefeed."""
        return self._views

    def held_spans(self) -> int:
        """How many spans the agents held after the last round."""
        return sum(sum(view.spans.values()) for view in self._views)

    def silence_s(self) -> float:
        """Seconds since the last round began: long when a call of an executor does not return."""
        return self._clock() - self._round_at

    @property
    def exchanges(self) -> int:
        return self._server.stats.received

    def close(self) -> None:
        """Asks the loop to close every agent and to end then. Returns at once; idempotent."""
        self._closing = True
        self._server.wake()

    # -- the thread "agents" ------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Returns once `close` was called and no agent of this capture can write any more."""
        while True:
            self._server.wait(self._pause_s())
            self._round_at = self._clock()
            for pending in self._server.take():
                self._take(pending)
            self._take_results()
            if self._closing:
                for slot in self._slots.values():
                    slot.wanted = 0
            for slot in list(self._slots.values()):
                self._step(slot)
            if self._may_act():
                self._tick()
            self._answer()
            self._publish()
            if self._closing and not self._slots:
                return

    def _pause_s(self) -> float:
        agents = [slot.agent for slot in self._slots.values() if slot.agent is not None]
        return self._interval_s if all(agent.is_settled for agent in agents) else self._unsettled_interval_s

    def _take(self, pending: PendingExchange) -> None:
        batch = pending.batch
        if batch.owner_revision < self._owner_revision or self._closing:
            pending.answer()
            return
        self._owner_revision = batch.owner_revision
        active = {one.changefeed: one.epoch for one in batch.active}
        for slot in self._slots.values():
            slot.wanted = active.get(slot.changefeed, 0)
        for changefeed, epoch in active.items():
            if changefeed not in self._slots:
                self._slots[changefeed] = _Slot(changefeed, epoch)
        self._orders.note(batch)
        self._server.deliver(batch)
        self._turns.append(_Turn(pending))

    def _tick(self) -> None:
        for slot in self._slots.values():
            if slot.agent is not None and slot.transport is not None:
                slot.agent.tick()
                self._sent += slot.transport.sent
                slot.transport.sent = 0

    def _answer(self) -> None:
        """A turn is answered when no agent has anything under way, or as soon as one has said more than that it took it in."""
        settled = all(slot.agent.is_settled for slot in self._slots.values() if slot.agent is not None)
        waiting = []
        for turn in self._turns:
            if settled or (turn.sent >= 0 and self._sent > turn.sent):
                turn.pending.answer()
            elif turn.pending.is_open:
                turn.sent = self._sent
                waiting.append(turn)
        for turn in waiting[:-MAX_OPEN_EXCHANGES]:
            turn.pending.answer()
        self._turns = waiting[-MAX_OPEN_EXCHANGES:]

    def _publish(self) -> None:
        if self._clock() >= self._meter_at:
            self._meter_at = self._clock() + METER_INTERVAL_S
            for slot in self._slots.values():
                slot.meter = meter_of(slot.executor) if slot.executor is not None else None
        self._views = tuple(
            SlotView(
                slot.changefeed,
                slot.epoch or slot.wanted,
                slot.phase,
                slot.error,
                slot.agent.counts() if slot.agent is not None and slot.phase is SlotPhase.RUNNING else MappingProxyType({}),
                slot.meter,
            )
            for _, slot in sorted(self._slots.items())
        )

    # -- the slots ----------------------------------------------------------------------------------------------------

    def _step(self, slot: _Slot) -> None:
        if slot.phase is SlotPhase.RUNNING and slot.wanted != slot.epoch:
            self._start_closing(slot)
        if slot.vacancy is not None and slot.vacant_epoch != slot.wanted:
            self._end_vacancy(slot)
        if slot.phase is SlotPhase.OPENING and slot.epoch == slot.wanted and self._clock() >= slot.patient_until:
            self._be_vacant(slot, f"its executor has not been made for {OPEN_PATIENCE_S:.0f} s")
        if slot.phase is SlotPhase.IDLE and not slot.wanted:
            del self._slots[slot.changefeed]
        elif slot.phase is SlotPhase.IDLE and self._clock() >= slot.retry_at and self._may_act():
            slot.phase, slot.epoch = SlotPhase.OPENING, slot.wanted
            slot.patient_until = self._clock() + OPEN_PATIENCE_S
            changefeed, epoch = slot.changefeed, slot.wanted
            run_thread(f"open {changefeed}", lambda: self._open(slot, changefeed, epoch))

    def _take_results(self) -> None:
        while not self._results.empty():
            match self._results.get_nowait():
                case _Opened(slot, executor, error):
                    self._opened(slot, executor, error)
                case _Closed(slot):
                    slot.phase, slot.epoch, slot.error = SlotPhase.IDLE, 0, ""
                    _log.info("agent_closed", changefeed=str(slot.changefeed), capture=self._capture_id)

    def _opened(self, slot: _Slot, executor: TableExecutor | None, error: str) -> None:
        if executor is None:
            self._failed(slot, error)
            return
        self._end_vacancy(slot)
        slot.failures, slot.error, slot.phase, slot.executor = 0, "", SlotPhase.RUNNING, executor
        self._start_agent(slot, executor, slot.epoch)
        _log.info("agent_started", changefeed=str(slot.changefeed), epoch=slot.epoch, capture=self._capture_id)

    def _failed(self, slot: _Slot, error: str) -> None:
        if slot.error != error:
            _log.error("agent_cannot_start", changefeed=str(slot.changefeed), epoch=slot.epoch, error=error)
        pause_s = min(RETRY_MAX_S, RETRY_MIN_S * 2 ** min(slot.failures, 10)) * self._jitter.uniform(0.5, 1.0)
        slot.retry_at = self._clock() + pause_s if slot.wanted == slot.epoch else 0.0
        slot.failures += 1
        if slot.wanted == slot.epoch:
            self._be_vacant(slot, error)
        slot.phase, slot.epoch, slot.error = SlotPhase.IDLE, 0, error

    def _start_agent(self, slot: _Slot, executor: TableExecutor, epoch: int) -> None:
        slot.transport = _SlotTransport(self._server.transport(slot.changefeed, epoch))
        slot.agent = new_agent(
            capture_id=self._capture_id,
            changefeed_id=slot.changefeed,
            changefeed_epoch=epoch,
            transport=slot.transport,
            executor=executor,
            liveness=self._liveness,
            config=self._agent_config,
        )

    def _be_vacant(self, slot: _Slot, reason: str) -> None:
        if slot.vacancy is not None:
            slot.vacancy.reason = reason
            return
        slot.vacancy, slot.vacant_epoch = UnavailableExecutor(reason), slot.epoch
        self._start_agent(slot, slot.vacancy, slot.epoch)

    def _end_vacancy(self, slot: _Slot) -> None:
        if slot.vacancy is None or slot.agent is None or slot.transport is None:
            return
        slot.transport.inner.close()
        slot.agent.close()  # at once: it holds nothing
        slot.agent, slot.transport, slot.vacancy, slot.vacant_epoch = None, None, None, 0

    def _start_closing(self, slot: _Slot) -> None:
        agent, transport = slot.agent, slot.transport
        assert agent is not None
        assert transport is not None
        transport.inner.close()
        slot.phase, slot.agent, slot.transport, slot.executor, slot.meter = SlotPhase.CLOSING, None, None, None, None
        run_thread(f"close {slot.changefeed}", lambda: self._close(slot, agent))

    # -- the threads of a slot ----------------------------------------------------------------------------------------

    def _open(self, slot: _Slot, changefeed: ChangefeedID, epoch: int) -> None:
        try:
            result = _Opened(slot, self._open_executor(changefeed, epoch))
        except OperatingError as error:
            result = _Opened(slot, None, redact_uri(str(error)))
        self._results.put(result)
        self._server.wake()

    def _close(self, slot: _Slot, agent: Agent) -> None:
        """Until it has worked: no other agent of this changefeed may start before, and this one may still write."""
        failures = 0
        while True:
            try:
                agent.close()
                break
            except OperatingError as error:
                if failures == 0:
                    _log.error("agent_does_not_close", changefeed=str(slot.changefeed), epoch=slot.epoch, error=str(error))
                slot.error = f"does not close: {redact_uri(str(error))}"
                failures += 1
                time.sleep(min(RETRY_MAX_S, RETRY_MIN_S * 2 ** min(failures, 10)))
        self._results.put(_Closed(slot))
        self._server.wake()
