"""The agents of one capture, behind a real Exchange server: opened and closed by what the owner names, one at a time."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from deploy.local.process import wait_until
from owner.exchange.hub import ExchangeHub
from processor.service.agents import AgentHost, SlotPhase, SlotView
from processor.service.exchange_server import ExchangeServer
from tablewire.errors import OperatingError
from tablewire.executor import TableExecutor
from tablewire.model.ids import CaptureInfo, ChangefeedID
from tablewire.model.liveness import Liveness
from tablewire.model.messages import (
    ActiveChangefeed,
    DispatchTableRequest,
    DispatchTableResponse,
    Heartbeat,
    HeartbeatResponse,
    Message,
    SpanReports,
)
from tablewire.model.progress import Barrier
from tablewire.model.spans import Span, SpanBlock
from tablewire.model.states import DispatchAction, TableState
from tablewire.runtime.message_queues import ChangefeedTransport
from tablewire.testing import FakeTableExecutor

CAPTURE, OWNER = "capture-1", "owner-1"
ORDERS, USERS = ChangefeedID("default", "orders"), ChangefeedID("default", "users")
WAIT_S = 10.0


class Executor(FakeTableExecutor):
    """A fake one whose close can be held."""

    def __init__(self, log: list[str], name: str, may_close: threading.Event) -> None:
        super().__init__()
        self._log, self._name, self._may_close = log, name, may_close

    def close(self) -> None:
        self._log.append(f"closing {self._name}")
        self._may_close.wait(WAIT_S)
        super().close()
        self._log.append(f"closed {self._name}")


class World:
    """A host and the hub of an owner that calls it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.may_open = {ORDERS: threading.Event(), USERS: threading.Event()}
        self.may_close = {ORDERS: threading.Event(), USERS: threading.Event()}
        for event in (*self.may_open.values(), *self.may_close.values()):
            event.set()
        self.error = ""
        self.valid = True
        self.server = ExchangeServer(CAPTURE, "127.0.0.1", 0, exchange_wait_ms=50)
        self.host = AgentHost(
            capture_id=CAPTURE,
            server=self.server,
            open_executor=self._open,
            may_act=lambda: self.valid,
            liveness=Liveness(),
            interval_ms=20,
        )
        self.server.start()
        self.thread = threading.Thread(target=self.host.run, name="agents")
        self.thread.start()
        self.hub = ExchangeHub(OWNER, clock=time.monotonic)
        self.hub.set_term(7)
        self.hub.set_captures({CAPTURE: CaptureInfo(CAPTURE, f"127.0.0.1:{self.server.port}")})

    def activate(self, *active: tuple[ChangefeedID, int]) -> None:
        self.hub.set_active([ActiveChangefeed(*one) for one in active])

    def views(self) -> dict[ChangefeedID, SlotView]:
        return {view.changefeed: view for view in self.host.views()}

    def wait_running(self, *active: tuple[ChangefeedID, int]) -> None:
        def runs() -> bool:
            views = self.views()
            return {(name, view.epoch) for name, view in views.items() if view.phase is SlotPhase.RUNNING} == set(active)

        wait(f"{active} run", runs)

    def close(self) -> None:
        self.hub.close()
        for event in (*self.may_open.values(), *self.may_close.values()):
            event.set()
        self.host.close()
        self.thread.join(WAIT_S)
        self.server.stop(0)
        assert not self.thread.is_alive()

    def _open(self, changefeed: ChangefeedID, epoch: int) -> TableExecutor:
        self.log.append(f"opening {changefeed.id} {epoch}")
        self.may_open[changefeed].wait(WAIT_S)
        if self.error and changefeed == ORDERS:
            raise OperatingError(self.error)
        self.log.append(f"opened {changefeed.id} {epoch}")
        return Executor(self.log, f"{changefeed.id} {epoch}", self.may_close[changefeed])


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def wait(what: str, condition: Callable[[], object]) -> None:
    wait_until(what, lambda: bool(condition()), WAIT_S)


def _ask(transport: ChangefeedTransport, number: int, epoch: int = 1) -> None:
    transport.send([Message(OWNER, CAPTURE, ORDERS, 7, epoch, 0, number, 0, Heartbeat(Barrier(2**63)))])


def _answers(transport: ChangefeedTransport) -> Sequence[Message]:
    return [message for message in transport.recv() if isinstance(message.body, HeartbeatResponse)]


def _first_answer(transport: ChangefeedTransport) -> Message:
    answers: list[Message] = []
    wait("an answer", lambda: answers.extend(transport.recv()) or answers)
    return answers[0]


def _reports(message: Message) -> SpanReports:
    assert isinstance(message.body, HeartbeatResponse | DispatchTableResponse)
    return message.body.reports


def test_agents_follow_the_whole_set_that_the_owner_names(world: World) -> None:
    """Named: opened. No longer named: closed. Nothing else is touched."""
    world.activate((ORDERS, 1), (USERS, 4))
    world.wait_running((ORDERS, 1), (USERS, 4))
    world.activate((USERS, 4))
    world.wait_running((USERS, 4))
    wait("it is forgotten", lambda: ORDERS not in world.views())
    assert world.log.count("opened users 4") == 1
    assert "closing users 4" not in world.log


def test_an_agent_that_runs_answers(world: World) -> None:
    """What the owner sends reaches the agent, and its answer comes back."""
    world.activate((ORDERS, 1))
    world.wait_running((ORDERS, 1))
    transport = world.hub.transport(ORDERS, 1)
    _ask(transport, 1)
    wait("the answer", lambda: _answers(transport))


