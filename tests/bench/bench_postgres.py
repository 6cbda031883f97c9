"""PostgreSQL to PostgreSQL, one executor in this process: rows a second, changes a second, and commit to applied at a fixed rate.

    python -m tests.bench.bench_postgres [--rows N] [--seconds S] [--only PART]

Prints one JSON object on one line. Throughput is the rate at which a backlog is worked off (the load is written first), so that
neither the generator nor its commits count; source and sink share the machine with the executor. The same backlog is worked off
by the servers' own logical replication too (native.py), into another database of the same sink: `ratio` is our rate divided by
the native one. Latency is taken for every source transaction from its commit time to the return of the COMMIT at the sink, with
one clock.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg

from deploy.local.postgres import PostgresServer, postgres_bin_folder
from processor.postgres import PostgresExecutor, new_executor
from processor.postgres.tables.queues import ChangeBatch, TableQueue
from tablewire.executor import ExecutorRequest
from tablewire.model.ids import ChangefeedID, Ts
from tablewire.model.progress import Checkpoint
from tablewire.model.spans import Span
from tablewire.postgres import new_source
from tablewire.source import SourceRequest
from tests.bench.native import NativeLine, describe_native

TABLES = 8
ROWS_PER_TRANSACTION = 100
WAIT_S = 600.0
NATIVE_FIRST = frozenset({"mixed"})
"""The loads that native replication works off first, so that no side always has the source's WAL freshly read."""
_COLUMNS = "id bigint PRIMARY KEY, account int NOT NULL, amount numeric(12, 2), note text, at timestamptz NOT NULL"
_VALUES = "i, (i % 1000)::int, (i % 10000) / 100.0, 'note ' || i || repeat('x', 40), now()"


@dataclass
class Pair:
    """A source and a sink server."""

    source: PostgresServer
    sink: PostgresServer


@contextmanager
def servers(settings: Mapping[str, str] | None = None) -> Iterator[Pair]:
    """Two fresh servers, as an operator would have them: fsync and synchronous_commit on, unless settings say otherwise."""
    with tempfile.TemporaryDirectory(prefix="tablewire-bench-") as folder:
        chosen = {"shared_buffers": "512MB", "max_wal_size": "8GB", "checkpoint_timeout": "30min", **(settings or {})}
        with (
            PostgresServer(Path(folder), name="source", settings=chosen) as source,
            PostgresServer(Path(folder), name="sink", settings=chosen) as sink,
        ):
            yield Pair(source, sink)


def describe_servers(pair: Pair) -> dict[str, object]:
    """What the figures depend on."""
    names = ("server_version", "fsync", "synchronous_commit", "shared_buffers", "full_page_writes", "wal_compression")
    return {name: pair.sink.execute(f"SHOW {name}")[0][0] for name in names}


