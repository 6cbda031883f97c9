"""The JSON that `-o json` prints: one object a command, as a table of fields that is also its documentation.

A field is never removed and never changes its meaning; new ones may be added at any time. Ts and counts are whole numbers
(unsigned, up to 64 bits). null = nobody, nothing, not known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from tablewire.v1 import admin_pb2 as pb

Json: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Field:
    """kind: as the documentation names it. read: the field's value from the message."""

    name: str
    kind: str
    meaning: str
    read: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    fields: tuple[Field, ...]

    def of(self, message: Any) -> Json:
        return {field.name: field.read(message) for field in self.fields}

    def all_of(self, messages: Iterable[Any]) -> list[Json]:
        return [self.of(message) for message in messages]


def _plain(name: str, kind: str, meaning: str) -> Field:
    return Field(name, kind, meaning, lambda message: getattr(message, name))


def _or_null(name: str, kind: str, meaning: str) -> Field:
    """Empty or unset = null."""
    return Field(name, f"{kind} or null", meaning, lambda message: getattr(message, name) or None)


def _optional(name: str, kind: str, meaning: str) -> Field:
    """A field with presence: 0 is a value."""
    return Field(name, f"{kind} or null", meaning, lambda message: getattr(message, name) if message.HasField(name) else None)


def _list(name: str, meaning: str) -> Field:
    return Field(name, "list of string", meaning, lambda message: list(getattr(message, name)))


def _counts(name: str, meaning: str) -> Field:
    return Field(name, "object of int", meaning, lambda message: dict(sorted(getattr(message, name).items())))


def _numbers(name: str, meaning: str) -> Field:
    return Field(name, "object of number", meaning, lambda message: dict(sorted(getattr(message, name).items())))


def _texts(name: str, meaning: str) -> Field:
    return Field(name, "object of string", meaning, lambda message: dict(sorted(getattr(message, name).items())))


def _nested(name: str, shape: Shape, meaning: str) -> Field:
    def read(message: Any) -> Json | None:
        return shape.of(getattr(message, name)) if message.HasField(name) else None

    return Field(name, f"{shape.name} or null", meaning, read)


OWNER = Shape(
    "owner",
    (
        _plain("id", "string", "the process, as registered"),
        _plain("address", "string", "host:port of its admin API"),
        _plain("version", "string", "of its software"),
        _plain("leading", "bool", "whether it leads"),
    ),
)

STATUS = Shape(
    "status",
    (
        _plain("cluster", "string", "the cluster's name"),
        _plain("answered_by", "string", "id of the owner that answered (the leader, if there is one)"),
        _plain("version", "string", "of the software of the owner that answered"),
        _nested("leader", OWNER, "who leads"),
        _or_null("leader_revision", "int", "the leader's election: grows with every one"),
        Field("owners", "list of owner", "every owner process", lambda message: OWNER.all_of(message.owners)),
        _counts("captures_by_state", "number of captures in each state; `unknown` when no leader answered"),
        _counts("changefeeds_by_state", "number of changefeeds in each state"),
        _list("braked", "changefeeds in which nothing is placed anew for a while, since many captures vanished at once"),
        _plain("problem", "string", "why the owner that answered cannot know more (etcd is out of its reach, say), or empty"),
    ),
)

CAPTURE = Shape(
    "capture",
    (
        _plain("id", "string", "new at every start of a processor"),
        _plain("address", "string", "host:port of its gRPC server"),
        _plain("version", "string", "of its software"),
        _plain(
            "state",
            "string",
            "silent, stopping, uninitialized, ready, idle (no changefeed runs), or incompatible (see the label of that name)",
        ),
        _plain("spans", "int", "spans that it writes, over all changefeeds"),
        _plain("draining", "bool", "whether it is being drained"),
        _texts("labels", "as configured at the processor"),
        _counts("spans_by_changefeed", "those of each changefeed"),
        _optional("remaining", "int", "while it is drained: spans that still touch it in any role; 0: safe to stop"),
        _counts("reasons", "while it is drained: why, by stall reason, they are still there"),
    ),
)

DRAIN = Shape(
    "drain",
    (
        _plain("capture", "string", "its id"),
        _plain("draining", "bool", "whether it is being drained"),
        _plain("remaining", "int", "spans that still touch it in any role; 0 while draining: safe to stop"),
        _counts("reasons", "why, by stall reason, what is left is still there; `waiting`: no reason given"),
        _plain("gone", "bool", "the capture has left"),
        _or_null("note", "string", "what holds everything up, and what to do"),
    ),
)

TABLE = Shape(
    "table",
    (
        _plain("table_id", "int", "the table's number at the source"),
        _or_null("table", "string", "schema.table"),
        Field("start_key", "string or null", "hex; null = unbounded", lambda message: message.start_key.hex() or None),
        Field("end_key", "string or null", "hex; null = unbounded", lambda message: message.end_key.hex() or None),
        _plain("state", "string", "absent, prepare, commit, replicating, removing"),
        _or_null("primary", "string", "the capture that writes"),
        _or_null("secondary", "string", "the capture that prepares to take over"),
        _plain("checkpoint_ts", "int", "everything at or before it is durable in the sink"),
        _plain("resolved_ts", "int", "everything at or before it has been received"),
        _plain("state_age_ms", "int", "how long it has been in this state"),
        _or_null("stall_reason", "string", "why it is not steady (docs/operations.md)"),
        _or_null("error", "string", "of the executor"),
        _optional("rows_per_s", "number", "as its executor told last; null = executors give no statistics"),
        _optional("bytes_per_s", "number", "the same"),
    ),
)

