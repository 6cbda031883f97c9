"""What the owner and the processors must agree on.

types.py holds the words, source.py what the owner must know of a source, codec.py and v1/ the wire, etcd_keys.py the places in
etcd, testing.py a network in one thread, runtime/ the process plumbing, postgres/ what both sides need of PostgreSQL.
"""

from tablewire.liveness import Liveness
from tablewire.queries import Query
from tablewire.source import CheckFailure, Source, SourceRequest, SplitSource, StartedSource
from tablewire.types import (
    CHECKPOINT_CANNOT_PROCEED,
    Barrier,
    BarrierWithMinTs,
    CaptureID,
    CaptureInfo,
    CaptureState,
    CaptureView,
    ChangefeedID,
    Checkpoint,
    LivenessState,
    Message,
    QueryKind,
    QueryState,
    ReplicationState,
    Span,
    SpanView,
    StallReason,
    Stats,
    TableBarrier,
    TableID,
    TableState,
    TableStatus,
    TaskStatus,
    Transport,
    Ts,
    Watermark,
)

__all__ = [
    "CHECKPOINT_CANNOT_PROCEED",
    "Barrier",
    "BarrierWithMinTs",
    "CaptureID",
    "CaptureInfo",
    "CaptureState",
    "CaptureView",
    "ChangefeedID",
    "CheckFailure",
    "Checkpoint",
    "Liveness",
    "LivenessState",
    "Message",
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
    "TableID",
    "TableState",
    "TableStatus",
    "TaskStatus",
    "Transport",
    "Ts",
    "Watermark",
]