class Line:
    """One changefeed between the two servers, driven as an agent drives it."""

    def __init__(self, pair: Pair, name: str, options: Mapping[str, str] | None = None) -> None:
        self.pair = pair
        self.changefeed = ChangefeedID("bench", name)
        self.options = dict(options or {})
        self.source_uri = pair.source.create_database(name)
        self.sink_uri = pair.sink.create_database(name)
        self.connection = psycopg.connect(self.source_uri, autocommit=True)
        for number in range(TABLES):
            self.connection.execute(f"CREATE TABLE t{number} ({_COLUMNS})".encode())
        request = SourceRequest(self.changefeed, self.source_uri, self.sink_uri, ["public.*"], options=self.options)
        self.source = new_source(request)
        self.start_ts = self.source.start()
        self.executor: PostgresExecutor | None = None
        self.spans = [Span(table_id) for table_id in self.source.tables()]
        self.native = NativeLine(
            pair, name, self.source_uri, [f"CREATE TABLE t{number} ({_COLUMNS})" for number in range(TABLES)]
        )

    def start(self) -> None:
        """All tables write; their first copies are left out."""
        executor = new_executor(
            ExecutorRequest(
                "bench", self.changefeed, 1, self.source_uri, self.sink_uri, ["public.*"], self.start_ts, False, self.options
            )
        )
        assert isinstance(executor, PostgresExecutor)
        self.executor = executor
        checkpoint = Checkpoint(self.start_ts, self.start_ts)
        for span in self.spans:
            executor.add_table_span(span, checkpoint, True)
        for span in self.spans:
            self._wait(lambda span=span: executor.is_add_table_span_finished(span, True))  # type: ignore[misc]
            executor.set_assignment_epoch(span, 1)
            executor.add_table_span(span, checkpoint, False)
        for span in self.spans:
            self._wait(lambda span=span: executor.is_add_table_span_finished(span, False))  # type: ignore[misc]

    def wait_for(self, target: Ts) -> None:
        """Every table's checkpoint is at or behind target."""
        executor = self.executor
        assert executor is not None
        for span in self.spans:
            self._wait(
                lambda span=span: executor.get_table_span_status(span, False).checkpoint.checkpoint_ts >= target  # type: ignore[misc]
            )

    def advance(self, checkpoint_ts: Ts) -> None:
        """What an owner does all the time: the source need not decode again what is done, as native's slot does not either."""
        self.source.advance(checkpoint_ts)
        self.start_ts = checkpoint_ts

    def stop(self) -> None:
        if self.executor is not None:
            self.executor.close()
            self.executor = None

    def close(self) -> None:
        self.stop()
        self.native.close()
        self.source.drop()
        self.source.close()
        self.connection.close()

    def require_equal(self, sink_uri: str = "") -> None:
        """Source = sink (or the sink of this URI), by a digest over every row's text."""
        digest = "SELECT count(*), sum(hashtextextended(t::text, 0)::numeric) FROM {} t"
        with psycopg.connect(sink_uri or self.sink_uri) as sink:
            for number in range(TABLES):
                query = digest.format(f"t{number}").encode()
                if self.connection.execute(query).fetchone() != sink.execute(query).fetchone():
                    raise AssertionError(f"t{number} differs between source and sink")

    @staticmethod
    def _wait(condition) -> None:  # type: ignore[no-untyped-def]
        deadline = time.monotonic() + WAIT_S
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError("the line stands still")
            time.sleep(0.005)


def _write_backlog(line: Line, transaction: Sequence[str], transactions: int) -> None:
    """Runs the statements (with `lo` and `hi` as the transaction's range of ids) so often in each table, quickly."""
    body = " ".join(statement + ";" for statement in transaction)
    loops = " ".join(
        f"FOR n IN 0..{transactions - 1} LOOP lo := n * {ROWS_PER_TRANSACTION} + 1; hi := lo + {ROWS_PER_TRANSACTION} - 1;"
        f" {body.replace('{table}', f't{number}')} COMMIT; END LOOP;"
        for number in range(TABLES)
    )
    # Tables take turns in the WAL, as they do in a database that is in use.
    turns = 20
    line.connection.execute(b"SET synchronous_commit = off")
    for turn in range(turns):
        part = loops.replace(
            f"0..{transactions - 1}", f"{turn * transactions // turns}..{(turn + 1) * transactions // turns - 1}"
        )
        line.connection.execute(f"DO $$ DECLARE lo bigint; hi bigint; BEGIN {part} END $$".encode())
    line.connection.execute(b"SET synchronous_commit = on")
    line.native.mark()
    line.connection.execute(b"SELECT pg_logical_emit_message(true, 'bench', 'end')")


_INSERT = f"INSERT INTO {{table}} SELECT {_VALUES} FROM generate_series(lo, hi) i"
_MIXED = (
    _INSERT,
    "UPDATE {table} SET amount = amount + 1, note = note || '!' WHERE id BETWEEN lo AND hi",
    "DELETE FROM {table} WHERE id BETWEEN lo AND hi AND id % 2 = 0",
)


