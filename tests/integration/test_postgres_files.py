"""The files sink: every change at least once and identified, first copies whole, torn lines and older writers harmless."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from processor.postgres.executor import PostgresExecutor
from tablewire.errors import EpochRefusedError
from tablewire.model.spans import Span
from tablewire.postgres.lsn import parse_lsn
from tests.processor.postgres.replication_kit import Kit, begin, checkpoint_of, current, prepare, promote, stop, wait_until

pytestmark = pytest.mark.integration


def lines(folder: Path, table: str) -> list[dict[str, dict[str, object]]]:
    """All lines of a table: first copies, then changes in the order of their identity, each once."""
    found: dict[tuple[bool, int, int], dict[str, dict[str, object]]] = {}
    for path in sorted((folder / table).glob("*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            is_change = line["op"] != "r"
            found[is_change, parse_lsn(str(line["source"]["lsn"])), line["source"]["ordinal"]] = line
    return [found[key] for key in sorted(found)]


def replayed(folder: Path, table: str) -> dict[object, object]:
    """What the lines come to, by id."""
    rows: dict[object, dict[str, object]] = {}
    for line in lines(folder, table):
        before, after = line.get("before"), line.get("after")
        if line["op"] == "t":
            rows.clear()
        if before is not None:
            old = rows.pop(before["id"], {})
        else:
            old = rows.get(after["id"], {}) if after else {}
        if after is not None:
            rows[after["id"]] = {**old, **after}
    return dict(rows)


def wait_replayed(kit: Kit, folder: Path, executor: PostgresExecutor, span: Span, name: str) -> None:
    target = current(kit)
    wait_until(lambda: checkpoint_of(executor, span) >= target, "the checkpoint passes")
    expected = {row[0]: json.loads(str(row[1])) for row in kit.run(f"SELECT id, to_jsonb(t)::text FROM {name} t")}
    wait_until(lambda: replayed(folder, f"public.{name}") == expected, "the lines replay to the rows of the source")


def test_files_hold_every_change(source_db: str, tmp_path: Path) -> None:
    """First copy, changes, a move and a torn line: the lines replay to the source's rows."""
    with Kit(source_db, f"file://{tmp_path}/sink") as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY, v text, f float8, b bool, big text)")
        kit.run("ALTER TABLE t ALTER big SET STORAGE EXTERNAL")
        kit.run("INSERT INTO t SELECT i, 'é\"' || i, i / 8.0, i % 2 = 0, repeat('x', 5000) FROM generate_series(1, 300) i")
        start_ts = kit.start()
        folder = tmp_path / "sink"
        first, second = kit.executor("a"), kit.executor("b")
        span = kit.span("t")
        begin(first, [span], start_ts)
        wait_replayed(kit, folder, first, span, "t")
        kit.run("UPDATE t SET v = NULL WHERE id <= 50")
        kit.run("DELETE FROM t WHERE id % 3 = 0")
        kit.run("INSERT INTO t VALUES (1000, 'new', NULL, NULL, NULL)")
        kit.run("UPDATE t SET id = 2000 WHERE id = 1000")
        wait_replayed(kit, folder, first, span, "t")
        assert "unchanged" in next(line for line in lines(folder, "public.t") if line["op"] == "u")
        prepare(second, span, checkpoint_of(first, span))
        stopped_at = stop(first, span)
        newest = max((folder / "public.t").glob("[0-9]*.jsonl"))
        with newest.open("a", encoding="utf-8") as file:
            file.write('{"op":"c","torn')
        promote(second, span, stopped_at)
        kit.run("INSERT INTO t VALUES (1001, 'again', 1.5, true, 'x')")
        wait_replayed(kit, folder, second, span, "t")
        kit.run("TRUNCATE t")
        kit.run("INSERT INTO t VALUES (1, 'last', 1, true, 'x')")
        wait_replayed(kit, folder, second, span, "t")


def test_files_refuse_an_older_epoch(source_db: str, tmp_path: Path) -> None:
    """A writer whose successor has announced itself appends nothing more."""
    with Kit(source_db, f"file://{tmp_path}/sink") as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY)")
        start_ts = kit.start()
        old, new = kit.executor("a"), kit.executor("b")
        span = kit.span("t")
        prepare(old, span, start_ts)
        promote(old, span, start_ts, epoch=5)
        kit.run("INSERT INTO t VALUES (1)")
        wait_replayed(kit, tmp_path / "sink", old, span, "t")
        prepare(new, span, start_ts)
        promote(new, span, start_ts, epoch=6)
        kit.run("INSERT INTO t VALUES (2)")
        with pytest.raises(EpochRefusedError):
            wait_until(lambda: old.get_table_span_status(span, False) is None, "the old writer is refused")
        wait_replayed(kit, tmp_path / "sink", new, span, "t")


def test_blackhole_takes_everything(source_db: str) -> None:
    """The blackhole's checkpoint follows."""
    with Kit(source_db, "blackhole://") as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY)")
        start_ts = kit.start()
        executor = kit.executor()
        span = kit.span("t")
        begin(executor, [span], start_ts)
        kit.run("INSERT INTO t SELECT generate_series(1, 1000)")
        target = current(kit)
        wait_until(lambda: checkpoint_of(executor, span) >= target, "the checkpoint follows")
        assert executor._tables[span].rows_written == 1000
