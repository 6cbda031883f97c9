"""The face of one agent: messages of the owner in, calls of the executor, reports out.

`tick` does everything: it takes the messages, applies them to the table (core/), makes the calls that are due (driver.py)
and reports. It starts no thread and never blocks; the service ticks it when a message has come, when an executor has
asked for it, and from time to time.

What is taken in: only messages for this capture, changefeed and changefeed_epoch, of the newest owner_revision that was seen,
each number n once and ascending. Dispatches also have to be meant for this very agent (processor_epoch). All else is dropped, as
if the network had lost it. What is said: one HeartbeatResponse after heartbeats, else a DispatchTableResponse as soon as
there is something to tell; each echoes the last n that was taken in, and therefore shows it.
"""

from __future__ import annotations

import secrets
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
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
"""Of an executor's exception: the innermost ones."""

_LOG = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """stats_interval_ms: how often each span's statistics are collected. max_stats_per_tick: of at most so many spans at once,
    the others follow with the next heartbeats. max_reports_per_message, max_report_bytes: a larger report goes out in chunks
    (gRPC takes 4 MiB unless told otherwise). close_timeout_ms: how long `close` waits for an executor without `close`."""

    stats_interval_ms: int = 5_000
    max_stats_per_tick: int = 2_048
    max_reports_per_message: int = 65_536
    max_report_bytes: int = 3 * 2**20
    close_timeout_ms: int = 5_000

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < 1:
                raise ConfigError(f"AgentConfig.{name}: {getattr(self, name)} is less than 1")


class Agent(Protocol):
    """One changefeed's part of a processor. Not thread-safe: every use comes from one thread."""

    @property
    def processor_epoch(self) -> int:
        """Random and never 0; new at every start of an agent."""
        ...

    @property
    def is_settled(self) -> bool:
        """No call of the executor is due: no span is Preparing or Stopping, and no permission to write waits to take effect."""
        ...

    def tick(self) -> Barrier | None:
        """Takes what has come, drives the executor, reports. The barrier of the last heartbeat; None: none has arrived since the
        last tick. Expected trouble does not raise; ClosedError after close."""
        ...

    def spans(self) -> Sequence[TableStatus]:
        """What it holds, as it would report it now."""
        ...

    def counts(self) -> Mapping[TableState, int]:
        """How many spans it holds in each state; cheap."""
        ...

    def close(self) -> None:
        """Stops everything; returns once no write can follow any more. OperatingError when the executor does not get there: then
        writes may still follow, and it may be called again. Idempotent."""
        ...


def new_agent(
    *,
    capture_id: CaptureID,
    changefeed_id: ChangefeedID,
    changefeed_epoch: int,
    transport: Transport,
    executor: TableExecutor,
    liveness: Liveness,
    config: AgentConfig = AgentConfig(),
    clock: Callable[[], float] = time.monotonic,
) -> Agent:
    """An agent that holds nothing, under a new processor_epoch. clock: seconds, for intervals alone.

    The executor is the agent's own: a former agent that used it (or another one for the same tables) was closed before.
    """
    return _Agent(
        capture_id=capture_id,
        changefeed_id=changefeed_id,
        changefeed_epoch=changefeed_epoch,
        transport=transport,
        executor=executor,
        liveness=liveness,
        config=config,
        clock=clock,
        processor_epoch=1 + secrets.randbelow(2**63 - 1),
    )


@dataclass(slots=True)
class _Owner:
    """The owner that is listened to."""

    id: CaptureID
    revision: int
    received: int = 0  # n of the last message that was taken in
    sent: int = 0  # m of the last report
    acked: int = 0  # the m that the next report builds on


