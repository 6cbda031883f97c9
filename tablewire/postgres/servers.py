"""Whether the source still is the server that the sink was filled from, and what follows if it is not.

**Invariants**

1. A slot is created for a changefeed that has not started, and else only if it is proven that no transaction has
   committed after a position that all tables have reached. A missing slot is never replaced otherwise.
2. Replication continues only on a server that has every position which the checkpoint and the tables at the sink have
   reached: `position <= switch point` of its timeline, and `position <= end of its WAL`.
3. After another timeline was accepted, no row can be written that was read before: accepting raises the epoch of
   every table at the sink (sink_checkpoint.py).

`decide` is the whole decision; it is pure, and tests/tablewire/postgres/test_servers.py lists its cases. What it needs of
the past is a `SourceRecord`, stored at a PostgreSQL sink in tablewire.checkpoints.source (for other sinks, without the
mark, in the comment of the publication).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from psycopg import pq

from tablewire.errors import OperatingError
from tablewire.model.ids import Ts
from tablewire.postgres.connections import Connection, SourceUnavailableError, connect, server_name
from tablewire.postgres.lsn import format_lsn, parse_lsn
from tablewire.postgres.slots import SlotInfo

RESYNC = "`owner changefeed resync` copies all tables again from the source as it is now"
_HISTORY_LINE = re.compile(r"^\s*(\d+)\s+([0-9A-F]+/[0-9A-F]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ServerIdentity:
    """A database of a server. system: its system identifier. database: oid. timeline: raised by each promotion."""

    system: int
    database: int
    timeline: int


@dataclass(frozen=True, slots=True)
class Mark:
    """A durable WAL position and the transaction ids there: all below xmin had ended at or before it, none from xmax on had.

    If xmax is still the same later, no transaction has committed since; that proves something if the mark is idle.
    """

    position: Ts
    xmin: int
    xmax: int

    @property
    def is_idle(self) -> bool:
        """Whether every transaction that had begun to write had ended, or has not ended yet while xmax is the same."""
        return self.xmin == self.xmax


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """What was known of the source when the checkpoint was recorded.

    restart_ts: of the slot, which the server makes durable before it confirms it. restored_ts: at or after the position of
    the slot when it was last restored from a processor's slot; the tables check that they need nothing from before.
    """

    server: ServerIdentity
    mark: Mark | None = None
    restart_ts: Ts = 0
    restored_ts: Ts = 0


@dataclass(frozen=True, slots=True)
class ServerState:
    """What the source says now.

    xmax: the next transaction id that has not ended. switch_ts: where its history left the recorded timeline; None: it is
    the same timeline, 0: the recorded timeline is no part of its history. living_slot: a slot of a processor of this
    changefeed, from which a missing slot can be restored; empty: there is none.
    """

    server: ServerIdentity
    wal_end: Ts
    xmax: int
    slot: SlotInfo | None
    switch_ts: Ts | None = None
    living_slot: str = ""


@dataclass(frozen=True, slots=True)
class SinkState:
    """What the sink holds of this incarnation of the changefeed.

    checkpoint_ts: all tables have reached it. highest_ts: no table at the sink is ahead of it; 0: there is none, or unknown.
    """

    record: SourceRecord | None
    checkpoint_ts: Ts
    highest_ts: Ts = 0


class Action(StrEnum):
    """What to do: continue with the slot; restore it from a processor's slot; have all tables continue where the slot
    stands, or a new one if it is missing; or fail."""

    CONTINUE = "continue"
    RESTORE = "restore"
    PASS_OVER = "pass_over"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Decision:
    action: Action
    reason: str = ""


def decide(now: ServerState, sink: SinkState) -> Decision:
    """Return what a changefeed that has started does at this server. Pure.

    A new slot for PASS_OVER counts only if xmax is still the same after it was created.
    """
    if reason := _why_another_server(now, sink) or _why_lacking(now, sink):
        return Decision(Action.FAIL, reason)
    slot, record = now.slot, sink.record
    if slot is not None and not slot.is_lost:
        if record is not None and now.switch_ts is None and slot.restart_ts < record.restart_ts:
            return Decision(
                Action.FAIL,
                f"its slot stands at {format_lsn(slot.restart_ts)}, but had been at {format_lsn(record.restart_ts)}: it was"
                " restored from an older copy",
            )
        if slot.confirmed_ts > max(sink.checkpoint_ts, record.restored_ts if record is not None else 0):
            if _is_nothing_missing(now, sink):
                return Decision(Action.PASS_OVER)
            return Decision(
                Action.FAIL,
                f"it can only be read from {format_lsn(slot.confirmed_ts)} on, but was replicated up to"
                f" {format_lsn(sink.checkpoint_ts)}: the changes between are lost (was its slot created again?)",
            )
        return Decision(Action.CONTINUE)
    if now.living_slot:
        return Decision(Action.RESTORE)
    if _is_nothing_missing(now, sink):
        return Decision(Action.PASS_OVER)
    cause = slot.why_lost if slot is not None else "its slot does not exist (was it dropped, or does a failover not keep slots?)"
    return Decision(Action.FAIL, f"{cause}, and it was replicated up to {format_lsn(sink.checkpoint_ts)}: later changes are lost")


def _why_another_server(now: ServerState, sink: SinkState) -> str:
    """Return why this is not the server of the record, or a successor; empty if it is."""
    if sink.record is None:
        return ""
    server, known = now.server, sink.record.server
    if server.system != known.system:
        return f"it is another server: its system identifier is {server.system}, and was {known.system}"
    if server.database != known.database:
        return f"its database was created again: its oid is {server.database}, and was {known.database}"
    if server.timeline < known.timeline:
        return f"it is on timeline {server.timeline}, and was on {known.timeline}: it is a former primary or an older copy"
    if server.timeline > known.timeline and not now.switch_ts:
        return f"it is on timeline {server.timeline}, whose history does not contain timeline {known.timeline}"
    return ""


def _why_lacking(now: ServerState, sink: SinkState) -> str:
    """Return which changes that the sink holds this server never had; empty if it has all of them."""
    reached = max(sink.checkpoint_ts, sink.highest_ts)
    if now.switch_ts is not None and reached > now.switch_ts:
        return (
            f"it was promoted at {format_lsn(now.switch_ts)}, but the sink has been written up to {format_lsn(reached)}: it lacks"
            " changes that the sink holds, and its own changes since then would be skipped"
        )
    if reached > now.wal_end:
        return (
            f"its WAL ends at {format_lsn(now.wal_end)}, but the sink has been written up to {format_lsn(reached)}: it lacks"
            " changes that the sink holds (was it restored from an older copy?)"
        )
    mark = sink.record.mark if sink.record is not None else None
    if mark is not None and mark.position <= _common_end(now) and now.xmax < mark.xmax:
        return (
            f"its next transaction is {now.xmax}, but was {mark.xmax} at {format_lsn(mark.position)}: it was restored from an"
            " older copy"
        )
    return ""


def _is_nothing_missing(now: ServerState, sink: SinkState) -> bool:
    """Return whether no transaction has committed after a position that all tables have reached."""
    mark = sink.record.mark if sink.record is not None else None
    if mark is None or not mark.is_idle or now.xmax != mark.xmax:
        return False
    return mark.position <= min(sink.checkpoint_ts, _common_end(now))


def _common_end(now: ServerState) -> Ts:
    """Return where the history ends that this server shares with that of the record."""
    return now.wal_end if now.switch_ts is None else now.switch_ts


# --- reading ---------------------------------------------------------------------------------------------------------

# The first 8 digits of a WAL file's name are the timeline that is being written; the control file may be older.
_READ_SERVER = """
SELECT (SELECT system_identifier FROM pg_control_system()), oid::bigint, left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)
  FROM pg_database WHERE datname = current_database()"""
_READ_MARK = """
SELECT pg_current_wal_insert_lsn(), pg_snapshot_xmin(s)::text::bigint, pg_snapshot_xmax(s)::text::bigint,
       pg_current_wal_flush_lsn()
  FROM pg_current_snapshot() s"""


def require_primary(connection: Connection) -> None:
    """Raise SourceUnavailableError if the server is a standby."""
    row = connection.execute("SELECT pg_is_in_recovery()").fetchone()
    if row is not None and row[0]:
        info = connection.info
        raise SourceUnavailableError(f"{info.host}:{info.port}/{info.dbname} is a standby: name the primary in the source's URI")


def read_server(connection: Connection) -> ServerIdentity:
    """Return which database this is; the server must not be a standby."""
    row = connection.execute(_READ_SERVER).fetchone()
    assert row is not None
    return ServerIdentity(row[0], row[1], int(row[2], 16))


def read_mark(connection: Connection) -> tuple[Mark, Ts]:
    """Return the mark of now, and the position up to which the WAL is flushed: a crash may undo what is after it."""
    row = connection.execute(_READ_MARK).fetchone()  # the snapshot is taken before the positions are read
    assert row is not None
    inserted_ts, xmin, xmax, flushed_ts = row
    return Mark(inserted_ts, xmin, xmax), flushed_ts


def read_switch(uri: str, server: ServerIdentity, timeline: int, application_name: str) -> Ts:
    """Return where the server's history left this timeline; 0 if it never was on it."""
    if timeline == server.timeline:
        raise ValueError("a server has not left the timeline that it is on")
    with connect(uri, application_name=application_name, replication=True) as connection:
        result = connection.pgconn.exec_(f"TIMELINE_HISTORY {server.timeline}".encode())
        if result.status != pq.ExecStatus.TUPLES_OK:
            raise SourceUnavailableError(
                f"{server_name(uri)}: cannot read the history of timeline {server.timeline}: {result.get_error_message()}"
            )
        text = (result.get_value(0, 1) or b"").decode()
    return parse_history(text).get(timeline, 0)


