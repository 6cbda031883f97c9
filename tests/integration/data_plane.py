"""The oracle of the data plane: after it settles, source = sink by content, or the table shows an error.

`DataPlane` drives the executor of a `Kit` as an owner and an agent do: it lists the tables again and again, adds each one
(prepare, then write), removes one whose executor reported an error and adds it again after a pause, and advances the slot.
A `Scenario` is one row of a literal table: setup, changes, expectation; `run_scenario` replays it.

A difference counts as silent as soon as a table that shows no error has reported a checkpoint at or past the last commit.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum

import psycopg
from psycopg import sql

from processor.postgres import PostgresExecutor
from tablewire.errors import InvariantError, OperatingError
from tablewire.model.ids import TableID, Ts
from tablewire.model.progress import Checkpoint
from tablewire.model.spans import Span
from tablewire.model.states import TableState
from tablewire.postgres import new_source
from tablewire.postgres.names import slot_name
from tablewire.postgres.source import PostgresSource
from tablewire.source import SourceRequest
from tests.processor.postgres.replication_kit import Kit

DEADLINE_S = 20.0
POLL_S = 0.01
LIST_INTERVAL_S = 0.1
ADVANCE_INTERVAL_S = 0.3
RETRY_MIN_S = 0.1
RETRY_MAX_S = 1.0
FAILURES_OF_AN_ERROR = 3
"""A table that failed this many times in a row, without progress in between, shows an error."""
FAILURES_MAX = 7
"""A table that failed this many times in a row is not waited for."""

FOLLOWED = ""
"""The expectation that source = sink."""
EITHER = "either"
"""The expectation that source = sink or the table shows an error. Any other one is a pattern that the error must match."""

PEER = "TABLEWIRE_NATIVE_PEER"
"""This environment variable runs each scenario with CREATE SUBSCRIPTION too, which shows that its expectation is right."""

NONDETERMINISTIC = "CREATE COLLATION nondet (provider = icu, locale = 'und', deterministic = false)"

_SETTINGS = (
    "-c datestyle=ISO -c intervalstyle=postgres -c timezone=UTC -c bytea_output=hex -c extra_float_digits=3 "
    "-c search_path= -c row_security=off -c statement_timeout=20000"
)
_COLUMNS = """
SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attgenerated::text FROM pg_attribute a
 WHERE a.attrelid = %s::bigint::oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY 1"""

_epochs = itertools.count(1)
_Row = tuple[object, ...]


class SilentDifferenceError(AssertionError):
    """The worst that may happen: different content, and nothing says so."""


class Phase(StrEnum):
    """What an agent waits for."""

    ABSENT = "absent"
    PREPARING = "preparing"
    PROMOTING = "promoting"
    WRITING = "writing"
    REMOVING = "removing"


@dataclass(slots=True)
class Table:
    """What the agent and the owner know of a table. failures: since it last made progress."""

    span: Span
    checkpoint_ts: Ts
    phase: Phase = Phase.ABSENT
    error: str = ""
    failures: int = 0
    failed_ts: Ts = 0
    retry_at: float = 0.0
    is_listed: bool = True


@dataclass(frozen=True, slots=True)
class Content:
    """A table as text. types: by column; rows: sorted."""

    types: tuple[_Row, ...]
    rows: tuple[str, ...]


class Observer:
    """Reads the content of both databases, with settings of its own."""

    def __init__(self, source_uri: str, sink_uri: str) -> None:
        self._stack = ExitStack()
        self.source, self.sink = (
            self._stack.enter_context(psycopg.connect(uri, autocommit=True, options=_SETTINGS)) for uri in (source_uri, sink_uri)
        )

    def close(self) -> None:
        self._stack.close()

    def use_source(self, uri: str) -> None:
        """Read the source with this URI from now on."""
        self.source = self._stack.enter_context(psycopg.connect(uri, autocommit=True, options=_SETTINGS))

    def has_at_source(self, name: str) -> bool:
        """Return whether there is such a table at the source."""
        row = self.source.execute("SELECT to_regclass(%s) IS NOT NULL", (qualified(name),)).fetchone()
        return row is not None and bool(row[0])

    def difference(self, name: str, compares_types: bool = True) -> str:
        """Return "" if the sink has the same rows, and, if types are compared, exactly the same columns."""
        source, sink = self._read(self.source, name), None
        if source is not None:
            sink = self._read(self.sink, name, None if compares_types else [str(column[0]) for column in source.types])
        if source == sink:
            return ""
        if source is None or sink is None:
            return f"{name}: at the source {_short(source)}, at the sink {_short(sink)}"
        if source.rows != sink.rows:
            missing, extra = set(source.rows) - set(sink.rows), set(sink.rows) - set(source.rows)
            return f"{name}: {len(source.rows)} rows, at the sink {len(sink.rows)}; missing {_few(missing)}, extra {_few(extra)}"
        return f"{name}: types {source.types}, at the sink {sink.types}" if compares_types else ""

    @staticmethod
    def _read(connection: psycopg.Connection[_Row], name: str, only: Sequence[str] | None = None) -> Content | None:
        """Return the content, with these columns only; None if there is no such table or it lacks one of them."""
        try:
            with connection.transaction():
                found = connection.execute(
                    "SELECT c.oid::bigint, c.relkind::text FROM pg_class c WHERE c.oid = to_regclass(%s)", (qualified(name),)
                ).fetchone()
                if found is None:
                    return None
                columns = connection.execute(_COLUMNS, (found[0],)).fetchall()
                if only is not None:
                    columns = [column for column in columns if column[0] in only]
                    if len(columns) != len(only):
                        return None
                texts = ", ".join(f"{sql.Identifier(str(column[0])).as_string(connection)}::text" for column in columns)
                inherited = "" if found[1] == "p" else "ONLY "
                rows = connection.execute(f"SELECT ARRAY[{texts}]::text[]::text FROM {inherited}{qualified(name)}".encode())
                return Content(tuple((column[0], column[1]) for column in columns), tuple(sorted(str(row[0]) for row in rows)))
        except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn):
            return None


def qualified(name: str) -> str:
    return name if "." in name else f"public.{name}"


def _short(value: object) -> str:
    return "there is no such table or column" if value is None else str(value)[:500]


def _few(rows: set[str]) -> str:
    return str(sorted(rows)[:5])


class DataPlane:
    """A changefeed of a Kit with one executor, kept running as by an owner and an agent. For one thread."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        self.tables: dict[TableID, Table] = {}
        self.owner_error = ""
        self.grace_s = 0.0
        """How long a difference may last without a word: changes of the publication by hand are detected at the next look."""
        self._differs_since: float | None = None
        self.listed_ts: Ts = 0
        self.observer = Observer(kit.source_uri, kit.sink_uri)
        self.executor: PostgresExecutor | None = None
        self._list_at = 0.0
        self._advance_at = 0.0
        self.advances = 0
        self._captures = 0

    def close(self) -> None:
        self.observer.close()

    def start(self) -> None:
        """Start the changefeed, and wait until each listed table writes or shows an error."""
        self.kit.start()
        self.resume()
        self.wait_until(
            lambda: self.tables and all(self._is_settled(table) for table in self.tables.values()), "the tables start"
        )

    def resume(self) -> None:
        """Start an executor, as after a pause or on another processor."""
        self._captures += 1
        self.executor = self.kit.executor(f"dp{self._captures}", changefeed_epoch=self._captures)
        for table in self.tables.values():
            table.phase, table.retry_at = Phase.ABSENT, 0.0

    def pause(self) -> None:
        """Close the executor."""
        assert self.executor is not None
        self.executor.close()
        self.executor = None

    def advance_to_end(self) -> None:
        """Wait until every table and the slot are at or past the end of the source's WAL as it is now."""
        target = self._position()

        def has_advanced() -> bool:
            row = self.observer.source.execute(
                "SELECT min(confirmed_flush_lsn - '0/0'::pg_lsn) FROM pg_replication_slots WHERE slot_name = %s",
                (slot_name(self.kit.changefeed),),
            ).fetchone()
            return row is not None and row[0] is not None and int(str(row[0])) >= target

        self.wait_until(has_advanced, "the slot is at the end")
        seen = self.advances
        self.wait_until(lambda: self.advances >= seen + 3, "the owner has recorded it")

    def close_source(self) -> None:
        """Close everything that is connected to the source."""
        if self.kit.source is not None:
            self.kit.source.close()
        self.kit.source = None
        self.kit.source_connection.close()
        self.observer.source.close()

    def move_source(self, uri: str) -> None:
        """Find the source behind this URI from now on, as after a failover; the owner starts it again."""
        self.kit.source_uri = uri
        self.kit.source_connection = psycopg.connect(uri, autocommit=True)
        self.observer.use_source(uri)
        self.kit.source = None

    def table(self, name: str) -> Table | None:
        """Return what is known of the table that has this name at the source now."""
        row = self.observer.source.execute("SELECT to_regclass(%s)::oid::bigint", (qualified(name),)).fetchone()
        assert row is not None
        return self.tables.get(int(str(row[0]))) if row[0] is not None else None

    def wait_until(self, condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
        """Keep the changefeed running until the condition holds."""
        deadline = time.monotonic() + deadline_s
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {deadline_s:g} s: {what}; owner: {self.owner_error or 'fine'}; {self._story()}")
            self.pump()
            time.sleep(POLL_S)

    def settle(self, *names: str, compares_types: bool = True, deadline_s: float = DEADLINE_S) -> None:
        """Wait until each table is equal; fail at once if a table that shows no error differs."""
        target = self._position()
        for name in names:

            def is_equal(name: str = name) -> bool:
                if (table := self.table(name)) is not None and table.failures >= FAILURES_MAX:
                    raise AssertionError(f"{name} fails again and again: {table.error}; owner: {self.owner_error or 'fine'}")
                return self._is_equal(name, target, compares_types)

            self.wait_until(is_equal, f"{name} is equal", deadline_s)

    def settle_or_error(self, *names: str, compares_types: bool = True) -> list[str]:
        """Wait until each table is equal or shows an error; return the errors. A difference without a word fails."""
        target = self._position()

        def decided(name: str) -> bool:
            return self._is_equal(name, target, compares_types) or bool(self._error_of(name))

        for name in names:
            self.wait_until(lambda name=name: decided(name), f"{name} is equal or shows an error")  # type: ignore[misc]
        return [error for name in names if (error := self._error_of(name))]

    def wait_error(self, name: str, pattern: str) -> str:
        """Wait until the table, or its changefeed, shows an error that matches."""
        self.wait_until(lambda: re.search(pattern, self._error_of(name)), f"{name} shows an error like {pattern!r}")
        return self._error_of(name)

    def _is_equal(self, name: str, target: Ts, compares_types: bool) -> bool:
        """Return whether the table is at or past the target, without an error, and equal."""
        table = self.table(name)
        if table is None:
            return False
        if not self._is_past(table, target):
            return False
        if not (difference := self.observer.difference(name, compares_types)):
            self._differs_since = None
            return True
        self.pump()
        if (
            self._is_past(table, target)
            and not self._shows_copy(table)
            and self.table(name) is table
            and self.observer.difference(name, compares_types)
            and self._is_past(table, target)
        ):
            self._differs_since = self._differs_since or time.monotonic()
            if time.monotonic() - self._differs_since < self.grace_s:
                return False
            raise SilentDifferenceError(f"no error is shown, and the checkpoint is past the last commit, but {difference}")
        return False

    def _is_past(self, table: Table, target: Ts) -> bool:
        return table.phase is Phase.WRITING and not table.error and not self.owner_error and table.checkpoint_ts >= target

    def _shows_copy(self, table: Table) -> bool:
        """Return whether the status of the table shows that its copy is pending or running."""
        if self.executor is None:
            return False
        try:
            stats = self.executor.get_table_span_status(table.span, True).stats
        except OperatingError:
            return False
        return stats is not None and "snapshot" in stats.stage_checkpoints

    def _error_of(self, name: str) -> str:
        table = self.table(name)
        if table is not None and table.failures >= FAILURES_OF_AN_ERROR:
            return table.error
        if (table is None or not table.is_listed) and self.kit.source is not None:
            for reason in self.kit.source.left_out():
                if qualified(name) in reason:
                    return reason
        return self.owner_error

    def _is_settled(self, table: Table) -> bool:
        return table.failures >= FAILURES_OF_AN_ERROR or (table.phase is Phase.WRITING and not table.error)

    def _position(self) -> Ts:
        row = self.observer.source.execute("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn").fetchone()
        assert row is not None
        return int(str(row[0]))

    def _story(self) -> str:
        return "; ".join(
            f"table {table.span.table_id}: {table.phase}, at {table.checkpoint_ts:X}, {table.failures} failures {table.error}"
            for table in self.tables.values()
        )

    # --- what owners and agents do -----------------------------------------------------------------------------------

    def pump(self) -> None:
        """Do what an owner and an agent would do now."""
        now = time.monotonic()
        if now >= self._list_at:
            self._list_at = now + LIST_INTERVAL_S
            self._as_owner(self._list)
        if now >= self._advance_at:
            self._advance_at = now + ADVANCE_INTERVAL_S
            self._as_owner(self._advance)
        for table_id, table in list(self.tables.items()):
            if self.executor is not None:
                self._drive(self.executor, table)
            if not table.is_listed and table.phase is Phase.ABSENT:
                del self.tables[table_id]

    def _as_owner(self, call: Callable[[PostgresSource], None]) -> None:
        """Call the source; after an error start again with a new one."""
        kit = self.kit
        try:
            if kit.source is None:
                kit.source = self.new_source()
                start_ts = kit.source.start()
                needed_ts = max(kit.start_ts, min((table.checkpoint_ts for table in self.tables.values()), default=0))
                if start_ts > needed_ts:
                    raise OperatingError(f"the source can only be read from {start_ts:X} on, needed is {needed_ts:X}")
            call(kit.source)
            self.owner_error = ""
        except OperatingError as error:
            self.owner_error = str(error)
            if kit.source is not None:
                kit.source.close()
            kit.source = None

    def new_source(self) -> PostgresSource:
        """Return the source as an owner makes it."""
        kit = self.kit
        source = new_source(
            SourceRequest(
                kit.changefeed, kit.source_uri, kit.sink_uri, kit.tables, kit.start_ts, kit.initial_snapshot, options=kit.options
            )
        )
        assert isinstance(source, PostgresSource)
        return source

    def _list(self, source: PostgresSource) -> None:
        listed_ts = source.current_ts()
        names = source.tables()
        for table_id in names.keys() - self.tables.keys():
            known = [table.checkpoint_ts for table in self.tables.values()]
            start_ts = min(known, default=max(self.kit.start_ts, self.listed_ts))
            self.tables[table_id] = Table(Span(table_id), start_ts)
        for table_id, table in self.tables.items():
            table.is_listed = table_id in names
        self.listed_ts = listed_ts

    def _advance(self, source: PostgresSource) -> None:
        if self.listed_ts and self.executor is not None:
            source.advance(min([self.listed_ts, *(table.checkpoint_ts for table in self.tables.values())]))
            self.advances += 1

    def _drive(self, executor: PostgresExecutor, table: Table) -> None:
        """Take one step of an agent with this table."""
        try:
            self._step(executor, table)
        except InvariantError:
            raise
        except OperatingError as error:
            table.error = str(error)
            table.failures += 1
            table.failed_ts = table.checkpoint_ts
            table.retry_at = time.monotonic() + min(RETRY_MIN_S * 2**table.failures, RETRY_MAX_S)
            table.phase = Phase.REMOVING

    def _step(self, executor: PostgresExecutor, table: Table) -> None:
        span, checkpoint = table.span, Checkpoint(table.checkpoint_ts, table.checkpoint_ts)
        if not table.is_listed and table.phase not in (Phase.ABSENT, Phase.REMOVING):
            table.phase = Phase.REMOVING
        if table.phase is Phase.ABSENT:
            if (
                table.is_listed
                and time.monotonic() >= table.retry_at
                and executor.add_table_span(span, checkpoint, is_prepare=True)
            ):
                table.phase = Phase.PREPARING
        elif table.phase is Phase.REMOVING:
            if executor.remove_table_span(span):
                checkpoint_ts, is_removed = executor.is_remove_table_span_finished(span)
                table.checkpoint_ts = max(table.checkpoint_ts, checkpoint_ts)
                table.phase = Phase.ABSENT if is_removed else Phase.REMOVING
        else:
            self._serve(executor, table, checkpoint)

    def _serve(self, executor: PostgresExecutor, table: Table, checkpoint: Checkpoint) -> None:
        span = table.span
        status = executor.get_table_span_status(span, False)
        if table.phase is Phase.PREPARING and executor.is_add_table_span_finished(span, True):
            executor.set_assignment_epoch(span, next(_epochs))
            if executor.add_table_span(span, checkpoint, is_prepare=False):
                table.phase = Phase.PROMOTING
        elif table.phase is Phase.PROMOTING and executor.is_add_table_span_finished(span, False):
            table.phase = Phase.WRITING
        elif table.phase is Phase.WRITING and status.state is TableState.REPLICATING:
            table.checkpoint_ts = max(table.checkpoint_ts, status.checkpoint.checkpoint_ts)
            if table.error and table.checkpoint_ts > table.failed_ts:
                table.error, table.failures = "", 0


@contextmanager
def data_plane(
    source_uri: str,
    sink_uri: str,
    tables: Sequence[str] = ("public.*",),
    initial_snapshot: bool = True,
    options: Mapping[str, str] | None = None,
) -> Iterator[DataPlane]:
    """Serve a changefeed that is not started yet."""
    with Kit(source_uri, sink_uri, tables, initial_snapshot, options) as kit:
        plane = DataPlane(kit)
        try:
            yield plane
        finally:
            plane.close()


@dataclass(frozen=True, slots=True)
class Scenario:
    """One row of a table of scenarios.

    tables: DDL at the source. rows: at the source, before the changefeed starts. sink: DDL at the sink before that; None: the
    sink is empty. changes: statements at the source, one after the other; "sink: ..." runs at the sink, "settle" waits until
    the tables are equal, "pause" and "resume" stop and start the processor. compared: names of tables. expected: see FOLLOWED.
    remedy: what the error asks for, as changes; the tables must then be equal. at_sink: queries at the end and their rows.
    """

    name: str
    tables: str
    rows: str = ""
    sink: str | None = None
    changes: tuple[str, ...] = ()
    compared: tuple[str, ...] = ("t",)
    expected: str = FOLLOWED
    remedy: tuple[str, ...] = ()
    at_sink: tuple[tuple[str, list[_Row]], ...] = ()
    filter: tuple[str, ...] = ("public.*",)
    options: Mapping[str, str] = field(default_factory=dict)
    initial_snapshot: bool = True
    compares_types: bool | None = None
    version_min: int = 0
    native: str | None = FOLLOWED
    """What native replication does: FOLLOWED, or a reason why the peer is not asked."""

    @property
    def has_types_of_source(self) -> bool:
        return self.sink is None if self.compares_types is None else self.compares_types


def named(scenario: Scenario) -> str:
    """Return the id of the test of a scenario."""
    return scenario.name


def run_scenario(scenario: Scenario, source_uri: str, sink_uri: str) -> None:
    """Replay a scenario and compare the outcome with its expectation."""
    with data_plane(source_uri, sink_uri, scenario.filter, scenario.initial_snapshot, scenario.options) as plane:
        kit = plane.kit
        scenario = without_icu(scenario, plane.observer)
        for statement in (scenario.tables, scenario.rows):
            if statement:
                kit.run(statement)
        if scenario.sink:
            kit.at_sink(scenario.sink)
        plane.start()
        if scenario.expected == EITHER:
            there = [name for name in scenario.compared if plane.observer.has_at_source(name)]
            if not plane.settle_or_error(*there, compares_types=scenario.has_types_of_source):
                _replay(plane, scenario, scenario.changes)
                plane.settle_or_error(*scenario.compared, compares_types=scenario.has_types_of_source)
            return
        _replay(plane, scenario, ("settle", *scenario.changes) if scenario.expected == FOLLOWED else scenario.changes)
        if scenario.expected != FOLLOWED:
            plane.wait_error(scenario.compared[0], scenario.expected)
            if not scenario.remedy:
                return
            _replay(plane, scenario, scenario.remedy)
        plane.settle(*scenario.compared, compares_types=scenario.has_types_of_source)
        for query, rows in scenario.at_sink:
            assert kit.at_sink(query) == rows, query


def _replay(plane: DataPlane, scenario: Scenario, steps: Sequence[str]) -> None:
    for step in steps:
        if step == "settle":
            there = [name for name in scenario.compared if plane.observer.has_at_source(name)]
            plane.settle(*there, compares_types=scenario.has_types_of_source)
        elif step == "pause":
            plane.pause()
        elif step == "resume":
            plane.resume()
        elif step.startswith("sink: "):
            plane.kit.at_sink(step.removeprefix("sink: "))
        else:
            plane.kit.run(step)


def without_icu(scenario: Scenario, observer: Observer) -> Scenario:
    """Return the scenario with a plain collation if the server was built without ICU."""
    row = observer.source.execute("SELECT count(*) FROM pg_collation WHERE collprovider = 'i'").fetchone()
    if NONDETERMINISTIC not in scenario.tables or (row is not None and int(str(row[0])) > 1):
        return scenario
    plain = 'CREATE COLLATION nondet FROM "C"'
    sink = None if scenario.sink is None else scenario.sink.replace(NONDETERMINISTIC, plain)
    return replace(scenario, tables=scenario.tables.replace(NONDETERMINISTIC, plain), sink=sink)


def asks_peer() -> bool:
    """Return whether scenarios are run with native replication too."""
    return bool(os.environ.get(PEER))
