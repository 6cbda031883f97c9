"""The executor that ships: PostgreSQL tables by logical replication, to PostgreSQL or to files.

Read in this order: executor.py (the face and its threads), table.py (one table's life), queues.py (between streams and
writers), wire.py, stream.py, shared_stream.py, catch_up.py (the source's side), workers.py, snapshot.py, sinks/ (the other side).
"""

from processor.postgres.executor import PostgresExecutor
from tablewire.executor import ExecutorRequest, TableExecutor


def new_executor(request: ExecutorRequest) -> TableExecutor:
    """The executor of a `postgresql://` source. No I/O; OperatingError for what cannot be right."""
    return PostgresExecutor(request)


__all__ = ["PostgresExecutor", "new_executor"]
