"""ShapeLooks: compares the shapes of tables with the source's catalogue from time to time. The control thread.

A look serves tables without rows, whose changes of shape the stream does not show. It is due when the
stream has passed the last one, at most every LOOK_INTERVAL_S and for at most LOOK_SHARE of the time, so an
idle source is not looked at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import structlog

from processor.postgres.source.shape_watch import ShapeWatch
from processor.postgres.tables.life import ADVANCING
from processor.postgres.tables.steps import pending_change
from processor.postgres.tables.table_work import TableWork
from tablewire.errors import OperatingError
from tablewire.model.ids import Ts

LOOK_INTERVAL_S = 0.25
LOOK_SHARE = 0.05

_log = structlog.get_logger(__name__)


class ShapeLooks:
    """See the module."""

    def __init__(self, watch: ShapeWatch, check_publication: Callable[[], bool], is_needed: bool) -> None:
        """Take what a look calls.

        check_publication: fails tables whose changes may not have been published; returns False if the
        source cannot be asked. is_needed: the sink follows shapes; else nothing is looked at, and
        checkpoints do not depend on it.
        """
        self._watch = watch
        self._check_publication = check_publication
        self._is_needed = is_needed
        self._position: Ts = 0
        """Of the last look."""
        self._next_at = 0.0
        self._is_waiting = False
        """Something was to be looked at, but not yet."""

    def wait_s(self, longest_s: float) -> float:
        """Return how long the control thread may wait before the next call of `run`."""
        return min(longest_s, max(self._next_at - time.monotonic(), 0.0)) if self._is_waiting else longest_s

    def begin(self, table: TableWork) -> None:
        """Hold the checkpoint of a new table until it has been looked at."""
        if self._is_needed:
            table.verified_ts = 0

    def run(self, tables: Sequence[TableWork], position: Ts) -> None:
        """Look if that is due, and have workers follow what was found. position: of the shared stream."""
        followed = [table for table in tables if table.life.state in ADVANCING] if self._is_needed else []
        is_wanted = position > self._position or any(table.verified_ts < self._position for table in followed)
        self._is_waiting = bool(followed) and is_wanted
        if self._is_waiting and time.monotonic() >= self._next_at:
            self._look(followed)
        for table in followed:
            if pending_change(table) is not None:
                table.services.submit(table)

    def _look(self, tables: Sequence[TableWork]) -> None:
        started = time.monotonic()
        try:
            position, changed = self._watch.look([table.table_id for table in tables])
            is_checked = self._check_publication()  # after the position of the look
        except OperatingError as error:
            _log.warning("postgres_catalogue_unreadable", reason=str(error))
            self._next_at = time.monotonic() + 1.0
            return
        ended = time.monotonic()
        self._next_at = ended + max(LOOK_INTERVAL_S, (ended - started) / LOOK_SHARE)
        if not is_checked:
            return
        self._position = position
        for table in tables:
            if table.error is not None:
                continue
            table.verified_ts = max(table.verified_ts, self._watch.verified_ts(table.table_id))
            shape, schema = changed.get(table.table_id), table.schema
            if shape is not None and schema is not None and (shape.schema, shape.name) != (schema.schema, schema.name):
                table.replace_schema(replace(schema, schema=shape.schema, name=shape.name))
