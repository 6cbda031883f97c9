"""The interfaces that users and outside tests rely on: names, order, defaults and values, written down once more.

The stubs below are the contract word for word; the tests compare what the packages export with them. To change one of them
is to break somebody's code.
"""

# ruff: noqa: F821 - the names in the stubs are compared as text

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import pytest

import owner
import processor
import tablewire
import tablewire.testing
from tablewire import errors

# ------------------------------------------------------------------------------------------------------- the contract


class Scheduler(Protocol):
    def tick(
        self,
        checkpoint_ts: Ts,
        current_tables: Sequence[TableID],
        alive_captures: Mapping[CaptureID, CaptureInfo],
        barrier: BarrierWithMinTs,
    ) -> Watermark: ...
    def move_table(self, table_id: TableID, target: CaptureID) -> Query: ...
    def rebalance(self) -> Query: ...
    def drain_capture(self, target: CaptureID) -> int: ...
    def close(self) -> None: ...


class InfoProvider(Protocol):
    def is_initialized(self) -> bool: ...
    def get_task_statuses(self) -> Mapping[CaptureID, TaskStatus]: ...


class BesideTheSeed(Protocol):
    """What the object of new_scheduler offers beside the two Protocols."""

    def snapshot(self) -> Snapshot: ...
    def cancel_drain(self, target: CaptureID) -> Query: ...
    def move_span(self, span: Span, target: CaptureID) -> Query: ...
    def plan_rebalance(self) -> Sequence[PlannedMove]: ...
    def queries(self) -> Sequence[Query]: ...


def new_scheduler(
    *,
    owner_id: CaptureID,
    changefeed_id: ChangefeedID,
    owner_revision: int,
    changefeed_epoch: int,
    transport: Transport,
    config: SchedulerConfig = ...,
    clock: Callable[[], float] = time.monotonic,
    splitter: Splitter = ...,
    cluster_load: Callable[[], Mapping[CaptureID, float]] | None = None,
) -> SchedulerAndInfo: ...


class TableExecutor(Protocol):
    def add_table_span(self, span: Span, checkpoint: Checkpoint, is_prepare: bool) -> bool: ...
    def is_add_table_span_finished(self, span: Span, is_prepare: bool) -> bool: ...
    def remove_table_span(self, span: Span) -> bool: ...
    def is_remove_table_span_finished(self, span: Span) -> tuple[Ts, bool]: ...
    def get_table_span_status(self, span: Span, collect_stat: bool) -> TableStatus: ...


class Source(Protocol):
    def check(self) -> Sequence[CheckFailure]: ...
    def tables(self) -> Mapping[TableID, str]: ...
    def current_ts(self) -> Ts: ...
    def advance(self, checkpoint_ts: Ts) -> None: ...
    def retained_bytes(self) -> int: ...
    def drop(self) -> None: ...
    def close(self) -> None: ...


class Agent(Protocol):
    def tick(self) -> Barrier | None: ...
    def close(self) -> None: ...


def new_agent(
    *,
    capture_id: CaptureID,
    changefeed_id: ChangefeedID,
    changefeed_epoch: int,
    transport: Transport,
    executor: TableExecutor,
    liveness: Liveness,
    config: AgentConfig = ...,
    clock: Callable[[], float] = time.monotonic,
) -> Agent: ...


class Transport(Protocol):
    def send(self, messages: Sequence[Message]) -> None: ...
    def recv(self) -> Sequence[Message]: ...
    def close(self) -> None: ...


class LoopbackNetwork:
    def transport(self, node_id: str) -> Transport: ...
    def release(self) -> None: ...


class Query:
    def wait(self, timeout_s: float) -> QueryState: ...
    def cancel(self) -> None: ...


REQUIRED = dataclasses.MISSING
EMPTY: Mapping[str, Any] = MappingProxyType({})

VALUES: dict[str, dict[str, Any]] = {
    "Span": {"table_id": REQUIRED, "start_key": b"", "end_key": b""},
    "Checkpoint": {"checkpoint_ts": REQUIRED, "resolved_ts": REQUIRED, "last_synced_ts": 0},
    "Stats": {"rows_per_s": 0.0, "bytes_per_s": 0.0, "stage_checkpoints": EMPTY},
    "TableStatus": {"span": REQUIRED, "state": REQUIRED, "checkpoint": REQUIRED, "stats": None, "error": ""},
    "TableBarrier": {"table_id": REQUIRED, "barrier_ts": REQUIRED},
    "Barrier": {"global_barrier_ts": REQUIRED, "table_barriers": ()},
    "BarrierWithMinTs": {"barrier": REQUIRED, "min_table_barrier_ts": REQUIRED},
    "Watermark": {"checkpoint_ts": REQUIRED, "resolved_ts": REQUIRED, "last_synced_ts": 0, "puller_resolved_ts": 0},
    "CaptureInfo": {"id": REQUIRED, "address": REQUIRED, "version": "", "labels": EMPTY},
    "ChangefeedID": {"namespace": REQUIRED, "id": REQUIRED},
    "TaskStatus": {"spans": REQUIRED},
    "SpanView": dict.fromkeys(
        ("span", "state", "primary", "secondary", "checkpoint", "state_age_ms", "stall_reason", "error"), REQUIRED
    ),
    "CaptureView": dict.fromkeys(("id", "state", "spans", "draining"), REQUIRED),
}
"""Frozen, slotted, compared by value; fields in this order with these defaults."""

