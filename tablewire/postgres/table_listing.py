"""TableListing: the tables of a changefeed now, and the publication that is kept equal to them.

A table that cannot be published is one bad table: all others are listed, published and scheduled.
 - One that was never replicated is **left out** until it can be published, with a reason that operators
   see. It holds neither the checkpoint nor the slot, since nothing of it is at the sink.
 - One that was replicated is **withdrawn**: it stays listed, and its executor reports the error. It holds
   the checkpoint, as its changes are missed; it is copied again when it can be published.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence, Set

import structlog

from tablewire.model.ids import TableID, Ts
from tablewire.postgres.catalogue import PublicationRules, SourceTable, list_tables
from tablewire.postgres.connections import Connection, fetch_value
from tablewire.postgres.filters import TableFilter
from tablewire.postgres.publication import sync_publication

RETRY_S = 2.0
"""A table that could not be added is tried again after this long: it may wait for a lock each time."""
NAMES_MAX = 5

_log = structlog.get_logger(__name__)


class TableListing:
    """See the module. One thread."""

    def __init__(self, changefeed: str, name: str, table_filter: TableFilter, rules: PublicationRules) -> None:
        """Take the name of the publication, and what it must contain."""
        self.left_out: Mapping[TableID, str] = {}
        """Why tables that the filter matches are not replicated, in the last listing."""
        self._changefeed = changefeed
        self._name = name
        self._filter = table_filter
        self._rules = rules
        self._failed: dict[TableID, tuple[float, str]] = {}
        """Tables that could not be added or dropped: when to try again, and why it failed."""
        self._logged: Mapping[TableID, str] = {}
        self._not_replicated: Sequence[str] = ()
        self._listed: Mapping[TableID, str] = {}
        self._wal_end: Ts | None = None
        """The end of the WAL right before the last listing."""

    def read(self, connection: Connection) -> Mapping[TableID, str]:
        """Return the tables and their names; make the publication list those that it can."""
        # A change of the catalogue is in the WAL: without new WAL, the previous listing is still right.
        wal_end: Ts = fetch_value(connection, "SELECT pg_current_wal_insert_lsn()")
        now = time.monotonic()
        is_due = any(retry_at <= now for retry_at, _ in self._failed.values())
        if self._wal_end == wal_end and not is_due:
            return self._listed
        found = list_tables(connection, self._filter, self._rules)
        avoided = {table_id for table_id, (retry_at, _) in self._failed.items() if retry_at > now}
        result = sync_publication(connection, self._name, self._rules, found.tables, avoided, self._listed.keys())
        retry_at = time.monotonic() + RETRY_S
        self._failed = {table_id: self._failed[table_id] for table_id in avoided} | {
            table_id: (retry_at, reason) for table_id, reason in result.problems.items()
        }
        self._note_problems(found.tables, result.scheduled)
        self._listed = {table.table_id: table.full_name for table in found.tables if table.table_id in result.scheduled}
        self._log_kinds(found.not_replicated)
        self._wal_end = wal_end
        return self._listed

    def _note_problems(self, tables: Sequence[SourceTable], scheduled: Set[TableID]) -> None:
        """Log each new problem of a table, and note those of tables that are not scheduled."""
        problems = {table.table_id: reason for table in tables if (reason := self._problem(table))}
        self.left_out = {table_id: reason for table_id, reason in problems.items() if table_id not in scheduled}
        for table_id, reason in problems.items():
            if self._logged.get(table_id) == reason:
                continue
            if table_id in scheduled:
                _log.warning("source_table_unusable", changefeed=self._changefeed, reason=reason)
            else:
                _log.warning("source_table_left_out", changefeed=self._changefeed, reason=reason)
        self._logged = problems

    def _problem(self, table: SourceTable) -> str:
        return table.why_unusable(self._rules) or self._failed.get(table.table_id, (0.0, ""))[1]

    def _log_kinds(self, reasons: Sequence[str]) -> None:
        """Log the relations of the filter that are never replicated, whenever they change."""
        if reasons != self._not_replicated:
            shown = "; ".join(reasons[:NAMES_MAX])
            _log.info("source_relations_not_replicated", changefeed=self._changefeed, count=len(reasons), reason=shown)
        self._not_replicated = reasons
