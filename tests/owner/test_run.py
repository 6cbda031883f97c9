"""A changefeed's run passes what the term knows of the cluster on to its scheduler."""

from __future__ import annotations

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
from tablewire.model.progress import Watermark
from tablewire.model.states import QueryState
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
    """A drain is requested before the first tick that knows the capture; the tick after that one has it."""
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


def test_a_run_is_quiet_while_nothing_moves() -> None:
    """A moving checkpoint, a source ahead of it and a stopping processor end the quiet; a job that has ended does not."""
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
    config = SchedulerConfig(heartbeat_interval_ms=1)

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
    job = run.scheduler.rebalance()
    wait_for(True)
    assert job.state is QueryState.DONE
    liveness.stop()
    wait_for(False)
    assert not any(tick() for _ in range(5))
    run.close()