ENUMS = {
    "TableState": "ABSENT PREPARING PREPARED REPLICATING STOPPING STOPPED",
    "ReplicationState": "ABSENT PREPARE COMMIT REPLICATING REMOVING",
    "CaptureState": "UNINITIALIZED READY SILENT STOPPING",
    "LivenessState": "ALIVE STOPPING",
    "QueryKind": "MOVE REBALANCE DRAIN CANCEL",
    "QueryState": "PENDING ACCEPTED REFUSED DONE CANCELLED",
    "StallReason": "BOOTSTRAP SILENT_CAPTURE NO_CAPTURE CONCURRENCY PREPARING SNAPSHOT PRIMARY_STOPPING UNDETERMINED "
    "REMOVING BARRIER EXECUTOR_ERROR BACKOFF BRAKE",
}
"""StrEnums whose values are the names in lower case."""

EXPORTS = {
    "tablewire": [
        *("CHECKPOINT_CANNOT_PROCEED", "TableID", "Ts", "CaptureID", "Liveness", "Query", "Transport", "Message", "Source"),
        *VALUES,
        *ENUMS,
    ],
    "owner": [
        *("Scheduler", "InfoProvider", "SchedulerConfig", "new_scheduler", "Snapshot", "SpanView", "CaptureView"),
        "CHECKPOINT_CANNOT_PROCEED",
    ],
    "processor": ["TableExecutor", "Agent", "AgentConfig", "new_agent"],
    "tablewire.testing": ["LoopbackNetwork", "Deliver", "FakeTableExecutor"],
}

# ---------------------------------------------------------------------------------------------------------- the tests


def signature_of(function: Any) -> list[str]:
    """`name: annotation` of each parameter with its kind, then the result; defaults are compared by the tests."""
    signature = inspect.signature(function)
    said = [f"{p.kind.name} {p.name}: {p.annotation}" for p in signature.parameters.values() if p.name != "self"]
    return [*said, f"-> {signature.return_annotation}"]


def methods_of(stub: type) -> list[str]:
    return [name for name, value in vars(stub).items() if inspect.isfunction(value) and not name.startswith("_")]


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in EXPORTS.items() for name in names])
def test_every_name_is_exported(module: str, name: str) -> None:
    """Each package exports the names of the contract, in __all__ as well."""
    exports = importlib.import_module(module)
    assert hasattr(exports, name)
    assert name in exports.__all__


@pytest.mark.parametrize("name", VALUES)
def test_values_have_the_agreed_shape(name: str) -> None:
    """Frozen slotted dataclasses with the agreed fields, order and defaults, by position or keyword."""
    kind = getattr(tablewire, name)
    fields = dataclasses.fields(kind)
    assert [field.name for field in fields] == list(VALUES[name])
    assert not any(field.kw_only for field in fields)
    for field in fields:
        default = field.default if field.default_factory is REQUIRED else field.default_factory()
        assert default == VALUES[name][field.name] or default is VALUES[name][field.name], field.name
    parameters = kind.__dataclass_params__
    assert parameters.frozen
    assert parameters.eq
    assert "__slots__" in vars(kind)


@pytest.mark.parametrize("name", ENUMS)
def test_enums_have_the_agreed_members(name: str) -> None:
    """StrEnums: exactly these members, in this order, the value the name in lower case."""
    kind = getattr(tablewire, name)
    assert issubclass(kind, enum.StrEnum)
    assert [(member.name, member.value) for member in kind] == [(word, word.lower()) for word in ENUMS[name].split()]


@pytest.mark.parametrize(
    ("module", "stub"),
    [
        *(("owner", Scheduler), ("owner", InfoProvider), ("processor", TableExecutor), ("processor", Agent)),
        *(("tablewire", Source), ("tablewire", Transport), ("tablewire", Query), ("tablewire.testing", LoopbackNetwork)),
    ],
)
def test_methods_have_the_agreed_signatures(module: str, stub: type) -> None:
    """Each method of the contract takes and gives what was agreed."""
    actual = getattr(importlib.import_module(module), stub.__name__)
    for name in methods_of(stub):
        assert signature_of(getattr(actual, name)) == signature_of(getattr(stub, name)), name


