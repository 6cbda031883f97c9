"""What owners and processors share about PostgreSQL as a source.

source.py is the Source that the owner uses; table_listing.py, filters.py, slots.py, checks.py and
sink_checkpoint.py are its parts. catalogue.py, publication.py, connections.py, lsn.py, names.py and
options.py are shared with the executor in processor/postgres. Importing the package alone loads no driver.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tablewire.source import Source, SourceRequest


def new_source(request: SourceRequest) -> Source:
    """Return the Source of a `postgresql://` URI, without I/O; raise OperatingError for a wrong URI or option."""
    from tablewire.postgres.source import PostgresSource

    return PostgresSource(request)
