"""The record at a PostgreSQL sink of how far the source's slot may have been advanced.

Before the owner advances the slot to a position, it records that position at the sink, where
everything at or before it is durable by then. A sink whose record is before the slot has therefore
lost commits that it had confirmed: it was restored from a backup, or a standby that lacked them was
promoted. The source cannot send those changes again. The owner and every writer check this before
they continue. **Invariant: slot <= record**, so read the slot first when comparing them. A slot that
was restored from a processor's (servers.py) may be ahead of the tables: until the checkpoint has passed
it, the record is where it was restored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from psycopg.types.json import Jsonb

from tablewire.errors import OperatingError
from tablewire.model.ids import Ts
from tablewire.postgres.connections import Connection, ReconnectingConnection, SourceUnavailableError, fetch_value
from tablewire.postgres.lsn import format_lsn
from tablewire.postgres.sink_tables import create_sink_tables

STATEMENT_TIMEOUT_MS = 5_000
CLIENT_TIMEOUT_S = 10.0
"""Longer than the timeout of the server: it only ends what a hanging server cannot."""
OWNER_SESSION = "tablewire owner"
"""The application name of the owner's session, which stays open between two records."""
SYNCHRONOUS_COMMIT = "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
"""Positions that the sink confirms must be durable; a setting stronger than "on" is left alone."""
_SAVE = """
INSERT INTO tablewire.checkpoints AS c (changefeed, incarnation, position, source) VALUES (%s, %s, %s, %s)
ON CONFLICT (changefeed) DO UPDATE SET incarnation = EXCLUDED.incarnation, source = EXCLUDED.source,
  updated_at = clock_timestamp(),
  position = CASE c.incarnation WHEN EXCLUDED.incarnation THEN greatest(c.position, EXCLUDED.position)
             ELSE EXCLUDED.position END WHERE c.incarnation <= EXCLUDED.incarnation"""
_READ = """
SELECT c.position, c.source, p.highest FROM (SELECT max(position) AS highest FROM tablewire.positions
        WHERE changefeed = %(changefeed)s AND incarnation = %(incarnation)s) p
  LEFT JOIN tablewire.checkpoints c ON c.changefeed = %(changefeed)s AND c.incarnation = %(incarnation)s"""
_RECORDED = """
SELECT greatest(position, (source ->> 'restored')::pg_lsn), (source ->> 'system')::numeric, (source ->> 'timeline')::int
  FROM tablewire.checkpoints WHERE changefeed = %s AND incarnation = %s"""
_LOCK = """
SELECT max(position)
  FROM (SELECT position FROM tablewire.positions WHERE changefeed = %s AND incarnation = %s FOR UPDATE) locked"""
_FENCE = """
UPDATE tablewire.positions SET assignment_epoch = assignment_epoch + 1, updated_at = clock_timestamp(),
       position = CASE WHEN snapshot IN ('done', 'skipped') THEN greatest(position, %s::pg_lsn) ELSE position END
 WHERE changefeed = %s AND incarnation = %s"""
# A table that was dropped or created again at the sink since then is not the one that the changefeed wrote.
_REMOVE = """
WITH removed AS (DELETE FROM tablewire.positions WHERE changefeed = %(changefeed)s AND incarnation <= %(incarnation)s RETURNING *)
INSERT INTO tablewire.former_tables (changefeed, table_name, sink_table)
  SELECT changefeed, table_name, (sink_shape ->> 'oid')::oid FROM removed
   WHERE sink_shape ? 'oid' AND snapshot IN ('done', 'skipped')
  ON CONFLICT (changefeed, table_name) DO UPDATE SET sink_table = EXCLUDED.sink_table, removed_at = clock_timestamp();
DELETE FROM tablewire.takeovers WHERE changefeed = %(changefeed)s AND incarnation <= %(incarnation)s;
DELETE FROM tablewire.checkpoints WHERE changefeed = %(changefeed)s AND incarnation <= %(incarnation)s"""
_ADOPT = """
WITH former AS (DELETE FROM tablewire.former_tables WHERE changefeed = %s RETURNING *)
INSERT INTO tablewire.positions (changefeed, table_name, source_table_id, incarnation, changefeed_epoch, assignment_epoch,
    position, snapshot, writer)
  SELECT changefeed, table_name, 0, 0, 0, 0, '0/0', 'reload', '' FROM former WHERE sink_table IN (SELECT oid FROM pg_class)
  ON CONFLICT DO NOTHING"""
_LAST_INCARNATION = """
SELECT max(incarnation) FROM (SELECT changefeed, incarnation FROM tablewire.checkpoints
       UNION ALL SELECT changefeed, incarnation FROM tablewire.positions) known WHERE changefeed = %s"""


@dataclass(frozen=True, slots=True)
class SinkRecord:
    """What the sink holds of an incarnation. position: recorded by the owner; None: nothing was. highest_ts: of its tables."""

    position: Ts | None
    source: Mapping[str, Any] | None
    highest_ts: Ts


