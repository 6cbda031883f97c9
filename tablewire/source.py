"""What the owner must know of a source. Blocking; called on a thread of its changefeed, never on the tick's.

A plug-in offers a factory under the entry point group `tablewire.sources`, named by the scheme of the source URI:
`new_source(request: SourceRequest) -> Source`. The factory does no I/O; it raises OperatingError for a URI or an option
that cannot be right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from tablewire.model.columns import I64
from tablewire.model.ids import ChangefeedID, TableID, Ts
from tablewire.model.spans import SpanBlock


@dataclass(frozen=True, slots=True)
class CheckFailure:
    """One thing that `create` promises and that does not hold. `check` is a stable word, `reason` one clear sentence."""

    check: str
    reason: str


@dataclass(frozen=True, slots=True)
class SourceRequest:
    """What a changefeed says of its source. tables: the filter, patterns `schema.table` with * and ?; `!pattern` excludes.

    start_ts: 0 before the first start, then where it started (`StartedSource.start`, or `current_ts` then).
    options: from --source-option, checked by the plug-in.
    """

    changefeed: ChangefeedID
    source_uri: str
    sink_uri: str
    tables: Sequence[str]
    start_ts: Ts = 0
    initial_snapshot: bool = True
    options: Mapping[str, str] = field(default_factory=dict)


class Source(Protocol):
    """One changefeed's view of its source, as the owner needs it."""

    def check(self) -> Sequence[CheckFailure]:
        """All that `create` promises, each failure named; empty = fine. Changes nothing."""
        ...

    def tables(self) -> Mapping[TableID, str]:
        """What the filter matches now: id -> name."""
        ...

    def current_ts(self) -> Ts: ...

    def advance(self, checkpoint_ts: Ts) -> None:
        """Moves the safepoint behind the global checkpoint; never back."""
        ...

    def retained_bytes(self) -> int:
        """What the source keeps on disk for this changefeed."""
        ...

    def drop(self) -> None:
        """Removes what was made at the source for this changefeed; idempotent."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class StartedSource(Protocol):
    """Optional, beside Source: something has to be made at the source before replication can start. A source without it starts
    where it is (`current_ts`) when its changefeed is first run."""

    def start(self) -> Ts:
        """Makes what must exist at the source (publication, slot) if it is not there; the Ts where replication starts.
        Idempotent: a second call finds what is there and returns the same or a later position. Blocking."""
        ...


@runtime_checkable
class SplitSource(Protocol):
    """Optional, beside Source: tables of several spans, for an executor that can write a part of a table. A source without it
    has one span a table."""

    def spans(self, table_ids: I64) -> SpanBlock:
        """The spans of these tables, by table and start key, without a hole or an overlap;
        `tablewire.model.splitter` has ways to cut.
        table_ids: sorted, unique. Deterministic: an owner that cuts in another way removes the former spans and adds its own."""
        ...
