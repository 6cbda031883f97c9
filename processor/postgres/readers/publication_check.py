"""PublicationCheck: fails tables whose changes may not have been published. The control thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import structlog

from processor.postgres.source.catalogue import SourceCatalogue
from processor.postgres.tables.table_work import TableWork
from tablewire.errors import OperatingError
from tablewire.model.ids import TableID, Ts
from tablewire.postgres.connections import SourceUnavailableError, StatementError

INTERVAL_S = 1.0
"""How often the publication is read for a sink that follows no shapes, while the source writes WAL."""
SHARE = 0.02
"""At most this part of the time is used for that."""

_log = structlog.get_logger(__name__)


class PublicationCheck:
    """See the module. tables: returns all tables of the executor."""

    def __init__(self, catalogue: SourceCatalogue, tables: Callable[[], Sequence[TableWork]]) -> None:
        self._catalogue = catalogue
        self._tables = tables
        self._next_at = 0.0
        self._seen_ts: Ts = 0
        """The position of the shared stream at the last check."""

    def run_if_due(self, position: Ts) -> None:
        """Check from time to time. position: of the shared stream."""
        now = time.monotonic()
        if now < self._next_at or position == self._seen_ts:
            return
        if self.run():
            self._seen_ts = position
        ended = time.monotonic()
        self._next_at = ended + max(INTERVAL_S, (ended - now) / SHARE)

    def run(self) -> bool:
        """Fail tables that left the publication, even if they are back: changes are missing, so they must be taken over again.

        Return False if the source cannot be asked now.
        """
        followed = [table for table in self._tables() if table.is_followed]
        published: Mapping[TableID, Ts] = {}
        reason = ""
        try:
            published = self._catalogue.published()
        except (SourceUnavailableError, StatementError) as error:
            _log.warning("postgres_publication_unreadable", reason=str(error))
            return False
        except OperatingError as error:
            reason = str(error)
        for table in followed:
            schema = table.schema
            if schema is not None and published.get(table.table_id) != schema.published_ts:
                unpublished = self._catalogue.unpublished(schema)
                table.fail(OperatingError(f"table {schema.full_name}: {reason}") if reason else unpublished)
        return True
