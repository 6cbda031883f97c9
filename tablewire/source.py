"""Source: how the owner sees a source. Blocking; called on a thread of its changefeed.

A plug-in offers a factory `new_source(request: SourceRequest) -> Source` under the entry point
group `tablewire.sources`, named after the scheme of the source URI. The factory does no I/O, and
raises OperatingError for a URI or an option that is wrong.
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
    """A requirement of `changefeed create` that is not met. check: a stable word."""

    check: str
    reason: str


@dataclass(frozen=True, slots=True)
class SourceRequest:
    """The source of a changefeed.

    tables: the filter, patterns `schema.table` with * and ?; `!pattern` excludes. start_ts: 0
    before the first start, then where the changefeed started. checkpoint_ts: how far all tables are
    at least, as stored; 0: unknown. options: from --source-option,
    checked by the plug-in.
    """

    changefeed: ChangefeedID
    source_uri: str
    sink_uri: str
    tables: Sequence[str]
    start_ts: Ts = 0
    checkpoint_ts: Ts = 0
    initial_snapshot: bool = True
    options: Mapping[str, str] = field(default_factory=dict)


class Source(Protocol):
    """The source of one changefeed."""

    def check(self) -> Sequence[CheckFailure]:
        """Return each requirement that is not met. Change nothing."""
        ...

    def tables(self) -> Mapping[TableID, str]:
        """Return the tables that the filter matches now: their names by id."""
        ...

    def current_ts(self) -> Ts: ...

    def advance(self, checkpoint_ts: Ts) -> None:
        """Release what the source keeps up to the global checkpoint. Never move backwards."""
        ...

    def retained_bytes(self) -> int:
        """Return how many bytes the source keeps on disk for this changefeed."""
        ...

    def drop(self) -> None:
        """Remove what was made at the source for this changefeed. Idempotent."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class StartedSource(Protocol):
    """Optional: makes something at the source before replication can start.

    A source without it starts at `current_ts` when its changefeed first runs.
    """

    def start(self) -> Ts:
        """Make what must exist at the source (publication, slot); return where replication starts.

        Raise ChangesLostError if a changefeed that has started cannot continue: the owner stops it as failed.

        Idempotent: a second call finds what exists and returns the same or a later position.
        """
        ...


@runtime_checkable
class SelectiveSource(Protocol):
    """Optional: leaves out tables that the filter matches, but that cannot be replicated."""

    def left_out(self) -> Sequence[str]:
        """Return why tables are missing in the last result of `tables`, one text for each; no I/O."""
        ...


@runtime_checkable
class VerifiedSource(Protocol):
    """Optional: finds out, before a changefeed is resumed, whether it can continue."""

    def verify(self) -> None:
        """Raise ChangesLostError if the source no longer has what the sink needs. Change nothing."""
        ...


@runtime_checkable
class SinkCleaner(Protocol):
    """Optional: removes what is kept at the sink, after the source was dropped because its changefeed is removed."""

    def clean_sink(self) -> None: ...


@runtime_checkable
class SplitSource(Protocol):
    """Optional: divides tables into several spans, for an executor that can write a part of a table.

    A source without it has one span for each table.
    """

    def spans(self, table_ids: I64) -> SpanBlock:
        """Return the spans of these tables, in order, without gap or overlap (see `HashRanges`).

        table_ids: sorted, unique. The result must be the same in every owner: one that differs
        removes the previous spans and adds its own.
        """
        ...