@pytest.mark.parametrize(("module", "stub"), [("owner", new_scheduler), ("processor", new_agent)])
def test_factories_have_the_agreed_signatures(module: str, stub: Callable[..., Any]) -> None:
    """The two factories take keywords alone, in the agreed order and with the agreed defaults."""
    actual = getattr(importlib.import_module(module), stub.__name__)
    wanted, found = inspect.signature(stub).parameters, inspect.signature(actual).parameters
    assert list(found) == list(wanted)
    for name, parameter in wanted.items():
        assert found[name].kind is inspect.Parameter.KEYWORD_ONLY
        if parameter.default is ...:
            assert found[name].default is not inspect.Parameter.empty, name
        else:
            assert found[name].default == parameter.default, name


def test_default_settings() -> None:
    """Heartbeats are 100 ms apart, and both configs can be made without arguments."""
    config = owner.SchedulerConfig()
    assert config.heartbeat_interval_ms == 100
    assert inspect.signature(owner.new_scheduler).parameters["config"].default == config
    assert inspect.signature(processor.new_agent).parameters["config"].default == processor.AgentConfig()
    assert type(inspect.signature(owner.new_scheduler).parameters["splitter"].default).__name__ == "WholeTables"


def test_loopback_network() -> None:
    """LoopbackNetwork(seed=0) with a hook; a Deliver is one of four."""
    assert inspect.signature(tablewire.testing.LoopbackNetwork).parameters["seed"].default == 0
    network = tablewire.testing.LoopbackNetwork(7)
    assert hasattr(network, "hook")
    assert {word.name for word in tablewire.testing.Deliver} == {"DELIVER", "DROP", "DUPLICATE", "HOLD"}


def test_spans() -> None:
    """Spans are hashable and ordered by table, then start; a whole table is Span(id)."""
    span = tablewire.Span(2)
    assert span == tablewire.Span(table_id=2, start_key=b"", end_key=b"")
    assert {span: 1}[tablewire.Span(2)] == 1
    assert sorted([tablewire.Span(2, b"b"), tablewire.Span(1, b"z"), span]) == [
        tablewire.Span(1, b"z"),
        span,
        tablewire.Span(2, b"b"),
    ]


def test_identifiers_are_plain_values() -> None:
    """Ts and TableID are int, CaptureID is str, and cannot-proceed is 0."""
    assert (tablewire.Ts, tablewire.TableID, tablewire.CaptureID) == (int, int, str)
    assert tablewire.CHECKPOINT_CANNOT_PROCEED == owner.CHECKPOINT_CANNOT_PROCEED == 0


def test_liveness_stops_once_and_for_all() -> None:
    """Liveness() is alive until stop, which may be called again."""
    liveness = tablewire.Liveness()
    assert liveness.state is tablewire.LivenessState.ALIVE
    liveness.stop()
    liveness.stop()
    assert liveness.state is tablewire.LivenessState.STOPPING


def test_errors_of_the_contract() -> None:
    """What callers may catch."""
    assert issubclass(errors.ConcurrentTickError, RuntimeError)
    assert issubclass(errors.ClosedError, RuntimeError)
    assert issubclass(errors.UnknownCaptureError, Exception)
    assert issubclass(errors.InvariantError, Exception)


def a_scheduler() -> Any:
    return owner.new_scheduler(
        owner_id="owner-1",
        changefeed_id=tablewire.ChangefeedID("default", "orders"),
        owner_revision=1,
        changefeed_epoch=1,
        transport=tablewire.testing.LoopbackNetwork().transport("owner-1"),
    )


def test_the_scheduler_has_both_faces_and_more() -> None:
    """One object is Scheduler and InfoProvider, and offers a snapshot, spans, drains and plans beside them."""
    scheduler = a_scheduler()
    for stub in (Scheduler, InfoProvider, BesideTheSeed):
        for name in methods_of(stub):
            assert callable(getattr(scheduler, name, None)), name
    snapshot = scheduler.snapshot()
    assert isinstance(snapshot, owner.Snapshot)
    assert not snapshot.initialized
    assert (len(snapshot.spans), len(snapshot.captures)) == (0, 0)
    assert snapshot.watermark == tablewire.Watermark(0, 0, 0, 0)
    assert not scheduler.is_initialized()
    assert dict(scheduler.get_task_statuses()) == {}
    scheduler.close()


def test_a_scheduler_before_bootstrap_and_after_close() -> None:
    """tick answers Watermark(0, 0, 0, 0) while a capture has not answered; close is idempotent, and then ClosedError."""
    scheduler = a_scheduler()
    barrier = tablewire.BarrierWithMinTs(tablewire.Barrier(100), 100)
    captures = {"capture-1": tablewire.CaptureInfo("capture-1", "127.0.0.1:1")}
    assert scheduler.tick(10, [1, 2], captures, barrier) == tablewire.Watermark(0, 0, 0, 0)
    query = scheduler.rebalance()
    assert query.kind is tablewire.QueryKind.REBALANCE
    assert query.state.value in str(query)
    scheduler.close()
    scheduler.close()
    with pytest.raises(errors.ClosedError):
        scheduler.tick(10, [1, 2], captures, barrier)
