"""BulkWriter: gathers the statements of one transaction and sends them in as few round trips as it can."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from processor.postgres.sinks.changes import statements
from processor.postgres.sinks.connection import SinkConnection, Statement
from processor.postgres.sinks.targets import TargetPlan

PIPELINE_MAX = 2_000
"""Statements of one round trip."""


class BulkWriter:
    """One use of one transaction, one thread."""

    def __init__(self, connection: SinkConnection) -> None:
        self.connection = connection
        self._pending: list[Statement] = []
        self._checks: list[tuple[int, Callable[[int | None], None]]] = []

    def add(self, statement: Statement, check: Callable[[int | None], None] | None = None) -> None:
        """check: called with the number of rows that the statement gave, before anything is committed."""
        if check is not None:
            self._checks.append((len(self._pending), check))
        self._pending.append(statement)

    def write(self, plan: TargetPlan, frames: Sequence[bytes]) -> int:
        """Writes changes of one shape, in order; their number."""
        for at in range(0, len(frames), PIPELINE_MAX):
            self._pending += statements(plan, frames[at : at + PIPELINE_MAX])
            if len(self._pending) >= PIPELINE_MAX:
                self.flush()
        return len(frames)

    def flush(self) -> None:
        """Everything that was added has run when this returns."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        checks, self._checks = self._checks, []
        results = self.connection.run(pending)
        for at, check in checks:
            check(results[at].ntuples)
