"""The executor that ships: replicates PostgreSQL tables by logical replication, to PostgreSQL or to files.

**Invariant: at every position at or before its checkpoint, a table at a PostgreSQL sink equals the table
at the source, or the table shows an error or a pending copy.** Whatever cannot be followed exactly leads
to a new copy, or to an error of that table with a way out that works; never to a silent difference.

source/   what a source sends: catalogue, replication connections, the messages of pgoutput
sinks/    where changes are written: PostgreSQL, files, nothing
tables/   one table between its readers and its sink: its life, its queue, the workers that write it
readers/  the streams and first copies that fill the queues
executor.py composes them. Each folder imports only those above it.
"""

from processor.postgres.executor import PostgresExecutor
from tablewire.executor import ExecutorRequest, TableExecutor


def new_executor(request: ExecutorRequest) -> TableExecutor:
    """Return the executor of a `postgresql://` source, without I/O; raise OperatingError for a wrong URI or option."""
    return PostgresExecutor(request)


__all__ = ["PostgresExecutor", "new_executor"]
