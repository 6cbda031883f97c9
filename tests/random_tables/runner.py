"""Runs a case against real databases and judges it.

A statement that fails at the source is left out and its transaction repeated without it: the generator
does not know everything, and a case whose steps are left out must still run.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import psycopg

from processor.postgres import executor as executor_module
from processor.postgres.executor import PostgresExecutor
from processor.postgres.sinks import bulk
from tablewire.errors import ChangesLostError, InvariantError, TablewireError
from tablewire.postgres import new_source
from tablewire.postgres.source import PostgresSource
from tablewire.source import SourceRequest
from tests.processor.postgres.replication_kit import Kit, current, wait_until
from tests.random_tables.case import Act, Case, Result, Step, Violation
from tests.random_tables.oracle import SETTINGS, Connection, SourceState, read_source, require_equal, sink_name
from tests.random_tables.owner import Phase, SmallOwner
from tests.random_tables.ways_out import follow

HOLD_DEADLINE_S = 0.3
WAYS_OUT_MAX = 3
"""A way out may lead to the next error, whose way out is followed, too."""
NAMES_DEADLINE_S = 3.0
CHECK_DEADLINE_S = 4.0
SETTLE_DEADLINE_S = 20.0
ERRORS_TO_BELIEVE = 3
"""A table that failed this often in a row, or this often while it is waited for, shows its error."""
CAPTURES = ("a", "b")


@dataclass(frozen=True, slots=True)
class Databases:
    """Two empty databases, by URI."""

    source: str
    sink: str


def run_case(case: Case, databases: Databases) -> Result:
    """Run the case; the result holds a violation, if there is one."""
    started = time.monotonic()
    result = Result(case.seed)
    crashes: list[int] = []
    former = executor_module.end_process, bulk.BULK_MIN
    executor_module.end_process, bulk.BULK_MIN = crashes.append, case.bulk_min  # type: ignore[assignment]
    try:
        with Kit(
            databases.source, databases.sink, ("public.*", "other.*", "moved.*"), case.initial_snapshot, case.options
        ) as kit:
            runner = Runner(kit, case, result)
            try:
                runner.run()
            except ChangesLostError as error:
                result.tables, result.errors = {"the changefeed": "error"}, [str(error)]
            except Violation as violation:
                result.kind, result.violation = violation.kind, str(violation)
            except (InvariantError, AssertionError, psycopg.Error) as error:
                result.kind, result.violation = "bug", repr(error)
            finally:
                runner.close()
    except TablewireError as error:
        result.kind, result.violation = "bug", repr(error)
    finally:
        executor_module.end_process, bulk.BULK_MIN = former
    if crashes and not result.kind:
        result.kind, result.violation = "bug", "a thread of an executor ended by a bug"
    result.seconds = time.monotonic() - started
    return result


class Runner:
    def __init__(self, kit: Kit, case: Case, result: Result) -> None:
        self.kit = kit
        self.case = case
        self.result = result
        self.rng = random.Random(case.seed)
        assert kit.sink_connection is not None
        self.source: Connection = kit.source_connection
        self.sink: Connection = kit.sink_connection
        self.second = psycopg.connect(kit.source_uri, autocommit=True)
        self.owner: SmallOwner | None = None
        self.held: SourceState | None = None
        self.changed_while_held: set[tuple[str, str]] = set()
        self.tainted: set[tuple[str, str]] = set()
        """Tables changed at the sink that no change of the source has touched since: nothing can notice that."""
        self.followed: set[int] | None = None
        """Without first copies: the tables that existed at the start. What others contain before they are listed is not
        replicated."""
        self.paused: list[str] = []
        self.ended: list[threading.Thread] = []
        self.abandoned: list[PostgresExecutor] = []
        self._started = time.monotonic()
        self._is_open = False
        self._refused: list[str] = []
        for connection in (self.source, self.sink, self.second):
            connection.execute(SETTINGS.encode())
        self.second.execute("SET lock_timeout = '100ms'")

    def close(self) -> None:
        self.second.close()
        for thread in self.ended:
            thread.join(10)

    def _resume(self, owner: SmallOwner) -> None:
        """Start the executors that a pause has ended."""
        for capture in self.paused:
            owner.start(capture)
        self.paused.clear()

    def run(self) -> None:
        for step in self.case.steps:
            self._trace(f"{time.monotonic() - self._started:.2f} {step}")
            self._refused = []
            self._run(step)
            self._keep(step)
            if self.owner is not None:
                self.owner.tick()
        if self.owner is not None:
            self._resume(self.owner)
            self._finish_open()
            self._lift()
            self._trace(f"{time.monotonic() - self._started:.2f} settle")
            self._settle()

    def _keep(self, step: Step) -> None:
        texts = list(step.statements)
        for text in self._refused:
            if text in texts:
                texts.remove(text)
        if texts or not step.statements:
            self.result.kept = (*self.result.kept, replace(step, statements=tuple(texts)))

    def _refuse(self, text: str, error: psycopg.Error) -> None:
        self._refused.append(text)
        self.result.refused += 1
        self._trace(f"  refused: {text}: {str(error).splitlines()[0]}")

    def _trace(self, text: str) -> None:
        self.result.trace.append(text)

    # --- steps -------------------------------------------------------------------------------------------------------

    def _run(self, step: Step) -> None:
        if step.act in (Act.BOTH, Act.SOURCE):
            if step.act is Act.BOTH:
                self._statements(self.sink, step)
            self._statements(self.source, step)
        elif step.act is Act.SINK:
            self._statements(self.sink, step)
        elif step.act is Act.SINK_THEN_SOURCE:
            self._sink_then_source(step)
        elif step.act is Act.OPEN:
            self._open(step)
        elif step.act is Act.FINISH:
            self._finish_open()
        elif step.act is Act.START:
            self._start()
        elif self.owner is not None:
            self._resume(self.owner)
            self._act(self.owner, step)

    def _statements(self, connection: Connection, step: Step) -> None:
        if step.alone:
            for text in step.statements:
                self._one(connection, text)
            return
        texts = list(step.statements)
        for _ in range(len(step.statements)):
            if (failed := self._transaction(connection, texts)) is None:
                self.result.ran += len(texts)
                return
            del texts[failed]

    def _transaction(self, connection: Connection, texts: list[str]) -> int | None:
        """Run the statements in one transaction; return the index of the one that failed."""
        at = 0
        try:
            if len(texts) > 1:
                connection.execute("BEGIN")
            while at < len(texts):
                connection.execute(texts[at].encode())
                at += 1
            if len(texts) > 1:
                connection.execute("COMMIT")
        except psycopg.Error as error:
            at = min(at, len(texts) - 1)
            self._refuse(texts[at], error)
            if len(texts) > 1:
                connection.execute("ROLLBACK")
            return at
        return None

    def _one(self, connection: Connection, text: str) -> int:
        """Run a statement; return how many rows it changed, -1 if it failed."""
        try:
            rows = connection.execute(text.encode()).rowcount
            self.result.ran += 1
            return rows
        except psycopg.Error as error:
            self._refuse(text, error)
            return -1

    def _sink_then_source(self, step: Step) -> None:
        schema, _, name = step.name.partition(".")
        if self.held is not None:
            self.changed_while_held.add((schema, name))
        *changes, touch = step.statements
        for text in changes:
            self._one(self.sink, text)
        if self._one(self.source, touch) < 1:
            self.tainted.add((schema, name))

    def _open(self, step: Step) -> None:
        if self._is_open:
            return
        self._is_open = True
        self.second.execute("BEGIN")
        for text in step.statements:
            if "SAVEPOINT" in text or "RELEASE" in text or "ROLLBACK" in text:
                continue
            try:
                with self.second.transaction():
                    self.second.execute(text.encode())
            except psycopg.Error as error:
                self._refuse(text, error)

    def _finish_open(self) -> None:
        if self._is_open:
            self._is_open = False
            try:
                self.second.execute("COMMIT")
            except psycopg.Error:
                self.second.execute("ROLLBACK")

    def _start(self) -> None:
        self.kit.start()
        self.owner = SmallOwner(self.kit, self.rng)
        if not self.case.initial_snapshot:
            self.followed = set(read_source(self.source, self.kit.start_ts).names)
        for capture in CAPTURES[: self.rng.choice([1, 2])]:
            self.owner.start(capture)

    def _act(self, owner: SmallOwner, step: Step) -> None:
        if step.act is Act.CHECK:
            self._check()
        elif step.act is Act.HOLD:
            self._hold(owner)
        elif step.act is Act.LIFT:
            self._lift()
        elif step.act is Act.MOVE:
            if len(owner.captures) < len(CAPTURES):
                owner.start(next(capture for capture in CAPTURES if capture not in owner.captures))
            owner.move(step.number % 4 + 1)
        elif step.act is Act.LOSE_SLOT:
            self._lose_slot(owner, step)
        elif step.act is Act.CUT:
            self._terminate([self.source, self.sink][step.number % 2], "tablewire%")
        elif step.act is Act.DRIVE:
            self._drive(step.number / 1000)
        elif step.act is Act.PAUSE:
            self.paused = sorted(owner.captures)
            for capture in self.paused:
                owner.forget(capture).close()
        else:
            capture = sorted(owner.captures)[step.number % len(owner.captures)] if owner.captures else ""
            if capture:
                self._end(owner, step.act, capture)

    def _lose_slot(self, owner: SmallOwner, step: Step) -> None:
        """Drop the slot behind a changefeed that does not run; it must not continue if changes are lost by that."""
        captures = sorted(owner.captures)
        for capture in captures:
            owner.forget(capture).close()
        owner.source.close()
        self.source.execute("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active")
        self._statements(self.source, replace(step, alone=True))
        request = SourceRequest(self.kit.changefeed, self.kit.source_uri, self.kit.sink_uri, self.kit.tables)
        request = replace(request, start_ts=self.kit.start_ts, checkpoint_ts=owner.checkpoint_ts, options=self.kit.options)
        source = new_source(request)
        assert isinstance(source, PostgresSource)
        self.kit.source = owner.source = source
        source.start()
        for capture in captures:
            owner.start(capture)

    def _end(self, owner: SmallOwner, act: Act, capture: str) -> None:
        """End an executor and start another one of its name."""
        executor = owner.forget(capture)
        if act is Act.CRASH:
            executor.fence()
            self._terminate(self.sink, f"tablewire capture-{capture}%")
            self.ended.append(threading.Thread(target=executor.close))
            self.ended[-1].start()
        elif act is Act.ABANDON:
            self.abandoned.append(executor)
        else:
            executor.close()
        owner.start(capture)

    def _terminate(self, connection: Connection, name: str) -> None:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE %s"
            " AND datname = current_database() AND pid <> pg_backend_pid() AND application_name NOT LIKE '%%owner%%'",
            (name,),
        )

    # --- the oracle --------------------------------------------------------------------------------------------------

    def _poll(self, condition: Callable[[], bool], deadline_s: float) -> bool:
        """Let the owner work until the condition holds; return whether it did before the deadline."""
        owner = self.owner
        assert owner is not None

        def holds() -> bool:
            owner.tick()
            return condition()

        try:
            wait_until(holds, "the condition of a poll", deadline_s)
        except AssertionError:
            return False
        return True

    def _drive(self, seconds: float) -> None:
        self._poll(lambda: False, seconds)

    def _state(self) -> SourceState:
        return read_source(self.source, current(self.kit), self.followed)

    def _hold(self, owner: SmallOwner) -> None:
        """Nothing after this position may be written, whatever the source does."""
        if self._is_open or self.held is not None:
            return
        self.held = self._state()
        owner.hold(self.held.position)

    def _lift(self) -> None:
        """Compare what was held exactly at the position, then let everything continue."""
        owner = self.owner
        if self.held is None or owner is None:
            return
        held, self.held = self.held, None
        excused = self.tainted | self.changed_while_held
        self.changed_while_held = set()
        waiting = set(held.names)

        def compared() -> bool:
            for table_id in list(waiting):
                placement = owner.placements.get(table_id)
                if placement is None or placement.error or placement.is_pending:
                    continue
                if placement.phase is Phase.WRITING and placement.checkpoint_ts == held.position:
                    waiting.remove(table_id)
                    if held.names[table_id] not in excused:
                        self._require_held(held, table_id)
            return not waiting

        self._poll(compared, HOLD_DEADLINE_S)
        owner.hold(None)

    def _require_held(self, held: SourceState, table_id: int) -> None:
        """Check a table whose checkpoint stands at the barrier. Its name at the sink may be that of another table by now."""
        assert self.owner is not None
        if self.owner.name(table_id) == ".".join(held.names[table_id]):
            require_equal(self.sink, held, table_id, "at a barrier")

    def _check(self) -> None:
        """Compare each table as soon as its checkpoint has passed a position after which the source has not changed."""
        self._finish_open()
        self._lift()
        self._compare(CHECK_DEADLINE_S)

    def _compare(self, deadline_s: float) -> tuple[SourceState, set[int]]:
        """Return the state and the tables that are equal; a difference without an error is a Violation."""
        owner = self.owner
        assert owner is not None
        state = self._state()
        waiting, equal = set(state.names), set[int]()
        failures = Counter({table_id: placement.failures for table_id, placement in owner.placements.items()})

        def compared() -> bool:
            for table_id in list(waiting):
                placement = owner.placements.get(table_id)
                if placement is None:
                    if owner.listed_ts >= state.position and owner.left_out(state.names[table_id]):
                        waiting.remove(table_id)
                elif placement.phase is Phase.WRITING and placement.checkpoint_ts >= state.position and not placement.is_pending:
                    waiting.remove(table_id)
                    if state.names[table_id] not in self.tainted:
                        require_equal(self.sink, state, table_id, "at its checkpoint")
                    equal.add(table_id)
                elif placement.failures >= failures[table_id] + ERRORS_TO_BELIEVE:
                    waiting.remove(table_id)
            return not waiting

        self._poll(compared, deadline_s)
        return state, equal

    def _settle(self) -> None:
        state, equal = self._compare(SETTLE_DEADLINE_S)
        followed: set[int] = set()
        for _ in range(WAYS_OUT_MAX):
            failed = {table_id for table_id in state.names if table_id not in equal}
            tried = {table_id for table_id in failed if self._follow(state, table_id)}
            if not tried:
                break
            followed |= tried
            state, equal = self._compare(SETTLE_DEADLINE_S)
        self._require_names(state, equal)
        for table_id, name in state.names.items():
            if table_id in equal:
                end = "equal after its way out" if table_id in followed else "equal"
            else:
                end = self._end_of(state, table_id, table_id in followed)
            self.result.tables[".".join(name)] = end

    def _require_names(self, state: SourceState, equal: set[int]) -> None:
        """Check that tables are named at the sink as at the source, which may take a little longer than their content."""
        wrong: dict[int, tuple[str, str]] = {}

        def are_right() -> bool:
            wrong.clear()
            for table_id in list(equal):
                if self._error(state, table_id):
                    equal.discard(table_id)  # that is why it is not renamed
                elif (found := sink_name(self.sink, table_id, state.names[table_id])) != state.names[table_id]:
                    wrong[table_id] = found
            return not wrong

        if not self._poll(are_right, NAMES_DEADLINE_S):
            table_id, found = next(iter(wrong.items()))
            raise Violation("name", f"table {'.'.join(state.names[table_id])} is still {'.'.join(found)} at the sink")

    def _end_of(self, state: SourceState, table_id: int, is_followed: bool) -> str:
        """Return the end of a table that is not equal; raise Violation if it shows no reason."""
        assert self.owner is not None
        text = ".".join(state.names[table_id])
        if error := self._error(state, table_id):
            if is_followed:
                raise Violation("no way out", f"table {text} still fails after its way out was followed: {error}")
            self.result.errors.append(error)
            return "error"
        placement = self.owner.placements.get(table_id)
        if placement is not None and placement.is_pending:
            return "pending"
        where = "it is not listed"
        if placement is not None:
            where = f"phase {placement.phase.name}, checkpoint {placement.checkpoint_ts}, former errors {placement.errors[-2:]}"
        text = f"table {text} shows no error and does not reach {state.position}: {where}"
        raise Violation("stuck", f"{text}; source errors {self.owner.source_errors[-2:]}")

    def _error(self, state: SourceState, table_id: int) -> str:
        """Return the error that the table shows, or why it is left out; empty if it shows none."""
        assert self.owner is not None
        placement = self.owner.placements.get(table_id)
        return self.owner.left_out(state.names[table_id]) if placement is None else placement.error

    def _follow(self, state: SourceState, table_id: int) -> bool:
        """Follow the way out that the error of the table names."""
        if not (error := self._error(state, table_id)):
            return False
        self._trace(f"way out of: {error}")
        try:
            return follow(self.source, self.sink, state.names[table_id], error)
        except psycopg.Error as refusal:
            self._trace(f"  refused: {refusal}")
            return False
