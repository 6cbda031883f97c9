"""A changefeed's run passes what the term knows of the cluster on to its scheduler."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from deploy.local.process import wait_until
from owner.changefeed.run import ChangefeedRun, StoredChangefeed
from owner.changefeed.source_worker import ChangefeedWorker, Duty, SourceView
from owner.core.scheduler_config import SchedulerConfig
from owner.events.placement_counters import PlacementCounters
from owner.events.recorder import EventRecorder
from owner.owner_config import SourceSection
from processor.agent.agent import new_agent
from tablewire.etcd import records as registry
from tablewire.etcd.records import ChangefeedInfo
from tablewire.model.ids import CaptureInfo
from tablewire.model.liveness import Liveness
from tablewire.model.progress import Stats, Watermark
from tablewire.model.spans import Span
from tablewire.model.states import QueryKind, QueryState
from tablewire.runtime.metrics import Metrics
from tablewire.testing import FakeTableExecutor, LoopbackNetwork

INFO = ChangefeedInfo(id="cf", source_uri="x://", sink_uri="y://", tables=["*"], created_at=registry.now(), epoch=3, start_ts=100)


def new_run(view: SourceView) -> ChangefeedRun:
    """Return a run with this view of its source; no thread is started."""
    worker = ChangefeedWorker(INFO, Duty.RUN, SourceSection(), None, new_source=None, on_change=lambda: None)  # type: ignore[arg-type]
    worker.view = view
    recorder = EventRecorder(INFO.changefeed, PlacementCounters(Metrics("owner", "1.0")))
    return ChangefeedRun(
        StoredChangefeed(INFO, 1), Watermark(100, 100), worker, owner_id="owner", owner_revision=7, recorder=recorder
    )


def test_a_drain_of_a_capture_that_has_just_registered_is_handed_over() -> None:
    """A drain is requested before the first tick that knows the capture; the tick after that one
    has it."""
    run = new_run(SourceView(start_ts=100, table_ids=np.array([1], np.int64)))
    network, captures = LoopbackNetwork(), {"a": CaptureInfo("a", "a:1")}

    def tick(drains: frozenset[str]) -> None:
        run.tick(captures, drains, None, lambda _changefeed, _epoch: network.transport("owner"), SchedulerConfig())

    tick(frozenset())
    captures["b"] = CaptureInfo("b", "b:1")
    tick(frozenset({"b"}))
    tick(frozenset({"b"}))
    assert run.scheduler is not None
    assert [query.target for query in run.scheduler.queries()] == ["b"]
    run.close()


class DrainedRun:
    """A run with one table, ticked with the drains that the cluster has."""

    def __init__(self) -> None:
        self.run = new_run(SourceView(start_ts=100, table_ids=np.array([1], np.int64)))
        self.captures = {name: CaptureInfo(name, f"{name}:1") for name in "ab"}
        self.network = LoopbackNetwork()
        self.config = SchedulerConfig(bootstrap_timeout_ms=1)

    def tick(self, *drains: str) -> None:
        self.run.tick(self.captures, frozenset(drains), None, lambda *_: self.network.transport("owner"), self.config)

    @property
    def jobs(self) -> list[tuple[QueryKind, str | None, QueryState]]:
        assert self.run.scheduler is not None
        return [(query.kind, query.target, query.state) for query in self.run.scheduler.queries()]


def test_a_drain_ends_with_its_capture_and_is_not_cancelled_too() -> None:
    """The term deletes the drain of a capture that has left; by then the scheduler has ended it."""
    drained = DrainedRun()
    drained.tick("b")
    del drained.captures["b"]
    wait_until("the drain ends", lambda: drained.tick("b") or drained.jobs[0][2] is QueryState.DONE, 10.0)
    drained.tick()
    drained.tick()
    assert drained.jobs == [(QueryKind.DRAIN, "b", QueryState.DONE)]
    drained.run.close()


def test_a_drain_that_the_cluster_does_not_have_is_cancelled() -> None:
    """A reader of the progress may repeat a request right after the drain was cancelled."""
    drained = DrainedRun()
    drained.tick("b")
    drained.tick()
    assert drained.run.scheduler is not None
    drained.run.scheduler.drain_capture("b")
    drained.tick()
    drained.tick()
    assert not any(view.draining for view in drained.run.scheduler.snapshot().captures)
    assert QueryState.PENDING not in {state for _, _, state in drained.jobs}
    drained.run.close()


def test_a_capture_that_was_away_for_a_moment_is_drained_again() -> None:
    """The drain ended when the capture was gone, but the cluster still has it."""
    drained = DrainedRun()
    drained.tick("b")
    gone = drained.captures.pop("b")
    wait_until("the drain ends", lambda: drained.tick("b") or drained.jobs[0][2] is QueryState.DONE, 10.0)
    drained.captures["b"] = gone
    drained.tick("b")
    drained.tick("b")
    assert drained.run.scheduler is not None
    assert [view.id for view in drained.run.scheduler.snapshot().captures if view.draining] == ["b"]
    drained.run.close()


def test_a_run_is_quiet_while_nothing_moves() -> None:
    """A moving checkpoint, a source ahead of it and a stopping processor end the quiet, unless
    rates say that no rows move."""
    run = new_run(SourceView(start_ts=100, table_ids=np.array([1], np.int64), source_ts=100))
    network, executor, liveness = LoopbackNetwork(), FakeTableExecutor(), Liveness()
    agent = new_agent(
        capture_id="a",
        changefeed_id=INFO.changefeed,
        changefeed_epoch=INFO.epoch,
        transport=network.transport("a"),
        executor=executor,
        liveness=liveness,
    )
    config = SchedulerConfig(heartbeat_interval_ms=1, stats_interval_ms=1)

    def tick() -> bool:
        run.tick({"a": CaptureInfo("a", "a:1")}, set(), None, lambda _changefeed, _epoch: network.transport("owner"), config)
        agent.tick()
        return run.is_quiet

    def wait_for(expected: bool) -> None:
        wait_until(f"is_quiet is {expected}", lambda: tick() is expected, 10.0)

    assert not tick()
    wait_for(True)
    executor.advance(200)
    wait_for(False)
    wait_for(True)
    run.worker.view = replace(run.worker.view, source_ts=300)
    assert not any(tick() for _ in range(5))
    executor.advance(300)
    wait_for(True)
    assert run.scheduler is not None
    scheduler, positions = run.scheduler, itertools.count(400)

    def moving_tick() -> bool:
        executor.advance(next(positions))
        return tick()

    executor.set_stats(Span(1), Stats(rows_per_s=5.0))
    wait_until("rates are known", lambda: not moving_tick() and scheduler.snapshot().rates is not None, 10.0)
    wait_until("rows are written", lambda: not moving_tick(), 10.0)
    executor.set_stats(Span(1), Stats(rows_per_s=0.0))
    wait_until("no rows are written", lambda: moving_tick() and scheduler.snapshot().is_idle, 10.0)
    assert all(moving_tick() for _ in range(20)), "a position that moves without rows is quiet"
    job = scheduler.rebalance()
    wait_for(True)
    assert job.state is QueryState.DONE
    liveness.stop()
    wait_for(False)
    assert not any(tick() for _ in range(5))
    run.close()
