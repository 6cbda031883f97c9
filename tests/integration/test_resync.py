"""`owner changefeed resync`, with real services: every table is copied again, whatever state the changefeed is in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.integration.test_services_postgres import Line

pytestmark = pytest.mark.integration


@pytest.fixture
def line(tmp_path: Path, source_db: str, sink_db: str) -> Iterator[Line]:
    line = Line(tmp_path, source_db, sink_db)
    line.run("CREATE TABLE a (id int PRIMARY KEY, v text)")
    line.run("INSERT INTO a SELECT i FROM generate_series(1, 100) i")
    with line.cluster:
        yield line


def incarnation(line: Line) -> int:
    """Of the publication: a new one marks the rows at the sink as those of an earlier one."""
    comment = "SELECT obj_description(oid, 'pg_publication')::jsonb ->> 'incarnation' FROM pg_publication WHERE pubname = %s"
    with psycopg.connect(line.source) as connection:
        return int(str(connection.execute(comment.encode(), ("tablewire_one",)).fetchone()[0]))  # type: ignore[index]


def resync(line: Line) -> None:
    """Runs it and waits; the rows are copied, and the next one follows."""
    before = incarnation(line)
    answer = line.cluster.owner_json("changefeed", "resync", "one", "--wait")
    assert (answer["state"], answer["skip_snapshot"]) == ("normal", False)
    assert incarnation(line) > before
    source = {row[0] for row in line.run("SELECT id FROM a")}
    assert line.ids() == source
    line.run("INSERT INTO a SELECT max(id) + 1 FROM a")
    line.wait("the next row follows", lambda: line.ids() == source | {max(source) + 1})


def test_resync_of_a_running_changefeed_repairs_the_sink(line: Line) -> None:
    """Rows that were lost at the sink, and a table that was dropped there, are back; an event says what happened."""
    line.create()
    line.wait("the first copy is there", lambda: len(line.ids()) == 100)
    line.run("DELETE FROM a WHERE id <= 50", sink=True)
    resync(line)
    line.run("DROP TABLE a", sink=True)
    resync(line)
    assert "changefeed_resynced" in line.kinds()


def test_resync_of_a_changefeed_without_first_copies_copies(line: Line) -> None:
    """An explicit request counts more than --no-snapshot; a paused changefeed runs again."""
    line.create("--no-snapshot")
    line.cluster.wait_replicating("one", tables=1)  # before that, the row would be before the start
    line.run("INSERT INTO a VALUES (101)")
    line.wait("changes follow", lambda: line.ids() == {101})
    resync(line)
    line.cluster.owner_json("changefeed", "pause", "one")
    line.run("DELETE FROM a WHERE id <= 50")
    resync(line)
