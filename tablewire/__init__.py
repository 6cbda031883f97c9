"""The words and the contracts that owner, processors and plug-ins share; a plug-in needs nothing else.

model/ holds values, wire/ the messages as bytes, etcd/ and postgres/ what both services need of those servers, runtime/ the
plumbing of a process, testing/ a test kit.
"""

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
    TableBarrier,
    TableStatus,
    TaskStatus,
    Watermark,
)
from tablewire.model.queries import Query
from tablewire.model.spans import Span
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

__all__ = [
    "CHECKPOINT_CANNOT_PROCEED",
    "Barrier",
    "BarrierTableExecutor",
    "BarrierWithMinTs",
    "BulkTableExecutor",
    "CaptureID",
    "CaptureInfo",
    "CaptureState",
    "CaptureView",
    "ChangefeedID",
    "CheckFailure",
    "Checkpoint",
    "ClosableTableExecutor",
    "ExecutorFactory",
    "ExecutorMeter",
    "ExecutorRequest",
    "FencedTableExecutor",
    "Liveness",
    "LivenessState",
    "Message",
    "MeteredTableExecutor",
    "Query",
    "QueryKind",
    "QueryState",
    "ReplicationState",
    "Source",
    "SourceRequest",
    "Span",
    "SpanView",
    "SplitSource",
    "StallReason",
    "StartedSource",
    "Stats",
    "TableBarrier",
    "TableExecutor",
    "TableID",
    "TableState",
    "TableStatus",
    "TaskStatus",
    "Transport",
    "Ts",
    "Watermark",
]
