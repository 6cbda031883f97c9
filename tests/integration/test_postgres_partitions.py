"""Partitioned tables: by leaf and by root, to sinks that are partitioned, partitioned differently, or not at all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tablewire.errors import OperatingError
from tests.processor.postgres.replication_kit import Kit, begin, prepare, promote, stop, wait_until

pytestmark = pytest.mark.integration

ROOT = "CREATE TABLE m (id int NOT NULL, k int NOT NULL, v text, PRIMARY KEY (id, k)) PARTITION BY RANGE (k)"


@pytest.fixture
def kit(source_db: str, sink_db: str) -> Iterator[Kit]:
    with Kit(source_db, sink_db) as kit:
        yield kit


def make_source(kit: Kit) -> None:
    """m with two leaves: one in another schema, one below a partitioned table between."""
    kit.run(f"CREATE SCHEMA archive; {ROOT}")
    kit.run("CREATE TABLE archive.m_old PARTITION OF m FOR VALUES FROM (0) TO (10)")
    kit.run("CREATE TABLE m_mid PARTITION OF m FOR VALUES FROM (10) TO (100) PARTITION BY LIST (k)")
    kit.run("CREATE TABLE m_11 PARTITION OF m_mid FOR VALUES IN (11)")
    kit.run("INSERT INTO m VALUES (1, 1, 'old'), (2, 11, 'new')")


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["public.*"], {"archive.m_old", "public.m_11"}),
        (["public.m"], {"archive.m_old", "public.m_11"}),
        (["public.m_mid"], {"public.m_11"}),
        (["archive.*"], {"archive.m_old"}),
        (["public.*", "!archive.*"], {"public.m_11"}),
        (["*.*", "!public.m"], {"public.other"}),
    ],
)
def test_a_leaf_belongs_to_the_filter_if_its_root_does(kit: Kit, patterns: list[str], names: set[str]) -> None:
    """Wherever it lives; and whatever excludes its root excludes it."""
    make_source(kit)
    kit.run("CREATE TABLE other (id int PRIMARY KEY)")
    kit.tables = patterns
    kit.start()
    assert kit.source is not None
    assert set(kit.source.tables().values()) - ({"public.other"} if "!public.m" not in patterns else set()) == names


def test_new_leaves_become_partitions_of_the_sinks_root(kit: Kit) -> None:
    """The sink's partitioned table has their rows, also below a partitioned table that the sink lacks, and in other schemas."""
    make_source(kit)
    kit.at_sink(ROOT)
    start_ts = kit.start()
    executor = kit.executor()
    begin(executor, kit.spans(), start_ts)
    kit.wait_equal("m")
    kit.run("CREATE TABLE m_12 PARTITION OF m_mid FOR VALUES IN (12)")
    kit.run("CREATE TABLE m_rest PARTITION OF m DEFAULT")
    kit.run("INSERT INTO m VALUES (3, 12, 'listed'), (4, 1000, 'default')")
    assert kit.source is not None
    begin(executor, [span for span in kit.spans() if span in (kit.span("m_12"), kit.span("m_rest"))], start_ts)
    kit.run("UPDATE m SET v = v || ' again'")
    kit.run("INSERT INTO m VALUES (5, 11, 'last')")
    kit.wait_equal("m", "m_mid", "m_12", "m_rest", "archive.m_old")


def test_a_leaf_that_does_not_fit_the_sinks_root_says_so(kit: Kit) -> None:
    """The sink's root is partitioned in another way; the way out in the text works."""
    kit.run(ROOT)
    kit.run("CREATE TABLE m_1 PARTITION OF m FOR VALUES FROM (0) TO (10)")
    kit.run("INSERT INTO m VALUES (1, 1, 'x')")
    kit.at_sink(ROOT.replace("RANGE (k)", "LIST (id)"))
    start_ts = kit.start()
    executor, span = kit.executor(), kit.span("m_1")
    prepare(executor, span, start_ts)
    with pytest.raises(OperatingError, match=r"public\.m_1 cannot be created at the sink as a partition of public\.m.*create it"):
        promote(executor, span, start_ts)
    executor.remove_table_span(span)
    wait_until(lambda: executor.is_remove_table_span_finished(span)[1], "it is removed")
    kit.at_sink("CREATE TABLE m_1 (id int NOT NULL, k int NOT NULL, v text, PRIMARY KEY (id, k))")
    begin(executor, [span], start_ts)
    kit.wait_equal("m_1")


