"""One agent: messages of the owner in, calls of the executor and reports out.

`tick` does everything: it takes the messages, applies them to the span table (core/), makes the calls that are due
(executor_driver.py) and reports. It starts no thread and never blocks. The service ticks it when a message has come, when an
executor has asked for it, and from time to time.

An agent accepts only messages for this capture, changefeed and changefeed_epoch, of the newest owner_revision seen, each number n
once and ascending. Dispatches must also be meant for this very agent (processor_epoch). All else is dropped, as if the network
had lost it. It sends one HeartbeatResponse after heartbeats, else a DispatchTableResponse as soon as something changed. Each
echoes the last n that was accepted, and shows its effect.
"""

from __future__ import annotations

import secrets
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field

import structlog

from processor.agent.executor_driver import ExecutorDriver
from processor.core.reports import make_reports
from processor.core.span_table import SpanTable
from processor.core.table_life import REPORTED, ImpossibleInputError, Phase
from tablewire.errors import ClosedError, ConfigError, InvariantError
from tablewire.executor import TableExecutor
from tablewire.model.ids import CaptureID, ChangefeedID
from tablewire.model.liveness import Liveness
from tablewire.model.messages import (
    PROTOCOL_VERSION,
    DispatchTableRequest,
    DispatchTableResponse,
    Heartbeat,
    HeartbeatResponse,
    Message,
    MessageBody,
    SpanReports,
    Transport,
)
from tablewire.model.progress import Barrier, Checkpoint, TableStatus
from tablewire.model.states import TableState

LOGGED_FRAMES = 4
"""The innermost frames of an executor's exception."""

_log = structlog.get_logger("processor.agent")


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """stats_interval_ms: how often the statistics of each span are collected. max_stats_per_tick: the most spans at a time; the
    others follow with the next heartbeats. max_reports_per_message, max_report_bytes: a larger report is sent in chunks (gRPC's
    default limit is 4 MiB). close_timeout_ms: how long `close` waits for an executor without `close`."""

    stats_interval_ms: int = 5_000
    max_stats_per_tick: int = 2_048
    max_reports_per_message: int = 65_536
    max_report_bytes: int = 3 * 2**20
    close_timeout_ms: int = 5_000

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < 1:
                raise ConfigError(f"AgentConfig.{name}: {getattr(self, name)} is less than 1")


@dataclass(slots=True)
class _Owner:
    """The owner that the agent obeys."""

    id: CaptureID
    revision: int
    received: int = 0  # n of the last message that was accepted
    sent: int = 0  # m of the last report
    acked: int = 0  # the m that the next report builds on