class _Agent:
    def __init__(
        self,
        *,
        capture_id: CaptureID,
        changefeed_id: ChangefeedID,
        changefeed_epoch: int,
        transport: Transport,
        executor: TableExecutor,
        liveness: Liveness,
        config: AgentConfig,
        clock: Callable[[], float],
        processor_epoch: int,
    ) -> None:
        self._capture_id = capture_id
        self._changefeed_id = changefeed_id
        self._changefeed_epoch = changefeed_epoch
        self._processor_epoch = processor_epoch
        self._transport = transport
        self._liveness = liveness
        self._config = config
        self._clock = clock
        self._table = SpanTable()
        self._driver = ExecutorDriver(executor, self._table)
        self._owner: _Owner | None = None
        self._stats_at: float | None = None
        self._stats_rows: list[int] = []  # whose statistics are still to be collected in this interval
        self._is_closing = self._is_closed = False

    @property
    def processor_epoch(self) -> int:
        return self._processor_epoch

    @property
    def is_settled(self) -> bool:
        return self._table.is_settled()

    def tick(self) -> Barrier | None:
        if self._is_closing:
            raise ClosedError(f"the agent of {self._changefeed_id} at {self._capture_id} is closed")
        try:
            barrier = self._take(self._transport.recv())
            self._driver.drive()
            if barrier is not None:
                self._driver.observe()
                self._observe_stats()
        except ImpossibleInputError as error:
            raise InvariantError("the agent's table of rules", str(error)) from error
        self._log_error()
        if self._owner is not None and (barrier is not None or self._table.has_news):
            self._report(self._owner, is_heartbeat=barrier is not None)
        return barrier

    def close(self) -> None:
        self._is_closing = True
        if not self._is_closed:
            self._driver.close(self._config.close_timeout_ms)
            self._transport.close()
            self._is_closed = True

    def spans(self) -> Sequence[TableStatus]:
        table = self._table
        rows = np.flatnonzero(table.phase[: table.size] != Phase.ABSENT).tolist()
        return [
            TableStatus(
                span=table.spans[row],
                state=REPORTED[Phase(table.phase[row])],
                checkpoint=Checkpoint(int(table.checkpoint_ts[row]), int(table.resolved_ts[row]), int(table.last_synced_ts[row])),
                error=table.errors.get(row, ""),
            )
            for row in rows
        ]

    def counts(self) -> Mapping[TableState, int]:
        by_phase = np.bincount(self._table.phase[: self._table.size], minlength=len(Phase)).tolist()
        counts: Counter[TableState] = Counter()
        for phase in Phase:
            if phase is not Phase.ABSENT:
                counts[REPORTED[phase]] += by_phase[phase]
        return counts

    # Messages ------------------------------------------------------------------------------------------------------

    def _take(self, messages: Sequence[Message]) -> Barrier | None:
        """Applies them; the barrier of the last heartbeat. What one recv brings is put into its order first: nothing is lost that
        only came in another one."""
        barrier = None
        meant_for_us = [message for message in messages if self._is_for_us(message)]
        for message in sorted(meant_for_us, key=lambda message: (-message.owner_revision, message.number)):
            owner = self._listen_to(message)
            if owner is None or message.number <= owner.received:
                continue
            match message.body:
                case Heartbeat() as heartbeat:
                    owner.received = message.number
                    self._take_heartbeat(owner, heartbeat, message.processor_epoch == self._processor_epoch)
                    barrier = heartbeat.barrier
                case DispatchTableRequest() as request if message.processor_epoch == self._processor_epoch:
                    owner.received = message.number
                    if request.acked:
                        self._acknowledge(owner, max(owner.acked, request.acked))
                    self._table.take(request)
        return barrier

    def _is_for_us(self, message: Message) -> bool:
        return (
            message.version == PROTOCOL_VERSION
            and message.receiver == self._capture_id
            and message.changefeed == self._changefeed_id
            and message.changefeed_epoch == self._changefeed_epoch
            and isinstance(message.body, Heartbeat | DispatchTableRequest)
        )

    def _listen_to(self, message: Message) -> _Owner | None:
        """The owner that speaks; None if a newer one has spoken already."""
        owner = self._owner
        if owner is None or message.owner_revision > owner.revision:
            owner = self._owner = _Owner(message.sender, message.owner_revision)
            self._table.tell_everything(new_owner=True)
            return owner
        return owner if message.owner_revision == owner.revision else None

    def _take_heartbeat(self, owner: _Owner, heartbeat: Heartbeat, knows_us: bool) -> None:
        """knows_us: what it acknowledges are reports of this agent, not of a former one or of none."""
        if heartbeat.by_name:
            self._table.tell_everything(new_owner=False)
        self._acknowledge(owner, heartbeat.acked if knows_us and not heartbeat.by_name else 0)
        self._table.set_numbers(heartbeat.numbers, heartbeat.spans)
        self._driver.set_barrier(heartbeat.barrier)
        interval = self._config.stats_interval_ms / 1000
        now = self._clock()
        is_due = heartbeat.collect_stats or self._stats_at is None or now - self._stats_at >= interval
        if is_due and not self._stats_rows:  # a round that is under way is finished first, else its last spans would starve
            self._stats_at = now
            self._stats_rows = self._table.rows_in(Phase.REPLICATING)

    def _acknowledge(self, owner: _Owner, acked: int) -> None:
        owner.acked = min(acked, owner.sent)
        if owner.acked:
            self._table.acknowledge(owner.acked)

    def _observe_stats(self) -> None:
        if self._stats_rows:
            limit = self._config.max_stats_per_tick
            self._driver.observe_stats(self._stats_rows[:limit])
            del self._stats_rows[:limit]

    # Reports -------------------------------------------------------------------------------------------------------

    def _report(self, owner: _Owner, *, is_heartbeat: bool) -> None:
        chunks = make_reports(
            self._table,
            base=owner.acked,
            number=owner.sent + 1,
            max_rows=self._config.max_reports_per_message,
            max_bytes=self._config.max_report_bytes,
        )
        messages = []
        for chunk in chunks:
            owner.sent += 1
            messages.append(self._message(owner, self._body(chunk, is_heartbeat and not chunk.more)))
        self._transport.send(messages)

    def _body(self, reports: SpanReports, is_heartbeat: bool) -> MessageBody:
        if not is_heartbeat:
            return DispatchTableResponse(reports)
        held, checksum = self._table.held()
        return HeartbeatResponse(self._liveness.state, self._driver.is_fenced, held, checksum, reports)

    def _message(self, owner: _Owner, body: MessageBody) -> Message:
        return Message(
            sender=self._capture_id,
            receiver=owner.id,
            changefeed=self._changefeed_id,
            owner_revision=owner.revision,
            changefeed_epoch=self._changefeed_epoch,
            processor_epoch=self._processor_epoch,
            number=owner.sent,
            echo=owner.received,
            body=body,
        )

    def _log_error(self) -> None:
        """At most one line a tick: the last exception of the executor and where it came from. The owner gets the texts of all."""
        error, self._driver.last_error = self._driver.last_error, None
        if error is not None:
            where = "".join(traceback.format_exception(error, limit=-LOGGED_FRAMES))
            _LOG.warning("executor_failed", changefeed=str(self._changefeed_id), capture=self._capture_id, traceback=where)
