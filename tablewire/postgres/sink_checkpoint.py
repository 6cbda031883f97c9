"""The record at a PostgreSQL sink of how far the source's slot may have been advanced.

Before the owner advances the slot to a position, it records that position at the sink, where
everything at or before it is durable by then. A sink whose record is before the slot has therefore
lost commits that it had confirmed: it was restored from a backup, or a standby that lacked them was
promoted. The source cannot send those changes again. The owner and every writer check this before
they continue. **Invariant: slot <= record**, so read the slot first when comparing them.
"""

from __future__ import annotations

from tablewire.errors import OperatingError
from tablewire.model.ids import Ts
from tablewire.postgres.connections import Connection, ReconnectingConnection, fetch_value
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
INSERT INTO tablewire.checkpoints AS c (changefeed, incarnation, position) VALUES (%s, %s, %s)
ON CONFLICT (changefeed) DO UPDATE SET incarnation = EXCLUDED.incarnation, updated_at = clock_timestamp(),
  position = CASE c.incarnation WHEN EXCLUDED.incarnation THEN greatest(c.position, EXCLUDED.position)
             ELSE EXCLUDED.position END WHERE c.incarnation <= EXCLUDED.incarnation"""


def require_no_lost_commits(connection: Connection, changefeed: str, incarnation: int, slot_ts: Ts, sink: str) -> None:
    """Raise OperatingError if the sink has lost confirmed commits. slot_ts: the position of the slot, read before this call."""
    query = "SELECT position FROM tablewire.checkpoints WHERE changefeed = %s AND incarnation = %s"
    recorded_ts = fetch_value(connection, query, (changefeed, incarnation))
    if recorded_ts is not None and recorded_ts < slot_ts:
        raise OperatingError(
            f"{sink} is at {format_lsn(recorded_ts)}, but had confirmed everything up to {format_lsn(slot_ts)}, the position of"
            " the source's slot: it has lost commits (was it restored from a backup, or was a standby promoted?), and the source"
            " cannot send them again; remove the changefeed and create it again, or, to continue without them, delete its row at"
            f" the sink (tablewire.checkpoints, changefeed {changefeed})"
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

    def record(self, incarnation: int, slot_ts: Ts, target_ts: Ts) -> None:
        """Record target_ts durably. slot_ts: the position of the slot; see `require_no_lost_commits`."""

        def save(connection: Connection) -> None:
            require_no_lost_commits(connection, self._changefeed, incarnation, slot_ts, self._sink)
            connection.execute(_SAVE, (self._changefeed, incarnation, format_lsn(target_ts)))

        self._connection.run("record a checkpoint", save)  # after an error, the next connection creates a missing table

    def close(self) -> None:
        self._connection.close()


def _set_up(connection: Connection) -> None:
    connection.execute(SYNCHRONOUS_COMMIT)
    create_sink_tables(connection)