def measure_inserts(pair: Pair, rows: int) -> dict[str, object]:
    """Rows a second into 8 tables."""
    line = Line(pair, "inserts")
    try:
        transactions = rows // TABLES // ROWS_PER_TRANSACTION
        _write_backlog(line, [_INSERT], transactions)
        count = transactions * TABLES * ROWS_PER_TRANSACTION
        width = line.connection.execute(b"SELECT avg(pg_column_size(t.*))::int FROM t0 t").fetchone()
        figures = _compare(line, "inserts", "rows", count)
    finally:
        line.close()
    return {
        **figures,
        "row_bytes": width[0] if width else None,
        "rows_per_transaction": ROWS_PER_TRANSACTION,
        "tables": TABLES,
    }


def measure_mixed(pair: Pair, rows: int) -> dict[str, object]:
    """Changes a second: each transaction inserts 100 rows, updates them, and deletes every other one."""
    line = Line(pair, "mixed")
    try:
        transactions = max(20, rows // TABLES // (ROWS_PER_TRANSACTION * 5 // 2))
        _write_backlog(line, _MIXED, transactions)
        count = transactions * TABLES * ROWS_PER_TRANSACTION * 5 // 2
        figures = _compare(line, "mixed", "changes", count)
    finally:
        line.close()
    return {**figures, "changes_per_transaction": ROWS_PER_TRANSACTION * 5 // 2}


def measure_spread(pair: Pair, rows: int) -> dict[str, object]:
    """Changes a second where no batch can fold them: rows of a full table are updated, deleted and inserted, each once."""
    line = Line(pair, "spread")
    try:
        transactions = max(20, rows // TABLES // ROWS_PER_TRANSACTION)
        _write_backlog(line, [_INSERT], transactions)
        done_ts = line.source.current_ts()
        line.start()
        line.wait_for(done_ts)
        line.stop()
        line.advance(done_ts)
        line.native.work_off()
        statements = (
            "UPDATE {table} SET amount = amount + 1 WHERE id BETWEEN lo AND lo + 39",
            "DELETE FROM {table} WHERE id BETWEEN lo + 40 AND lo + 59",
            f"INSERT INTO {{table}} SELECT {_VALUES} FROM generate_series(lo + 10000000, lo + 10000039) i",
        )
        _write_backlog(line, statements, transactions)
        figures = _compare(line, "spread", "changes", transactions * TABLES * 100)
    finally:
        line.close()
    return {**figures, "of_100": "40 updates, 20 deletes, 40 inserts"}


def _compare(line: Line, name: str, unit: str, count: int) -> dict[str, object]:
    """The backlog, worked off by us and by native replication, one after the other; each verified, and its sink dropped before
    the other begins."""
    target = line.source.current_ts()

    def ours() -> None:
        line.start()
        line.wait_for(target)

    def measure_ours() -> dict[str, object]:
        effort = _measure(line.pair, ours)
        line.stop()
        line.require_equal()
        line.pair.sink.drop_database(name)
        return effort

    def measure_native() -> dict[str, object]:
        effort = _measure(line.pair, line.native.work_off)
        line.require_equal(line.native.sink_uri)
        line.native.close()
        del effort["executor_cpu_s"]  # there is none: it waits
        return effort

    if name in NATIVE_FIRST:
        native, own = measure_native(), measure_ours()
    else:
        own, native = measure_ours(), measure_native()
    seconds, native_seconds = float(str(own["seconds"])), float(str(native["seconds"]))
    return {
        unit: count,
        f"{unit}_per_s": round(count / seconds),
        **own,
        "native": {f"{unit}_per_s": round(count / native_seconds), **native, "is_first": name in NATIVE_FIRST},
        "ratio": round(native_seconds / seconds, 2),
    }


def _measure(pair: Pair, work: Callable[[], None]) -> dict[str, object]:
    """Seconds, and seconds of CPU of this process and of the two servers, that the work takes, its start included."""
    for server in (pair.source, pair.sink):
        server.execute("CHECKPOINT")
    started, cpu_started, servers_started = time.monotonic(), time.process_time(), _servers_cpu_s(pair)
    work()
    return {
        "seconds": round(time.monotonic() - started, 2),
        "executor_cpu_s": round(time.process_time() - cpu_started, 2),
        "servers_cpu_s": round(_servers_cpu_s(pair) - servers_started, 2),
    }


def _servers_cpu_s(pair: Pair) -> float:
    """CPU of all processes of both servers so far, as far as this system tells (Linux), else 0."""
    children: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(path.parent.name)
        children.setdefault(int(fields[1]), []).append(pid)
        ticks[pid] = sum(map(int, fields[11:15]))  # own and of children that have ended
    total = 0
    waiting = [pair.source.pid, pair.sink.pid]
    while waiting:
        pid = waiting.pop()
        total += ticks.get(pid, 0)
        waiting += children.get(pid, [])
    return total / os.sysconf("SC_CLK_TCK")


def measure_latency(pair: Pair, rate_per_s: int, seconds: float) -> dict[str, object]:
    """Milliseconds from commit to applied while pgbench commits single-row transactions at a fixed rate in 8 tables."""
    line = Line(pair, "latency")
    delays_us: list[int] = []
    confirm = TableQueue.confirm

    def recording(queue: TableQueue, batch: ChangeBatch, is_written: bool = True) -> None:
        now_us = time.time_ns() // 1000
        delays_us.extend(now_us - part.transaction.commit_us for part in batch.parts)
        confirm(queue, batch, is_written)

    try:
        line.start()
        TableQueue.confirm = recording  # type: ignore[method-assign]
        reached = _run_pgbench(line, rate_per_s, seconds)
        line.wait_for(line.source.current_ts())
        TableQueue.confirm = confirm  # type: ignore[method-assign]
        line.require_equal()
    finally:
        TableQueue.confirm = confirm  # type: ignore[method-assign]
        line.close()
    delays_us.sort()

    def percentile(share: float) -> float:
        return round(delays_us[min(len(delays_us) - 1, int(len(delays_us) * share))] / 1000, 2)

    return {
        "wanted_tx_per_s": rate_per_s,
        "reached_tx_per_s": round(reached),
        "transactions": len(delays_us),
        "p50_ms": percentile(0.5),
        "p99_ms": percentile(0.99),
        "max_ms": percentile(1.0),
    }


def _run_pgbench(line: Line, rate_per_s: int, seconds: float) -> float:
    """Transactions a second that were committed."""
    with tempfile.TemporaryDirectory() as folder:
        files: list[str] = []
        line.connection.execute(b"CREATE SEQUENCE ids")
        for number in range(TABLES):
            script = Path(folder) / f"t{number}.sql"
            script.write_text(f"INSERT INTO t{number} SELECT {_VALUES} FROM (SELECT nextval('ids') AS i) q;\n")
            files += ["-f", str(script)]
        arguments = ["-n", "-M", "prepared", "-c", "8", "-j", "2", "-R", str(rate_per_s), "-T", str(round(seconds)), *files]
        done = subprocess.run(
            [str(postgres_bin_folder() / "pgbench"), *arguments, line.source_uri],
            capture_output=True,
            text=True,
            timeout=seconds + 120,
            check=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    for text in done.stdout.splitlines():
        if text.startswith("tps = "):
            return float(text.split()[2])
    raise AssertionError(f"pgbench said no tps: {done.stdout}")


def run() -> dict[str, object]:
    """This part of `make bench`."""
    return measure()


def measure(rows: int = 600_000, seconds: float = 8.0) -> dict[str, object]:
    """All figures, with what they depend on."""
    with servers() as pair:
        return {
            "settings": describe_servers(pair),
            "native": describe_native(),
            "inserts": measure_inserts(pair, rows),
            "mixed": measure_mixed(pair, rows),
            "spread": measure_spread(pair, rows // 2),
            "latency": measure_latency(pair, 2_000, seconds),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600_000)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--only", choices=["inserts", "mixed", "spread", "latency"])
    chosen = parser.parse_args()
    if chosen.only is None:
        print(json.dumps({"postgres": measure(chosen.rows, chosen.seconds)}))
        return
    with servers() as pair:
        if chosen.only == "latency":
            found = measure_latency(pair, 2_000, chosen.seconds)
        else:
            found = {"inserts": measure_inserts, "mixed": measure_mixed, "spread": measure_spread}[chosen.only](pair, chosen.rows)
    print(json.dumps({chosen.only: found}))


if __name__ == "__main__":
    main()
