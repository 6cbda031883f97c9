"""What the tests of the PostgreSQL executor share: a source, executors driven as by an agent, comparing by content."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import psycopg

from processor.postgres import PostgresExecutor, new_executor
from tablewire.executor import ExecutorRequest
from tablewire.model.ids import ChangefeedID, Ts
from tablewire.model.progress import Checkpoint
from tablewire.model.spans import Span
from tablewire.model.states import TableState
from tablewire.postgres import new_source
from tablewire.postgres.source import PostgresSource
from tablewire.source import SourceRequest

DEADLINE_S = 20.0
_numbers = itertools.count(1)
_epochs = itertools.count(1)


def wait_until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Polls until the condition holds; fails with what was waited for."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {deadline_s:g} s: {what}")
        time.sleep(0.005)


class Kit:
    """One changefeed between two databases."""

    def __init__(
        self,
        source_uri: str,
        sink_uri: str,
        tables: Sequence[str] = ("public.*",),
        initial_snapshot: bool = True,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self.source_uri = source_uri
        self.sink_uri = sink_uri
        self.changefeed = ChangefeedID("default", f"kit_{source_uri.rpartition('/')[2]}_{next(_numbers)}")
        self.tables = tables
        self.initial_snapshot = initial_snapshot
        self.options = dict(options or {})
        self._stack = ExitStack()
        self.source_connection = self._stack.enter_context(psycopg.connect(source_uri, autocommit=True))
        self.sink_connection: psycopg.Connection[tuple[object, ...]] | None = None
        if sink_uri.startswith("postgres"):
            self.sink_connection = self._stack.enter_context(psycopg.connect(sink_uri, autocommit=True))
        self.source: PostgresSource | None = None
        self.start_ts: Ts = 0
        self.executors: list[PostgresExecutor] = []
        self.wakes = 0

    def __enter__(self) -> Kit:
        return self

    def __exit__(self, *_: object) -> None:
        for executor in self.executors:
            executor.close()
        if self.source is not None:
            self.source.drop()
            self.source.close()
        self._stack.close()

    def run(self, statement: str) -> list[tuple[object, ...]]:
        """One statement at the source."""
        cursor = self.source_connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description is not None else []

    def has_xml(self) -> bool:
        """Whether the server was built with libxml; the wheel of PostgreSQL 18 was not."""
        try:
            self.run("SELECT xml '<a/>'")
        except psycopg.errors.FeatureNotSupported:
            return False
        return True

    def at_sink(self, statement: str) -> list[tuple[object, ...]]:
        assert self.sink_connection is not None
        cursor = self.sink_connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description is not None else []

    def start(self) -> Ts:
        """What the owner does first."""
        source = new_source(SourceRequest(self.changefeed, self.source_uri, self.sink_uri, self.tables, options=self.options))
        assert isinstance(source, PostgresSource)
        self.source = source
        self.start_ts = source.start()
        return self.start_ts

    def executor(self, capture: str = "a", changefeed_epoch: int = 1, **changes: object) -> PostgresExecutor:
        def wake() -> None:
            self.wakes += 1

        values: dict[str, object] = {
            "capture_id": f"capture-{capture}",
            "changefeed": self.changefeed,
            "changefeed_epoch": changefeed_epoch,
            "source_uri": self.source_uri,
            "sink_uri": self.sink_uri,
            "tables": self.tables,
            "start_ts": self.start_ts,
            "initial_snapshot": self.initial_snapshot,
            "options": self.options,
            "wake": wake,
            **changes,
        }
        executor = new_executor(ExecutorRequest(**values))  # type: ignore[arg-type]
        assert isinstance(executor, PostgresExecutor)
        self.executors.append(executor)
        return executor

    def span(self, name: str) -> Span:
        rows = self.run(f"SELECT '{name}'::regclass::oid::bigint")
        return Span(int(str(rows[0][0])))

    def spans(self) -> list[Span]:
        assert self.source is not None
        return [Span(table_id) for table_id in self.source.tables()]

    def matches(self, *names: str) -> bool:
        """Source = sink by the text of every row."""
        return all(self.content(self.source_connection, name) == self.sink_content(name) for name in names)

    def sink_content(self, name: str) -> object:
        assert self.sink_connection is not None
        return self.content(self.sink_connection, name)

    @staticmethod
    def content(connection: psycopg.Connection[tuple[object, ...]], name: str) -> object:
        try:
            return connection.execute(
                f"SELECT array_agg(j ORDER BY j) FROM (SELECT to_jsonb(t)::text AS j FROM {name} t) q".encode()
            ).fetchone()
        except psycopg.errors.UndefinedTable:
            return "no table"

    def wait_equal(self, *names: str, deadline_s: float = DEADLINE_S) -> None:
        try:
            wait_until(lambda: self.matches(*names), f"source = sink for {names}", deadline_s)
        except AssertionError:
            for name in names:
                source, sink = self.content(self.source_connection, name), self.sink_content(name)
                if source != sink:
                    raise AssertionError(f"{name}: source {str(source)[:1500]} sink {str(sink)[:1500]}") from None
            raise


def prepare(executor: PostgresExecutor, span: Span, checkpoint_ts: Ts) -> None:
    """Phase one, as an agent calls it."""
    checkpoint = Checkpoint(checkpoint_ts, checkpoint_ts)
    wait_until(lambda: executor.add_table_span(span, checkpoint, True), "the prepare is taken")

    def finished() -> bool:
        executor.get_table_span_status(span, False)
        return executor.is_add_table_span_finished(span, True)

    wait_until(finished, "the span is prepared")


def promote(executor: PostgresExecutor, span: Span, checkpoint_ts: Ts, epoch: int | None = None) -> int:
    """Phase two; the epoch that was granted."""
    epoch = next(_epochs) if epoch is None else epoch
    checkpoint = Checkpoint(checkpoint_ts, checkpoint_ts)
    executor.set_assignment_epoch(span, epoch)
    wait_until(lambda: executor.add_table_span(span, checkpoint, False), "the write is taken")

    def finished() -> bool:
        executor.get_table_span_status(span, False)
        return executor.is_add_table_span_finished(span, False)

    wait_until(finished, "the span writes")
    return epoch


def stop(executor: PostgresExecutor, span: Span) -> Ts:
    """Removes the span; its last checkpoint."""
    wait_until(lambda: executor.remove_table_span(span), "the removal is taken")
    found: list[Ts] = []

    def finished() -> bool:
        checkpoint_ts, is_finished = executor.is_remove_table_span_finished(span)
        if is_finished:
            found.append(checkpoint_ts)
        return is_finished

    wait_until(finished, "the span is stopped")
    return found[0]


def begin(executor: PostgresExecutor, spans: Sequence[Span], checkpoint_ts: Ts) -> None:
    """Prepares all, then lets all write."""
    for span in spans:
        executor.add_table_span(span, Checkpoint(checkpoint_ts, checkpoint_ts), True)
    for span in spans:
        prepare(executor, span, checkpoint_ts)
    for span in spans:
        promote(executor, span, checkpoint_ts)


def checkpoint_of(executor: PostgresExecutor, span: Span) -> Ts:
    status = executor.get_table_span_status(span, False)
    assert status.state is not TableState.ABSENT
    return status.checkpoint.checkpoint_ts


def current(kit: Kit) -> Ts:
    """The end of the source's WAL."""
    assert kit.source is not None
    return kit.source.current_ts()


def follow(kit: Kit, *names: str) -> PostgresExecutor:
    """Starts an executor that writes these tables, and waits for their first copies."""
    start_ts = kit.start()
    executor = kit.executor()
    begin(executor, [kit.span(name) for name in names], start_ts)
    settle(kit, *names)
    return executor


def settle(kit: Kit, *names: str) -> None:
    """Everything that is committed now has been written to these tables."""
    target = current(kit)
    executor = kit.executors[-1]
    for name in names:
        span = kit.span(name)
        wait_until(lambda span=span: checkpoint_of(executor, span) >= target, f"the checkpoint of {name}")  # type: ignore[misc]