def require_no_lost_commits(
    connection: Connection, changefeed: str, incarnation: int, slot_ts: Ts, sink: str, server: tuple[int, int] | None = None
) -> None:
    """Raise OperatingError if the sink has lost confirmed commits. slot_ts: the position of the slot, read before this call.

    server: the system identifier and the timeline that a writer reads from; raise SourceUnavailableError if the owner has
    not accepted it: a writer must not continue on another server before the owner has compared it with the sink.
    """
    row = connection.execute(_RECORDED, (changefeed, incarnation)).fetchone()
    if row is None:
        return
    recorded_ts, system, timeline = row
    if recorded_ts < slot_ts:
        raise OperatingError(
            f"{sink} is at {format_lsn(recorded_ts)}, but had confirmed everything up to {format_lsn(slot_ts)}, the position of"
            " the source's slot: it has lost commits (was it restored from a backup, or was a standby promoted?), and the source"
            " cannot send them again; `owner changefeed resync` copies all tables again; or, to continue without them, delete the"
            f" changefeed's row at the sink (tablewire.checkpoints, changefeed {changefeed})"
        )
    if server is not None and system is not None and (int(system), timeline) != server:
        raise SourceUnavailableError(
            f"the source is on timeline {server[1]} of system {server[0]}, and {sink} was filled from timeline {timeline} of"
            f" {system}: the owner has not accepted that yet"
        )


class SinkCheckpoint:
    """The owner's side: one connection to the sink, opened when it is needed. One thread."""

    def __init__(self, uri: str, sink: str, changefeed: str) -> None:
        self._sink = sink
        self._changefeed = changefeed
        self._connection = ReconnectingConnection(
            uri,
            application_name=OWNER_SESSION,
            settings={"statement_timeout": STATEMENT_TIMEOUT_MS, "lock_timeout": STATEMENT_TIMEOUT_MS},
            set_up=_set_up,
            limit_s=CLIENT_TIMEOUT_S,
        )

    def read(self, incarnation: int) -> SinkRecord:
        """Return what the sink holds of this incarnation."""

        def read(connection: Connection) -> SinkRecord:
            row = connection.execute(_READ, {"changefeed": self._changefeed, "incarnation": incarnation}).fetchone()
            assert row is not None
            return SinkRecord(row[0], row[1], row[2] or 0)

        return self._connection.run("read the checkpoint", read)

    def last_incarnation(self) -> int:
        """Return the highest incarnation of this changefeed that the sink has seen; 0 if there was none."""

        def read(connection: Connection) -> int:
            return fetch_value(connection, _LAST_INCARNATION, (self._changefeed,)) or 0

        return self._connection.run("read the checkpoint", read)

    def accept(self, incarnation: int, position: Ts, source: Mapping[str, Any], *, highest_ts: Ts, pass_over_to: Ts = 0) -> None:
        """Record that another server is accepted, and refuse everything that was read before, in one transaction.

        Each table gets a higher epoch, so that its writer must take it over again. highest_ts: the decision counts only
        as long as no table is ahead of it. pass_over_to: where tables continue at least.
        """

        def accept(connection: Connection) -> None:
            with connection.transaction():
                found = fetch_value(connection, _LOCK, (self._changefeed, incarnation)) or 0
                if found > highest_ts:
                    raise OperatingError(f"{self._sink}: a table has advanced to {format_lsn(found)} meanwhile; try again")
                connection.execute(_FENCE, (format_lsn(pass_over_to), self._changefeed, incarnation))
                connection.execute(_SAVE, (self._changefeed, incarnation, format_lsn(position), Jsonb(source)))

        self._connection.run("record the source", accept)

    def record(self, incarnation: int, slot_ts: Ts, target_ts: Ts, source: Mapping[str, Any]) -> None:
        """Record target_ts and the source durably. slot_ts: the position of the slot; see `require_no_lost_commits`."""

        def save(connection: Connection) -> None:
            require_no_lost_commits(connection, self._changefeed, incarnation, slot_ts, self._sink)
            connection.execute(_SAVE, (self._changefeed, incarnation, format_lsn(target_ts), Jsonb(source)))

        self._connection.run("record a checkpoint", save)  # after an error, the next connection creates a missing table

    def remove(self, incarnation: int) -> None:
        """Delete the rows of this incarnation and earlier ones; note which tables the changefeed has written."""

        def remove(connection: Connection) -> None:
            with connection.transaction():
                values = {"changefeed": self._changefeed, "incarnation": incarnation}
                for statement in _REMOVE.split(";"):
                    connection.execute(statement.encode(), values)

        self._connection.run("remove the positions", remove)

    def adopt(self) -> None:
        """Have a new changefeed replace the rows that a removed one of its name has written."""
        self._connection.run("read former tables", lambda connection: connection.execute(_ADOPT, (self._changefeed,)))

    def close(self) -> None:
        self._connection.close()


def _set_up(connection: Connection) -> None:
    connection.execute(SYNCHRONOUS_COMMIT)
    create_sink_tables(connection)
