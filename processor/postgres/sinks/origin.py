"""Marks what a session writes, so that it can be recognized in the WAL of the sink as replicated.

Tablewire's own streams recognize the message at the beginning of a transaction, which needs no
privilege (tablewire/postgres/identity.py). For other readers, such as native subscriptions with
`origin = none`, a session also gets a replication origin, if its role may use one and at most half of
those that the server can track are in use: each session needs one of its own. All changefeeds of a sink
share `tablewire_1`, `tablewire_2` and so on, and reuse what is free.
"""

from __future__ import annotations

from contextlib import suppress

import psycopg

from processor.postgres.sinks.connection import SinkConnection, Statement
from tablewire.postgres.identity import MARK_PREFIX

_ORIGIN_PREFIX = "tablewire_"
_MARK = "SELECT pg_catalog.pg_logical_emit_message(true, $1::pg_catalog.text, $2::pg_catalog.text)"
_ORIGINS = """
SELECT coalesce(pg_catalog.current_setting('max_active_replication_origins', true),
                pg_catalog.current_setting('max_replication_slots'))::int / 2,
       (SELECT count(*) FROM pg_catalog.pg_replication_origin_status),
       ARRAY(SELECT roname FROM pg_catalog.pg_replication_origin WHERE pg_catalog.starts_with(roname, %s) ORDER BY roident)"""
_UNUSABLE = (
    psycopg.errors.InsufficientPrivilege,
    psycopg.errors.ConfigurationLimitExceeded,
    psycopg.errors.UniqueViolation,  # another session has created the same one: at the next connection
    psycopg.errors.ObjectNotInPrerequisiteState,  # recovery, or no origin can be tracked at all
)


def mark_statement(connection: SinkConnection, source: str) -> Statement | None:
    """Return the statement that marks a transaction; None if logical replication cannot read the sink. source: its identity."""
    if connection.query("SHOW wal_level") != [("logical",)]:
        return None
    with suppress(*_UNUSABLE):  # the mark alone is sufficient for Tablewire
        _use_origin(connection)
    return _MARK, [MARK_PREFIX.encode(), source.encode()]


def _use_origin(connection: SinkConnection) -> None:
    """Use one of Tablewire's replication origins that no other session uses; create one if there is none."""
    ((most, used, names),) = connection.query(_ORIGINS, (_ORIGIN_PREFIX,))
    for name in names:
        try:
            connection.query("SELECT pg_catalog.pg_replication_origin_session_setup(%s)", (name,))
        except psycopg.errors.ObjectInUse:
            continue
        return
    if used < most:
        name = f"{_ORIGIN_PREFIX}{len(names) + 1}"
        connection.query("SELECT pg_catalog.pg_replication_origin_create(%s)", (name,))
        connection.query("SELECT pg_catalog.pg_replication_origin_session_setup(%s)", (name,))