@dataclass(slots=True, eq=False, kw_only=True)
class Agent:
    """One changefeed's part of a processor. Not thread-safe: every use comes from one thread.

    It holds nothing at first. The executor belongs to it: a former agent that used it (or another one for the same tables) was
    closed before. clock: seconds, for intervals only.
    """

    capture_id: CaptureID
    changefeed_id: ChangefeedID
    changefeed_epoch: int
    transport: Transport
    executor: InitVar[TableExecutor]
    liveness: Liveness
    config: AgentConfig = AgentConfig()
    clock: Callable[[], float] = time.monotonic
    processor_epoch: int = field(init=False, default_factory=lambda: 1 + secrets.randbelow(2**63 - 1))
    """Random and never 0; new at every start of an agent."""
    _table: SpanTable = field(init=False, default_factory=SpanTable)
    _driver: ExecutorDriver = field(init=False)
    _owner: _Owner | None = field(init=False, default=None)
    _stats_at: float | None = field(init=False, default=None)
    _stats_rows: list[int] = field(init=False, default_factory=list)  # still to be collected in this interval
    _is_closing: bool = field(init=False, default=False)
    _is_closed: bool = field(init=False, default=False)

    def __post_init__(self, executor: TableExecutor) -> None:
        self._driver = ExecutorDriver(executor, self._table)

    @property
    def is_settled(self) -> bool:
        """No call of the executor is due: no span is Preparing or Stopping, and every grant to write has taken effect."""
        return self._table.is_settled()

    def tick(self) -> Barrier | None:
        """Take the messages, drive the executor, report. Return the barrier of the last heartbeat, None if none has arrived since
        the last tick. Raises no operating errors; ClosedError after close."""
        if self._is_closing:
            raise ClosedError(f"the agent of {self.changefeed_id} at {self.capture_id} is closed")
        try:
            barrier = self._take(self.transport.recv())
            self._driver.drive()
            if barrier is not None:
                self._driver.observe()
                self._observe_stats()
        except ImpossibleInputError as error:
            raise InvariantError("the agent's table of rules", str(error)) from error
        self._log_error()
        if self._owner is not None and (barrier is not None or self._table.has_changes):
            self._report(self._owner, is_heartbeat=barrier is not None)
        return barrier

    def close(self) -> None:
        """Stop everything; return once no write can follow. OperatingError if the executor does not stop: writes may still
        follow, and it may be called again. Idempotent."""
        self._is_closing = True
        if not self._is_closed:
            self._driver.close(self.config.close_timeout_ms)
            self.transport.close()
            self._is_closed = True

    def spans(self) -> Sequence[TableStatus]:
        """Return what it holds, as it would report it now."""
        table = self._table
        return [
            TableStatus(
                span=table.spans[row],
                state=REPORTED[Phase(phase)],
                checkpoint=Checkpoint(int(table.checkpoint_ts[row]), int(table.resolved_ts[row]), int(table.last_synced_ts[row])),
                error=table.errors.get(row, ""),
            )
            for row, phase in enumerate(table.phase[: table.size].tolist())
            if phase != Phase.ABSENT
        ]

    def counts(self) -> Mapping[TableState, int]:
        """Return how many spans it holds in each state; cheap."""
        return self._table.counts()

    # Messages --------------------------------------------------------------------------------------------------------

    def _take(self, messages: Sequence[Message]) -> Barrier | None:
        """Apply the messages, in the order in which they were sent, and return the barrier of the last heartbeat."""
        barrier = None
        meant_for_us = [message for message in messages if self._is_for_us(message)]
        for message in sorted(meant_for_us, key=lambda message: (-message.owner_revision, message.number)):
            owner = self._listen_to(message)
            if owner is None or message.number <= owner.received:
                continue
            match message.body:
                case Heartbeat() as heartbeat:
                    owner.received = message.number
                    self._take_heartbeat(owner, heartbeat, message.processor_epoch == self.processor_epoch)
                    barrier = heartbeat.barrier
                case DispatchTableRequest() as request if message.processor_epoch == self.processor_epoch:
                    owner.received = message.number
                    if request.acked:
                        self._acknowledge(owner, max(owner.acked, request.acked))
                    self._table.take(request)
        return barrier

    def _is_for_us(self, message: Message) -> bool:
        return (
            message.version == PROTOCOL_VERSION
            and message.receiver == self.capture_id
            and message.changefeed == self.changefeed_id
            and message.changefeed_epoch == self.changefeed_epoch
            and isinstance(message.body, Heartbeat | DispatchTableRequest)
        )

    def _listen_to(self, message: Message) -> _Owner | None:
        """Return the sender; None if a newer owner is obeyed already."""
        owner = self._owner
        if owner is None or message.owner_revision > owner.revision:
            owner = self._owner = _Owner(message.sender, message.owner_revision)
            self._table.report_everything(to_new_owner=True)
            return owner
        return owner if message.owner_revision == owner.revision else None

    def _take_heartbeat(self, owner: _Owner, heartbeat: Heartbeat, knows_us: bool) -> None:
        """Apply a heartbeat. knows_us: it acknowledges reports of this agent, not of a former one."""
        if heartbeat.by_name:
            self._table.report_everything(to_new_owner=False)
        self._acknowledge(owner, heartbeat.acked if knows_us and not heartbeat.by_name else 0)
        self._table.set_numbers(heartbeat.numbers, heartbeat.spans)
        self._driver.set_barrier(heartbeat.barrier)
        now = self.clock()
        is_due = self._stats_at is None or now - self._stats_at >= self.config.stats_interval_ms / 1000
        # A round that is under way is finished first, else its last spans would starve.
        if (heartbeat.collect_stats or is_due) and not self._stats_rows:
            self._stats_at = now
            self._stats_rows = self._table.rows_in(Phase.REPLICATING)

    def _acknowledge(self, owner: _Owner, acked: int) -> None:
        owner.acked = min(acked, owner.sent)
        if owner.acked:
            self._table.acknowledge(owner.acked)

    def _observe_stats(self) -> None:
        if self._stats_rows:
            limit = self.config.max_stats_per_tick
            self._driver.observe_stats(self._stats_rows[:limit])
            del self._stats_rows[:limit]

    # Reports ---------------------------------------------------------------------------------------------------------

    def _report(self, owner: _Owner, *, is_heartbeat: bool) -> None:
        chunks = make_reports(
            self._table,
            base=owner.acked,
            number=owner.sent + 1,
            max_rows=self.config.max_reports_per_message,
            max_bytes=self.config.max_report_bytes,
        )
        self.transport.send([self._response(owner, chunk, is_heartbeat and not chunk.more) for chunk in chunks])

    def _response(self, owner: _Owner, reports: SpanReports, is_heartbeat: bool) -> Message:
        owner.sent += 1
        body: MessageBody = DispatchTableResponse(reports)
        if is_heartbeat:
            body = HeartbeatResponse(self.liveness.state, self._driver.is_fenced, *self._table.held(), reports)
        return Message(
            sender=self.capture_id,
            receiver=owner.id,
            changefeed=self.changefeed_id,
            owner_revision=owner.revision,
            changefeed_epoch=self.changefeed_epoch,
            processor_epoch=self.processor_epoch,
            number=owner.sent,
            echo=owner.received,
            body=body,
        )

    def _log_error(self) -> None:
        """Log the last exception of the executor, at most one line a tick. The owner gets the texts of all."""
        error, self._driver.last_error = self._driver.last_error, None
        if error is not None:
            where = "".join(traceback.format_exception(error, limit=-LOGGED_FRAMES))
            _log.warning("executor_failed", changefeed=str(self.changefeed_id), capture=self.capture_id, traceback=where)


new_agent = Agent
"""The name of the contract: `new_agent(capture_id=..., ...)` returns an Agent."""