def test_without_a_root_at_the_sink_a_leaf_is_a_plain_table(kit: Kit) -> None:
    """Nothing is invented: the sink gets the leaves as tables."""
    make_source(kit)
    start_ts = kit.start()
    begin(kit.executor(), kit.spans(), start_ts)
    kit.wait_equal("archive.m_old", "m_11")
    assert kit.at_sink("SELECT to_regclass('public.m')") == [(None,)]


@pytest.fixture
def by_root(source_db: str, sink_db: str) -> Iterator[Kit]:
    with Kit(source_db, sink_db, options={"partitions": "root"}) as kit:
        yield kit


SINKS = {
    "none": "",
    "plain": "CREATE TABLE m (v text, id int NOT NULL, k int NOT NULL, PRIMARY KEY (id, k))",
    "partitioned differently": ROOT.replace("RANGE (k)", "HASH (id)")
    + "; CREATE TABLE h0 PARTITION OF m FOR VALUES WITH (MODULUS 2, REMAINDER 0)"
    + "; CREATE TABLE h1 PARTITION OF m FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
}


@pytest.mark.parametrize("sink", SINKS.values(), ids=SINKS)
def test_a_root_is_one_table(by_root: Kit, sink: str) -> None:
    """Its rows are copied and followed across leaves of both ends, whatever the sink's table is; no leaf is listed."""
    make_source(by_root)
    if sink:
        by_root.at_sink(sink)
    by_root.run("CREATE TABLE plain (id int PRIMARY KEY)")
    start_ts = by_root.start()
    assert by_root.source is not None
    assert set(by_root.source.tables().values()) == {"public.m", "public.plain"}
    begin(by_root.executor(), by_root.spans(), start_ts)
    by_root.wait_equal("m")
    by_root.run("INSERT INTO m SELECT i, i % 12, 'x' FROM generate_series(100, 300) i WHERE i % 12 <> 10")
    by_root.run("UPDATE m SET k = 11 WHERE id = 1")  # to another leaf
    by_root.run("UPDATE m SET id = id + 1000 WHERE id % 10 = 0")
    by_root.run("DELETE FROM m WHERE id % 7 = 0")
    by_root.wait_equal("m")
    by_root.run("CREATE TABLE m_12 PARTITION OF m_mid FOR VALUES IN (12)")
    by_root.run("INSERT INTO m VALUES (5, 12, 'in a new leaf')")
    by_root.wait_equal("m")
    by_root.run("TRUNCATE m")
    by_root.run("INSERT INTO m VALUES (6, 12, 'last')")
    by_root.wait_equal("m")


def test_a_leaf_alone_is_listed_if_its_root_is_not(by_root: Kit) -> None:
    """A filter that selects some leaves replicates these; one that selects a partitioned table below the root, that one."""
    make_source(by_root)
    by_root.tables = ["archive.*", "public.m_mid"]
    start_ts = by_root.start()
    assert by_root.source is not None
    assert set(by_root.source.tables().values()) == {"archive.m_old", "public.m_mid"}
    begin(by_root.executor(), by_root.spans(), start_ts)
    by_root.run("UPDATE m SET v = 'both'")
    by_root.wait_equal("archive.m_old", "m_mid")


def test_leaves_that_identify_rows_otherwise_are_refused(by_root: Kit) -> None:
    """The source logs old rows as the leaf says, and the stream describes them as the root says: they must agree."""
    make_source(by_root)
    by_root.run("ALTER TABLE m REPLICA IDENTITY FULL")
    by_root.start()
    assert by_root.source is not None
    assert by_root.source.tables() == {}
    (reason,) = by_root.source.left_out()
    assert "archive.m_old has not: ALTER TABLE" in reason
    for leaf in ("archive.m_old", "m_11"):
        by_root.run(f"ALTER TABLE {leaf} REPLICA IDENTITY FULL")
    assert set(by_root.source.tables().values()) == {"public.m"}
    by_root.run("ALTER TABLE m REPLICA IDENTITY DEFAULT; ALTER TABLE m_11 REPLICA IDENTITY NOTHING")
    by_root.source.tables()
    assert [failure.reason for failure in by_root.source.check() if "m_11 identifies rows by other columns" in failure.reason]


