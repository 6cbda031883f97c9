"""What both sides need of a PostgreSQL source.

source.py is what the owner drives (the entry point `postgresql` of the group `tablewire.sources`); slots.py, checks.py and
catalogue.py are its parts; connections.py and options.py are shared with the executor in processor/postgres.
"""

from tablewire.postgres.source import PostgresSource
from tablewire.source import Source, SourceRequest


def new_source(request: SourceRequest) -> Source:
    """The Source of a `postgresql://` URI. No I/O; OperatingError for what cannot be right."""
    return PostgresSource(request)


__all__ = ["PostgresSource", "new_source"]