def test_a_new_epoch_waits_until_the_former_agent_is_closed(world: World) -> None:
    """However long that takes; the other changefeed does not notice."""
    world.activate((ORDERS, 1), (USERS, 1))
    world.wait_running((ORDERS, 1), (USERS, 1))
    world.may_close[ORDERS].clear()
    world.activate((ORDERS, 2), (USERS, 2))
    world.wait_running((USERS, 2))
    assert world.views()[ORDERS].phase is SlotPhase.CLOSING
    assert "opening orders 2" not in world.log
    world.may_close[ORDERS].set()
    world.wait_running((ORDERS, 2), (USERS, 2))
    assert world.log.index("closed orders 1") < world.log.index("opening orders 2")


def test_a_slow_opening_is_its_changefeeds_alone(world: World) -> None:
    """And what it was opened for may be over when it is done: then it is closed again."""
    world.may_open[ORDERS].clear()
    world.activate((ORDERS, 1), (USERS, 1))
    world.wait_running((USERS, 1))
    assert world.views()[ORDERS].phase is SlotPhase.OPENING
    world.activate((USERS, 1))
    world.may_open[ORDERS].set()
    wait("it is closed again", lambda: "closed orders 1" in world.log)
    wait("it is forgotten", lambda: ORDERS not in world.views())


def test_a_changefeed_that_cannot_be_opened_is_tried_again(world: World) -> None:
    """The reason is shown meanwhile, and the others run."""
    world.error = "no plug-in serves orders://"
    world.activate((ORDERS, 1), (USERS, 1))
    wait("the reason", lambda: ORDERS in world.views() and world.views()[ORDERS].error == world.error)
    world.wait_running((USERS, 1))
    world.error = ""
    world.wait_running((ORDERS, 1), (USERS, 1))
    assert world.views()[ORDERS].error == ""


def test_a_changefeed_that_cannot_be_served_is_reported(world: World) -> None:
    """The owner learns that nothing is held here and why nothing can be; an executor that can be made later starts afresh."""
    world.error = "no plug-in serves orders://"
    world.activate((ORDERS, 1))
    transport = world.hub.transport(ORDERS, 1)
    wait("the reason", lambda: ORDERS in world.views() and world.views()[ORDERS].error == world.error)
    _ask(transport, 1)
    first = _first_answer(transport)
    assert len(_reports(first)) == 0
    number, none = np.array([1], np.uint32), np.zeros(1, np.uint64)
    actions = np.array([DispatchAction.ADD_PREPARE], np.uint8)
    add = DispatchTableRequest(number, SpanBlock.of([Span(1)]), actions, none, none, none)
    transport.send([Message(OWNER, CAPTURE, ORDERS, 7, 1, first.processor_epoch, 2, 0, add)])
    refused = _reports(_first_answer(transport))
    assert refused.states.tolist() == [TableState.STOPPED.code]
    assert refused.errors == ((0, f"this processor cannot serve the changefeed: {world.error}"),)
    world.error = ""
    world.wait_running((ORDERS, 1))
    _ask(transport, 3)
    assert _first_answer(transport).processor_epoch != first.processor_epoch


def test_an_unavailable_agent_ends_with_its_epoch(world: World) -> None:
    """A newer epoch is answered for by itself, and an ended changefeed not at all."""
    world.error = "no plug-in serves orders://"
    world.activate((ORDERS, 1))
    wait("it is unavailable", lambda: ORDERS in world.views() and world.views()[ORDERS].error)
    former = world.hub.transport(ORDERS, 1)
    world.activate((ORDERS, 2))
    newer = world.hub.transport(ORDERS, 2)

    def answers() -> bool:
        _ask(newer, next(numbers), epoch=2)
        return bool(_answers(newer))

    numbers = itertools.count(1)
    wait("the newer is answered for", answers)
    _ask(former, 1)
    taken = world.server.stats.received
    wait("two more turns", lambda: world.server.stats.received >= taken + 2)
    assert not _answers(former)
    world.activate()
    wait("it is forgotten", lambda: ORDERS not in world.views())


def test_without_its_lease_nothing_is_opened_or_ticked(world: World) -> None:
    """An Exchange is still answered, so that the owner does not wait, but no agent reports or does anything."""
    world.activate((ORDERS, 1))
    world.wait_running((ORDERS, 1))
    world.valid = False
    transport = world.hub.transport(ORDERS, 1)
    taken = world.server.stats.received
    _ask(transport, 1)
    wait("two more turns", lambda: world.server.stats.received >= taken + 2)
    assert not _answers(transport)
    world.activate((ORDERS, 1), (USERS, 1))
    wait("it was named", lambda: USERS in world.views())
    assert world.views()[USERS].phase is SlotPhase.IDLE
    world.valid = True
    world.wait_running((ORDERS, 1), (USERS, 1))
    wait("the answer", lambda: _answers(transport))


def test_scenario_15_a_former_run_has_no_say(world: World) -> None:
    """Messages of the epoch before a restart find no agent."""
    world.activate((ORDERS, 1))
    world.wait_running((ORDERS, 1))
    former = world.hub.transport(ORDERS, 1)
    world.activate((ORDERS, 2))
    world.wait_running((ORDERS, 2))
    taken = world.server.stats.received
    _ask(former, 1)
    wait("two more turns", lambda: world.server.stats.received >= taken + 2)
    assert not _answers(former)


def test_closing_ends_when_no_write_can_follow(world: World) -> None:
    """The loop runs until the last executor has closed."""
    world.activate((ORDERS, 1), (USERS, 1))
    world.wait_running((ORDERS, 1), (USERS, 1))
    world.may_close[ORDERS].clear()
    world.host.close()
    wait("one has closed", lambda: "closed users 1" in world.log)
    assert world.thread.is_alive()
    world.may_close[ORDERS].set()
    world.thread.join(WAIT_S)
    assert not world.thread.is_alive()
    assert "closed orders 1" in world.log
