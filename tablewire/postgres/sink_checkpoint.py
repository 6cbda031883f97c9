"""What a PostgreSQL sink says of its own past: how far the source's slot may have been advanced on its account.

Before the owner advances the slot to a position, it notes that position at the sink, and everything at or before it has been
durable there by then. So a sink whose note lies before the slot has lost commits that it had confirmed: it was restored from a
backup, or a standby that lacked them has taken over. The source cannot give those changes again. The owner and every writer ask
for this before they go on; **invariant: slot <= note**, so whoever compares reads the slot first.
"""

from __future__ import annotations

from tablewire.errors import OperatingError
from tablewire.model.ids import Ts
from tablewire.postgres.connections import Connection, ReconnectingConnection, StatementError, quote_text
from tablewire.postgres.lsn import format_lsn, parse_lsn

STATEMENT_TIMEOUT_MS = 5_000
CLIENT_TIMEOUT_S = 10.0
"""Longer than the server's own limit: only a server that does not keep it is given up by this."""
CREATE_TABLE = """
CREATE TABLE IF NOT EXISTS tablewire.checkpoints (
  changefeed text PRIMARY KEY,
  incarnation bigint NOT NULL,
  position pg_lsn NOT NULL,
  updated_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE tablewire.checkpoints IS
  'The source may have forgotten everything at or before position: it was in all tables of the changefeed by then.'"""
OWNER_SESSION = "tablewire owner"
"""The application name of the owner's session, which stays open between two notes."""
CREATE_LOCK = 0x7461626C65776972  # "tablewir": one creator of Tablewire's own tables at a time
_CREATE = f"""
BEGIN;
SELECT pg_advisory_xact_lock({CREATE_LOCK});
CREATE SCHEMA IF NOT EXISTS tablewire;
{CREATE_TABLE};
COMMIT"""
_EXISTS = "SELECT to_regclass('tablewire.checkpoints') IS NOT NULL"


def read_sql(changefeed: str, incarnation: int) -> str:
    """One row with the note of this life of the changefeed, none when there is none."""
    return (
        f"SELECT position::text FROM tablewire.checkpoints WHERE changefeed = {quote_text(changefeed)}"
        f" AND incarnation = {incarnation}"
    )


def require_kept(noted: str | None, slot_ts: Ts, where: str, changefeed: str) -> None:
    """OperatingError when the sink has lost confirmed commits. noted: the row's position, None without one (nothing is known
    then). slot_ts: where the slot stood before the row was read."""
    if noted is None or parse_lsn(noted) >= slot_ts:
        return
    raise OperatingError(
        f"{where} stands at {noted}, but had confirmed everything up to {format_lsn(slot_ts)}, where the source's slot is by now:"
        " it has lost commits (was it restored from a backup, or did a standby take over?), and the source cannot give them"
        " again; remove the changefeed and create it anew, or, to go on without them, delete its row at the sink"
        f" (tablewire.checkpoints, changefeed {changefeed})"
    )


class SinkNotes:
    """The owner's side: one connection to the sink, made when it is needed. One thread."""

    def __init__(self, uri: str, where: str, changefeed: str) -> None:
        self._where = where
        self._changefeed = changefeed
        self._connection = ReconnectingConnection(uri, application_name=OWNER_SESSION, set_up=_set_up, limit_s=CLIENT_TIMEOUT_S)

    def note(self, incarnation: int, slot_ts: Ts, target_ts: Ts) -> None:
        """Notes target_ts, durably, unless the sink has lost commits: see `require_kept`. slot_ts: where the slot stands."""
        try:
            self._connection.run("note a checkpoint", lambda found: self._note(found, incarnation, slot_ts, target_ts))
        except StatementError:
            self.close()  # the table may be gone: the next connection makes it again
            raise

    def close(self) -> None:
        self._connection.close()

    def _note(self, connection: Connection, incarnation: int, slot_ts: Ts, target_ts: Ts) -> None:
        row = connection.execute(read_sql(self._changefeed, incarnation).encode()).fetchone()
        require_kept(None if row is None else str(row[0]), slot_ts, self._where, self._changefeed)
        connection.execute(
            (
                "INSERT INTO tablewire.checkpoints AS c (changefeed, incarnation, position)"
                f" VALUES ({quote_text(self._changefeed)}, {incarnation}, '{format_lsn(target_ts)}')"
                " ON CONFLICT (changefeed) DO UPDATE SET incarnation = EXCLUDED.incarnation, updated_at = clock_timestamp(),"
                " position = CASE c.incarnation WHEN EXCLUDED.incarnation THEN greatest(c.position, EXCLUDED.position)"
                " ELSE EXCLUDED.position END WHERE c.incarnation <= EXCLUDED.incarnation"
            ).encode()
        )


def _set_up(connection: Connection) -> None:
    connection.execute(f"SET statement_timeout = {STATEMENT_TIMEOUT_MS}; SET lock_timeout = {STATEMENT_TIMEOUT_MS}".encode())
    connection.execute(
        b"SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
    )
    row = connection.execute(_EXISTS.encode()).fetchone()
    if row is None or not row[0]:
        connection.execute(_CREATE.encode())
