"""The executor that ships: replicates PostgreSQL tables by logical replication, to PostgreSQL or to files.

Read in this order: executor.py (the contract and the threads), table_work.py (one table's life), queues.py
(between streams and writers), wire.py, replication.py, stream.py, shared_stream.py, catch_up.py (the
source's side), workers.py, writing.py, snapshot.py, sinks/ (the other side).
"""

from processor.postgres.executor import PostgresExecutor
from tablewire.executor import ExecutorRequest, TableExecutor


def new_executor(request: ExecutorRequest) -> TableExecutor:
    """Return the executor of a `postgresql://` source, without I/O; raise OperatingError for a wrong URI or option."""
    return PostgresExecutor(request)


__all__ = ["PostgresExecutor", "new_executor"]
