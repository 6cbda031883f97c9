"""The nodes of the simulation: processes with their leases, and owners with their views of the
cluster."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from owner.core.scheduler_config import SchedulerConfig
from owner.core.state import Core
from owner.scheduling.scheduler import SchedulerAndInfo
from processor.agent.agent import Agent
from tablewire.model.ids import CaptureInfo, Ts
from tablewire.model.liveness import Liveness
from tablewire.model.spans import Span
from tests.sim.network import SimTransport
from tests.sim.sink import SimExecutor, UnfencedSimExecutor

TICK_S = 0.1
LEASE_S = 1.5
FENCE_MARGIN_S = 0.3
DEATH_SEEN_LATE_S = 1.5


@dataclass(slots=True)
class Process:
    """One processor: an agent and its executor."""

    id: str
    agent: Agent
    transport: SimTransport
    executor: SimExecutor | UnfencedSimExecutor
    liveness: Liveness
    changefeed_epoch: int
    paused_until: float = 0.0
    cut_off_until: float = 0.0  # from etcd: it cannot renew its lease, and knows it by its clock
    hung_until: float = 0.0  # its agent does nothing; its lease and its executor continue
    stalled_until: float = 0.0  # its executor writes nothing
    is_zombie: bool = False  # it does not notice the end of its lease; only the sink stops it
    restarts_at: float = 0.0  # when it notices that the changefeed was started again
    lags: float = 0.0  # how much slower than the source it writes
    found_empty: int = 0


@dataclass(slots=True)
class Lease:
    """A registration in etcd. ended_at: when it disappeared."""

    since: float
    until: float
    ended_at: float | None = None


@dataclass(slots=True)
class Owner:
    """One scheduler and its view of the cluster: deaths are seen late, and (with fenced executors
    only) living captures are missed."""

    id: str
    revision: int
    changefeed_epoch: int
    scheduler: SchedulerAndInfo
    config: SchedulerConfig
    paused_until: float = 0.0
    frozen_at: float | None = None  # it is deposed, and knows no capture that joined later
    frozen_tables: list[int] | None = None
    frozen_checkpoint_ts: Ts = 0
    lags: dict[str, float] = field(default_factory=dict)  # capture -> the delay with which its death is seen
    blind_until: dict[str, float] = field(default_factory=dict)  # capture -> the time until which it is missed
    # state of the oracle after the last tick
    was_initialized: bool = False
    numbers: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint32))
    checkpoints: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    planned: frozenset[int] = frozenset()  # numbers of the rows that are being moved
    adds: dict[tuple[str, Span], int] = field(default_factory=dict)  # number of the last Add, while it may still arrive
    waiting: dict[int, int] = field(default_factory=dict)  # number of a row that could be added -> ticks
    undetermined: dict[int, frozenset[int]] = field(default_factory=dict)  # number of a row -> captures that may still hold it
    stopping: frozenset[tuple[int, int]] = frozenset()  # (number of a row, Primary that was sent a remove for a move)
    proceeding: bool = False  # there was a watermark for the present tables

    @property
    def core(self) -> Core:
        core: Core = self.scheduler._core  # type: ignore[attr-defined]
        return core

    def sees(self, leases: dict[str, Lease], now: float, source: random.Random) -> dict[str, CaptureInfo]:
        """Return the captures that this owner considers alive."""
        alive = {}
        for id, lease in leases.items():
            if self.frozen_at is not None and lease.since > self.frozen_at:
                continue
            if lease.ended_at is not None:
                lag = self.lags.get(id)
                if lag is None:
                    lag = self.lags[id] = source.choice((0.0, 0.0, source.random() * DEATH_SEEN_LATE_S))
                if now >= lease.ended_at + lag:
                    continue
            if self.blind_until and self.blind_until.get(id, 0.0) > now:
                continue
            alive[id] = CaptureInfo(id, f"{id}:1")
        return alive
