"""One agent, its fake executor, and an owner that is a script: it sends what a test asks for and records what it receives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from processor import Agent, AgentConfig, new_agent
from tablewire import Barrier, ChangefeedID, Liveness, Span, TableState, Ts
from tablewire.executor import TableExecutor
from tablewire.model.messages import (
    DispatchTableRequest,
    DispatchTableResponse,
    Heartbeat,
    HeartbeatResponse,
    Message,
    MessageBody,
    SpanReports,
    join_reports,
)
from tablewire.model.spans import SpanBlock
from tablewire.model.states import DispatchAction
from tablewire.testing import FakeTableExecutor, LoopbackNetwork

CHANGEFEED = ChangefeedID("default", "orders")
CHANGEFEED_EPOCH = 3
REVISION = 7


@dataclass(frozen=True)
class Known:
    """What has been reported of a span."""

    state: TableState
    checkpoint_ts: Ts
    resolved_ts: Ts
    epoch: int
    error: str


class OwnerScript:
    """An owner of one capture that applies reports by the contract, and decides nothing."""

    def __init__(self, network: LoopbackNetwork, revision: int = REVISION, node_id: str = "owner", capture: str = "a") -> None:
        self.transport = network.transport(node_id)
        self.revision, self.node_id, self.capture = revision, node_id, capture
        self.sent = self.processor_epoch = self.received = self.acked = self.echo = 0
        self.numbers: dict[Span, int] = {}
        self.known: dict[Span, Known] = {}
        self.messages: list[Message] = []  # of the last take
        self.applied: list[tuple[int, SpanReports]] = []  # (m, whole report), all of them
        self.response: HeartbeatResponse | None = None  # the last one
        self._chunks: list[SpanReports] = []

    def send(self, body: MessageBody, *, number: int | None = None, **envelope: object) -> None:
        if number is None:
            self.sent += 1
            number = self.sent
        fields: dict[str, object] = {
            "sender": self.node_id,
            "receiver": self.capture,
            "changefeed": CHANGEFEED,
            "owner_revision": self.revision,
            "changefeed_epoch": CHANGEFEED_EPOCH,
            "processor_epoch": self.processor_epoch,
            "number": number,
            "echo": 0,
            "body": body,
        }
        self.transport.send([Message(**{**fields, **envelope})])  # type: ignore[arg-type]

    def heartbeat(self, *, acked: int | None = None, barrier: Ts = 2**40, number: int | None = None, **fields: object) -> None:
        body = Heartbeat(Barrier(barrier), acked=self.acked if acked is None else acked, **fields)  # type: ignore[arg-type]
        self.send(body, number=number)

    def number_of(self, span: Span) -> int:
        return self.numbers.setdefault(span, len(self.numbers) + 1)

    def request(
        self, action: DispatchAction, spans: Sequence[Span], ts: Ts = 0, epoch: int = 0, acked: int = 0
    ) -> DispatchTableRequest:
        n_spans = len(spans)
        return DispatchTableRequest(
            numbers=np.array([self.number_of(span) for span in spans], np.uint32),
            spans=SpanBlock.of(spans),
            actions=np.full(n_spans, action, np.uint8),
            checkpoint_ts=np.full(n_spans, ts, np.uint64),
            resolved_ts=np.full(n_spans, ts, np.uint64),
            assignment_epochs=np.full(n_spans, epoch, np.uint64),
            acked=acked,
        )

    def prepare(self, *spans: Span, ts: Ts = 100, acked: int = 0) -> None:
        self.send(self.request(DispatchAction.ADD_PREPARE, spans, ts, acked=acked))

    def write(self, *spans: Span, ts: Ts = 100, epoch: int = 1) -> None:
        self.send(self.request(DispatchAction.ADD_WRITE, spans, ts, epoch))

    def remove(self, *spans: Span) -> None:
        self.send(self.request(DispatchAction.REMOVE, spans))

    def take(self) -> None:
        self.messages = list(self.transport.recv())
        for message in sorted(self.messages, key=lambda message: message.number):
            self._take(message)

    def _take(self, message: Message) -> None:
        body = message.body
        assert isinstance(body, HeartbeatResponse | DispatchTableResponse)
        if message.owner_revision != self.revision:
            return
        if message.processor_epoch != self.processor_epoch:
            if self.processor_epoch and message.echo <= self.echo:
                return
            self.processor_epoch, self.received, self.acked, self._chunks = message.processor_epoch, 0, 0, []
        if message.number <= self.received:
            return
        follows = message.number == self.received + 1
        self.received, self.echo = message.number, max(self.echo, message.echo)
        if isinstance(body, HeartbeatResponse):
            self.response = body
        chunk = body.reports
        if not follows:
            self._chunks = []
        self._chunks.append(chunk)
        if chunk.more:
            return
        report, self._chunks = join_reports(self._chunks), []
        if report.base > self.acked:
            return
        self.acked = message.number
        self._apply(report)
        self.applied.append((message.number, report))

    def _apply(self, report: SpanReports) -> None:
        if report.base == 0:
            self.known.clear()
        by_number = {number: span for span, number in self.numbers.items()}
        named = iter(report.spans)
        errors = dict(report.errors)
        for row in range(len(report)):
            number = int(report.numbers[row])
            span = by_number[number] if number else next(named)
            state = TableState.from_code(int(report.states[row]))
            self.known.pop(span, None)
            if state is not TableState.ABSENT:
                self.known[span] = Known(
                    TableState(state),
                    int(report.checkpoint_ts[row]),
                    int(report.resolved_ts[row]),
                    int(report.assignment_epochs[row]),
                    errors.get(row, ""),
                )


class World:
    """An owner script and an agent on one network; `clock` is theirs to move."""

    def __init__(
        self,
        executor: TableExecutor | None = None,
        *,
        seed: int = 0,
        config: AgentConfig = AgentConfig(),  # noqa: B008
        meet: bool = True,
    ) -> None:
        self.network = LoopbackNetwork(seed)
        self.now = 0.0
        self.config = config
        self.liveness = Liveness()
        self.executor = executor if executor is not None else FakeTableExecutor()
        self.owner = OwnerScript(self.network)
        self.agent = self.start_agent()
        if meet:
            self.owner.heartbeat()
            self.step()

    @property
    def fake(self) -> FakeTableExecutor:
        assert isinstance(self.executor, FakeTableExecutor)
        return self.executor

    def start_agent(self, executor: TableExecutor | None = None) -> Agent:
        """A new agent in the same process slot."""
        self.executor = executor if executor is not None else self.executor
        self.agent = new_agent(
            capture_id="a",
            changefeed_id=CHANGEFEED,
            changefeed_epoch=CHANGEFEED_EPOCH,
            transport=self.network.transport("a"),
            executor=self.executor,
            liveness=self.liveness,
            config=self.config,
            clock=lambda: self.now,
        )
        return self.agent

    def step(self) -> Barrier | None:
        """Tick the agent, then let the owner take its messages."""
        barrier = self.agent.tick()
        check(self.agent)
        self.owner.take()
        return barrier

    def beat(self) -> None:
        """A heartbeat, and its answer."""
        self.owner.heartbeat()
        self.step()

    def state(self, span: Span) -> TableState:
        """What the owner believes."""
        known = self.owner.known.get(span)
        return TableState.ABSENT if known is None else known.state

    def replicate(self, *spans: Span, ts: Ts = 100, epoch: int = 1) -> None:
        self.owner.prepare(*spans, ts=ts)
        self.step()
        self.owner.write(*spans, ts=ts, epoch=epoch)
        self.step()
        self.beat()

    def calls(self, name: str) -> list[Span]:
        return [call.span for call in self.fake.calls if call.name == name]


def check(agent: Agent) -> None:
    """The agent's own invariants."""
    agent._table.check()  # type: ignore[attr-defined]


@pytest.fixture
def make_world() -> type[World]:
    return World


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def make_owner() -> type[OwnerScript]:
    return OwnerScript
