"""What owners, processors and plug-ins share. A plug-in needs only this and `tablewire.testing`.

Its rooms, lowest first: errors; model (values without I/O); wire (messages as bytes) and runtime
(configuration, logs, TLS, threads); etcd; executor.py and source.py (what a plug-in implements);
postgres (what both services need of that source); testing (a network in one thread, and fakes).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tablewire.errors import EpochRefusedError, OperatingError
    from tablewire.executor import (
        BarrierTableExecutor,
        BulkTableExecutor,
        ClosableTableExecutor,
        ExecutorFactory,
        ExecutorMeter,
        ExecutorRequest,
        FencedTableExecutor,
        MeteredTableExecutor,
        TableExecutor,
    )
    from tablewire.model.ids import CHECKPOINT_CANNOT_PROCEED, CaptureID, CaptureInfo, ChangefeedID, TableID, Ts
    from tablewire.model.liveness import Liveness
    from tablewire.model.messages import Message, Transport
    from tablewire.model.progress import (
        Barrier,
        BarrierWithMinTs,
        CaptureView,
        Checkpoint,
        SpanView,
        Stats,
        StatusColumns,
        TableBarrier,
        TableStatus,
        TaskStatus,
        Watermark,
    )
    from tablewire.model.queries import Query
    from tablewire.model.spans import Span, SpanBlock
    from tablewire.model.splitter import HashRanges, Splitter, WholeTables
    from tablewire.model.states import (
        CaptureState,
        LivenessState,
        QueryKind,
        QueryState,
        ReplicationState,
        StallReason,
        TableState,
    )
    from tablewire.source import CheckFailure, Source, SourceRequest, SplitSource, StartedSource

# fmt: off
__all__ = [
    "CHECKPOINT_CANNOT_PROCEED", "Barrier", "BarrierTableExecutor", "BarrierWithMinTs", "BulkTableExecutor", "CaptureID",
    "CaptureInfo", "CaptureState", "CaptureView", "ChangefeedID", "CheckFailure", "Checkpoint", "ClosableTableExecutor",
    "EpochRefusedError", "ExecutorFactory", "ExecutorMeter", "ExecutorRequest", "FencedTableExecutor", "HashRanges", "Liveness",
    "LivenessState", "Message", "MeteredTableExecutor", "OperatingError", "Query", "QueryKind", "QueryState",
    "ReplicationState", "Source", "SourceRequest", "Span", "SpanBlock", "SpanView", "SplitSource", "Splitter", "StallReason",
    "StartedSource", "Stats", "StatusColumns", "TableBarrier", "TableExecutor", "TableID", "TableState", "TableStatus",
    "TaskStatus", "Transport", "Ts", "Watermark", "WholeTables",
]
# fmt: on

if not TYPE_CHECKING:
    _MODULES = (
        "errors", "model.ids", "model.states", "model.spans", "model.progress", "model.liveness", "model.splitter",
        "model.messages", "model.queries", "executor", "source",
    )  # fmt: skip

    def __getattr__(name: str) -> object:
        """Import the module of a name at its first use, so that importing the package is fast."""
        if name in __all__:
            for module in map(import_module, (f"tablewire.{one}" for one in _MODULES)):
                if name in vars(module):
                    value = globals()[name] = vars(module)[name]
                    return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
