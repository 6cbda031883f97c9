"""A changefeed's run passes what the term knows of the cluster on to its scheduler."""

from __future__ import annotations

import numpy as np

from owner.changefeed.run import ChangefeedRun, StoredChangefeed
from owner.changefeed.source_worker import ChangefeedWorker, Duty, SourceView
from owner.core.scheduler_config import SchedulerConfig
from owner.events.placement_counters import PlacementCounters
from owner.events.recorder import EventRecorder
from owner.owner_config import SourceSection
from tablewire.etcd import records as registry
from tablewire.etcd.records import ChangefeedInfo
from tablewire.model.ids import CaptureInfo
from tablewire.model.progress import Watermark
from tablewire.runtime.metrics import Metrics
from tablewire.testing import LoopbackNetwork

INFO = ChangefeedInfo(id="cf", source_uri="x://", sink_uri="y://", tables=["*"], created_at=registry.now(), epoch=3, start_ts=100)


def test_a_drain_of_a_capture_that_has_just_registered_is_handed_over() -> None:
    """A drain is requested before the first tick that knows the capture; the tick after that one has it."""
    worker = ChangefeedWorker(INFO, Duty.RUN, None, SourceSection())  # type: ignore[arg-type]  # it is never started
    worker._view = SourceView(start_ts=100, table_ids=np.array([1], np.int64))
    recorder = EventRecorder(INFO.changefeed, PlacementCounters(Metrics("owner", "1.0")))
    run = ChangefeedRun(
        StoredChangefeed(INFO, 1), Watermark(100, 100), worker, owner_id="owner", owner_revision=7, recorder=recorder
    )
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