def parse_history(text: str) -> dict[int, Ts]:
    """Return where each timeline of a history file was left."""
    return {int(timeline): parse_lsn(position) for timeline, position in _HISTORY_LINE.findall(text)}


# --- as JSON ---------------------------------------------------------------------------------------------------------


def record_to_json(record: SourceRecord) -> dict[str, Any]:
    """Return the record as `record_from_json` reads it. The system identifier is text: it has more digits than a double."""
    server, mark = record.server, record.mark
    found: dict[str, Any] = {"system": str(server.system), "database": server.database, "timeline": server.timeline}
    if mark is not None:
        found["mark"] = {"position": format_lsn(mark.position), "xmin": mark.xmin, "xmax": mark.xmax}
    positions = {"restart": record.restart_ts, "restored": record.restored_ts}
    return found | {name: format_lsn(position) for name, position in positions.items() if position}


def record_from_json(found: Mapping[str, Any] | None) -> SourceRecord | None:
    """Return the record, None if there is none; raise OperatingError if it cannot be read."""
    if not found:
        return None
    try:
        mark = found.get("mark")
        return SourceRecord(
            ServerIdentity(int(found["system"]), int(found["database"]), int(found["timeline"])),
            Mark(parse_lsn(mark["position"]), int(mark["xmin"]), int(mark["xmax"])) if mark else None,
            parse_lsn(found.get("restart", "0/0")),
            parse_lsn(found.get("restored", "0/0")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OperatingError(f"the record of the source cannot be read ({error}): {found}") from None