def test_inheritance_is_not_partitioning(kit: Kit) -> None:
    """Parent and child are two tables at both ends: neither copy nor change of one touches rows of the other."""
    for run in (kit.run, kit.at_sink):
        run("CREATE TABLE parent (id int PRIMARY KEY, v text)")
        run("CREATE TABLE child (more text, PRIMARY KEY (id)) INHERITS (parent)")
    kit.run("INSERT INTO parent VALUES (1, 'p'), (2, 'p')")
    kit.run("INSERT INTO child VALUES (1, 'c', 'm'), (2, 'c', 'm')")
    start_ts = kit.start()
    begin(kit.executor(), kit.spans(), start_ts)
    kit.wait_equal("parent", "child")
    assert kit.at_sink("SELECT count(*) FROM ONLY parent") == [(2,)]
    kit.run("UPDATE ONLY parent SET v = 'changed' WHERE id = 1")
    kit.run("DELETE FROM ONLY parent WHERE id = 2")
    kit.run("UPDATE child SET v = 'changed too' WHERE id = 2")
    kit.wait_equal("parent", "child")
    kit.run("TRUNCATE ONLY parent")
    kit.run("INSERT INTO parent VALUES (9, 'last')")
    kit.wait_equal("parent", "child")


TREE_CHANGES = {
    "detached": "ALTER TABLE m DETACH PARTITION archive.m_old",
    "dropped": "DROP TABLE archive.m_old",
    "truncated": "TRUNCATE archive.m_old",
    "attached": "CREATE TABLE x (LIKE m); INSERT INTO x VALUES (7, 200, 'x'); ALTER TABLE m ATTACH PARTITION x DEFAULT",
    "a tree is attached": "CREATE TABLE x (LIKE m) PARTITION BY RANGE (k); CREATE TABLE x1 PARTITION OF x DEFAULT;"
    " INSERT INTO x VALUES (7, 200, 'x'); ALTER TABLE m ATTACH PARTITION x DEFAULT",
    "a tree is detached": "ALTER TABLE m DETACH PARTITION m_mid",
    "rewritten": "ALTER TABLE m ALTER v TYPE varchar(40) USING v || '!'",
}


@pytest.mark.parametrize("is_stopped", [False, True], ids=["running", "stopped"])
@pytest.mark.parametrize("change", TREE_CHANGES.values(), ids=TREE_CHANGES)
def test_partitions_that_come_or_go_with_rows_copy_the_root_again(by_root: Kit, change: str, is_stopped: bool) -> None:
    """The stream has no changes of their rows; this is noticed without any further row, also by a processor that starts later."""
    make_source(by_root)
    start_ts = by_root.start()
    executor, span = by_root.executor(), by_root.span("m")
    begin(executor, [span], start_ts)
    by_root.wait_equal("m")
    if is_stopped:
        checkpoint_ts = stop(executor, span)
        executor.close()
    with by_root.source_connection.transaction():
        by_root.run(change)
    if is_stopped:
        begin(by_root.executor("b"), [span], checkpoint_ts)
    by_root.wait_equal("m")
    by_root.run("INSERT INTO m VALUES (9, 11, 'last')" if "m_mid" not in change else "INSERT INTO m VALUES (9, 1, 'last')")
    by_root.wait_equal("m")


def test_a_partition_that_is_created_empty_copies_nothing_again(by_root: Kit) -> None:
    """All of its rows are in the stream, even those of the transaction that creates it, and so is a column with a default."""
    make_source(by_root)
    start_ts = by_root.start()
    begin(by_root.executor(), [by_root.span("m")], start_ts)
    by_root.wait_equal("m")
    by_root.at_sink("DELETE FROM m WHERE id = 1")  # a copy would bring it back
    with by_root.source_connection.transaction():
        by_root.run("CREATE TABLE m_rest PARTITION OF m DEFAULT PARTITION BY HASH (id)")
        by_root.run("CREATE TABLE m_rest_0 PARTITION OF m_rest FOR VALUES WITH (MODULUS 1, REMAINDER 0)")
        by_root.run("INSERT INTO m VALUES (7, 200, 'rest')")
    by_root.run("ALTER TABLE m ADD COLUMN n int DEFAULT 5")
    by_root.run("INSERT INTO m VALUES (8, 11, 'last', 6)")
    wait_until(lambda: (8,) in by_root.at_sink("SELECT id FROM m"), "the last row arrives")
    assert by_root.at_sink("SELECT id, n FROM m ORDER BY id") == [(2, 5), (7, 5), (8, 6)]