JOB = Shape(
    "job",
    (
        _plain("changefeed", "string", "namespace/id"),
        _plain("kind", "string", "move, rebalance, drain, cancel"),
        _plain("target", "string", "what it is about"),
        _or_null("capture", "string", "where a move goes"),
        _plain("state", "string", "pending, accepted, refused, done, cancelled"),
        _or_null("reason", "string", "why it is so"),
        _or_null("id", "string", "it stands as `job` in the events, and in the logs of the owner and of the processors"),
        _or_null("by", "string", "who asked, as in an event"),
        _optional("moves_done", "int", "of a rebalance: tables that it has moved"),
        _optional("moves_left", "int", "of a rebalance: those under way or planned; more may be planned as it goes on"),
    ),
)

CHANGEFEED = Shape(
    "changefeed",
    (
        _plain("changefeed", "string", "namespace/id"),
        _plain("state", "string", "normal, warning (an error is being retried), failed, stopped (paused), finished, removed"),
        _or_null("error", "string", "what disturbs it"),
        _plain("epoch", "int", "higher at every restart"),
        _plain("source_uri", "string", "passwords hidden"),
        _plain("sink_uri", "string", "passwords hidden"),
        _list("tables", "the filter"),
        _plain("skip_snapshot", "bool", "created with --no-snapshot"),
        _plain("start_ts", "int", "where it started; 0 = not yet"),
        _or_null("target_ts", "int", "where it ends"),
        _texts("options", "as created, passwords hidden"),
        _plain("running", "bool", "the leader schedules it"),
        _plain("initialized", "bool", "the leader knows where every table is"),
        _plain("checkpoint_ts", "int", "everything at or before it is durable in the sink; 0 = cannot proceed"),
        _plain("resolved_ts", "int", "everything at or before it has been received"),
        _or_null("last_synced_ts", "int", "the newest change that was written"),
        _or_null("source_ts", "int", "where the source is"),
        _optional("lag", "int", "source_ts - checkpoint_ts, in units of Ts (PostgreSQL: bytes of WAL)"),
        _optional("retained_bytes", "int", "what the source keeps on disk for this changefeed"),
        _plain("spans", "int", "how many are scheduled"),
        _counts("spans_by_state", "number of spans in each state"),
        _counts("stalls", "number of spans that are not steady, by reason"),
        _nested("slowest", TABLE, "the span that holds the checkpoint back"),
        Field("jobs", "list of job", "manual jobs under way", lambda message: JOB.all_of(message.jobs)),
        _optional("rows_per_s", "number", "over all spans; null = executors give no statistics"),
        _optional("bytes_per_s", "number", "the same"),
    ),
)

PLANNED_MOVE = Shape(
    "planned move",
    (
        _plain("changefeed", "string", "namespace/id"),
        _plain("table_id", "int", "the table's number at the source"),
        _or_null("table", "string", "schema.table"),
        Field("start_key", "string or null", "hex; null = unbounded", lambda message: message.start_key.hex() or None),
        Field("end_key", "string or null", "hex; null = unbounded", lambda message: message.end_key.hex() or None),
        _or_null("source", "string", "the capture that writes it now"),
        _plain("target", "string", "the capture that would"),
        _plain("weight", "number", "1, and more for a table with many rows/s or bytes/s"),
        _plain("reason", "string", "why it would move"),
    ),
)

PLAN = Shape(
    "plan",
    (
        _list("changefeeds", "those that were planned for"),
        Field(
            "moves",
            "list of planned move",
            "in the order in which they would begin",
            lambda message: PLANNED_MOVE.all_of(message.moves),
        ),
        _numbers("load_before", "weight of all tables of all changefeeds on each capture, now"),
        _numbers("load_after", "the same after the moves"),
        _or_null("note", "string", "why there are no moves, or not more"),
    ),
)

EVENT = Shape(
    "event",
    (
        _plain("sequence", "int", "grows with each event of the cluster"),
        _plain("at", "string", "RFC 3339, UTC"),
        _plain("kind", "string", "what happened, see Events"),
        _plain("owner", "string", "the leader that saw or did it"),
        _plain("owner_revision", "int", "its election"),
        _or_null("changefeed", "string", "namespace/id; null = the whole cluster"),
        _or_null("subject", "string", "the capture, table or owner that it is about"),
        _or_null("text", "string", "more of it, for people"),
        _or_null("why", "string", "the reason, where there is one"),
        _or_null("by", "string", "who asked: the common name of the caller's certificate, without TLS the caller's address"),
        _or_null("job", "string", "the id of the job that it belongs to"),
    ),
)

SHAPES = (OWNER, STATUS, CAPTURE, DRAIN, TABLE, JOB, PLAN, PLANNED_MOVE, CHANGEFEED, EVENT)


def captures(message: pb.ListCapturesResponse) -> Json:
    return {"captures": CAPTURE.all_of(message.captures)}


def changefeeds(message: pb.ListChangefeedsResponse) -> Json:
    return {"changefeeds": CHANGEFEED.all_of(message.changefeeds)}
