"""What is written to the sink is what happened at the source, whatever the table at the sink looks like besides its columns."""

from __future__ import annotations

import itertools

import psycopg
import pytest

from tablewire.errors import OperatingError
from tests.processor.postgres.replication_kit import Kit, begin, follow, settle, wait_until

pytestmark = pytest.mark.integration

BINARY_AND_TEXT = pytest.mark.parametrize("binary", ["true", "false"])
_roles = itertools.count(1)


@pytest.fixture(params=["single", "bulk"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every rule by single statements and by the ways for many changes."""
    monkeypatch.setattr("processor.postgres.sinks.bulk.BULK_MIN", 1 if request.param == "bulk" else 1_000_000)
    return str(request.param)


def both(kit: Kit, *statements: str) -> None:
    for statement in statements:
        kit.run(statement)
        kit.at_sink(statement)


def server_version(kit: Kit) -> int:
    assert kit.sink_connection is not None
    return kit.sink_connection.info.server_version // 10_000


def as_role(uri: str, *grants: str) -> str:
    """The same database for a role that owns nothing; grants: with %s for the role."""
    role = f"writer_{uri.rpartition('/')[2]}_{next(_roles)}"
    with psycopg.connect(uri, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN".encode())
        connection.execute(f"GRANT CREATE ON DATABASE {uri.rpartition('/')[2]} TO {role}".encode())
        for grant in grants:
            connection.execute(grant.replace("%s", role).encode())
    return uri.replace("postgres@", f"{role}@")


def test_only_the_table_itself_is_written(source_db: str, sink_db: str) -> None:
    """Rows of a table that inherits from it are neither counted, deleted, updated nor truncated with its own."""
    with Kit(source_db, sink_db) as kit:
        both(kit, "CREATE TABLE parent (id int PRIMARY KEY, v int)", "CREATE TABLE child (PRIMARY KEY (id)) INHERITS (parent)")
        kit.run("INSERT INTO parent SELECT n, 0 FROM generate_series(1, 5) n")
        kit.run("INSERT INTO child SELECT n, 0 FROM generate_series(1, 5) n")
        start_ts = kit.start()
        executor = kit.executor()
        for name in ("child", "parent"):  # the parent's first copy finds the child's rows
            begin(executor, [kit.span(name)], start_ts)
            settle(kit, name)
        for statement in ("DELETE FROM ONLY parent WHERE id = 2", "UPDATE ONLY parent SET v = 7 WHERE id = 3"):
            kit.run(statement)
        settle(kit, "parent", "child")
        kit.wait_equal("ONLY parent", "child")
        kit.run("TRUNCATE ONLY parent")
        settle(kit, "parent", "child")
        kit.wait_equal("ONLY parent", "child")


@BINARY_AND_TEXT
def test_a_row_without_a_key_is_found_among_partitions(source_db: str, sink_db: str, binary: str) -> None:
    """A ctid is unique within one partition only."""
    with Kit(source_db, sink_db, options={"binary": binary}) as kit:
        kit.run("CREATE TABLE t (a int, b text)")
        kit.run("ALTER TABLE t REPLICA IDENTITY FULL")
        kit.at_sink("CREATE TABLE t (a int, b text) PARTITION BY LIST (a)")
        for number in range(1, 4):
            kit.at_sink(f"CREATE TABLE t{number} PARTITION OF t FOR VALUES IN ({number})")
        kit.run("INSERT INTO t SELECT 1 + n % 3, 'x' || n / 6 FROM generate_series(0, 29) n")
        follow(kit, "t")
        kit.run("UPDATE t SET b = 'changed' WHERE a = 2 AND b = 'x0'")
        kit.run("UPDATE t SET a = 3 WHERE a = 1 AND b = 'x1'")
        kit.run("DELETE FROM t WHERE a = 3 AND b = 'x2'")
        settle(kit, "t")
        kit.wait_equal("t")
        kit.run("TRUNCATE t")
        settle(kit, "t")
        kit.wait_equal("t")


AUDIT = """
CREATE TABLE seen (number bigserial, op text, was text, new text);
CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  INSERT INTO public.seen (op, was, new) VALUES (TG_OP, CASE WHEN TG_OP <> 'INSERT' THEN OLD::text END,
    CASE WHEN TG_OP <> 'DELETE' THEN NEW::text END); RETURN NULL; END $$;
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON t FOR EACH ROW EXECUTE FUNCTION audit();
ALTER TABLE t ENABLE ALWAYS TRIGGER audit"""


@BINARY_AND_TEXT
def test_triggers_at_the_sink_see_what_happened(source_db: str, sink_db: str, binary: str) -> None:
    """An update is one update there, also of the key; every change is seen, in the source's order."""
    with Kit(source_db, sink_db, options={"binary": binary}) as kit:
        both(kit, "CREATE TABLE t (id int PRIMARY KEY, v text)", AUDIT)
        follow(kit, "t")
        kit.run("INSERT INTO t SELECT n, 'a' FROM generate_series(1, 4) n")
        kit.run(
            "DO $$ BEGIN UPDATE t SET v = 'b' WHERE id < 3; UPDATE t SET id = 10 WHERE id = 1;"
            " DELETE FROM t WHERE id = 2; INSERT INTO t VALUES (2, 'c'); UPDATE t SET v = v WHERE id = 3; END $$"
        )
        settle(kit, "t")
        kit.wait_equal("t")
        assert kit.at_sink("SELECT op, was, new FROM seen ORDER BY number") == kit.run(
            "SELECT op, was, new FROM seen ORDER BY number"
        )


@BINARY_AND_TEXT
def test_local_columns_keep_their_values(source_db: str, sink_db: str, binary: str) -> None:
    """The sink's own columns stay when a row or its key changes; they are those of a new row when it is inserted again."""
    with Kit(source_db, sink_db, options={"binary": binary}) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY, v text)")
        kit.at_sink("CREATE TABLE t (note text DEFAULT 'new', id int PRIMARY KEY, v text)")
        kit.run(f"INSERT INTO t SELECT n, 'a' FROM generate_series(1, {5}) n")
        follow(kit, "t")
        kit.at_sink("UPDATE t SET note = 'kept ' || id")
        kit.run(
            "DO $$ BEGIN UPDATE t SET v = 'b' WHERE id = 1; UPDATE t SET id = 12, v = 'c' WHERE id = 2;"
            " DELETE FROM t WHERE id = 3; INSERT INTO t VALUES (3, 'd'); UPDATE t SET id = 15 WHERE id = 5; END $$"
        )
        settle(kit, "t")
        assert kit.at_sink("SELECT id, v, note FROM t ORDER BY id") == [
            (1, "b", "kept 1"),
            (3, "d", "new"),
            (4, "a", "kept 4"),
            (12, "c", "kept 2"),
            (15, "a", "kept 5"),
        ]


def test_rules_at_the_sink_do_not_reject_changes(source_db: str, sink_db: str) -> None:
    """Rules that do not fire for replicated changes are no reason to fail."""
    with Kit(source_db, sink_db) as kit:
        both(kit, "CREATE TABLE t (id int PRIMARY KEY, v int)", "CREATE TABLE log (id int)")
        kit.at_sink("CREATE RULE r AS ON UPDATE TO t DO ALSO INSERT INTO log VALUES (NEW.id)")
        kit.at_sink("CREATE RULE i AS ON INSERT TO t DO INSTEAD NOTHING")
        follow(kit, "t")
        kit.run("INSERT INTO t SELECT n, 0 FROM generate_series(1, 60) n")
        kit.run("UPDATE t SET v = id")
        kit.run("DELETE FROM t WHERE id < 10")
        settle(kit, "t")
        kit.wait_equal("t")
        assert kit.at_sink("SELECT count(*) FROM log") == [(0,)]


def test_rule_that_would_swallow_changes_is_the_table_s_error(source_db: str, sink_db: str) -> None:
    """The error names the statement that lets the table continue, and it does."""
    with Kit(source_db, sink_db) as kit:
        both(kit, "CREATE TABLE t (id int PRIMARY KEY, v int)")
        kit.at_sink("CREATE RULE i AS ON INSERT TO t DO INSTEAD NOTHING; ALTER TABLE t ENABLE ALWAYS RULE i")
        start_ts = kit.start()
        executor = kit.executor()
        begin(executor, [kit.span("t")], start_ts)
        settle(kit, "t")
        kit.run("INSERT INTO t VALUES (1, 1)")
        remedy: list[str] = []

        def fails() -> bool:
            try:
                executor.get_table_span_status(kit.span("t"), False)
            except OperatingError as error:
                remedy.append(str(error).partition("(i): ")[2])
            return bool(remedy)

        wait_until(fails, "the table's error")
        kit.at_sink(remedy[0])
        begin(kit.executor("b", changefeed_epoch=2), [kit.span("t")], start_ts)
        settle(kit, "t")
        kit.wait_equal("t")


@BINARY_AND_TEXT
@pytest.mark.parametrize("index", ["", "CREATE INDEX ON t (id)", "CREATE INDEX ON t USING hash (tenant)"])
def test_key_without_a_unique_index_at_the_sink(source_db: str, sink_db: str, binary: str, index: str) -> None:
    """Rows are found by another index or a scan; each change changes one row."""
    with Kit(source_db, sink_db, options={"binary": binary}) as kit:
        kit.run("CREATE TABLE t (tenant int, id int, v text, PRIMARY KEY (tenant, id))")
        kit.at_sink("CREATE TABLE t (tenant int, id int, v text)")
        if index:
            kit.at_sink(index)
        kit.run("INSERT INTO t SELECT 1, n, 'a' FROM generate_series(1, 60) n")
        follow(kit, "t")
        kit.run("UPDATE t SET v = 'b' || id WHERE id < 20")
        kit.run("UPDATE t SET tenant = 2 WHERE id = 5")
        kit.run("DELETE FROM t WHERE id > 50")
        kit.run("INSERT INTO t SELECT 3, n, 'c' FROM generate_series(1, 60) n")
        settle(kit, "t")
        kit.wait_equal("t")


@BINARY_AND_TEXT
def test_generated_always_identity_at_the_sink(source_db: str, sink_db: str, binary: str) -> None:
    """As a key and as another column; values are those of the source, also when they change."""
    with Kit(source_db, sink_db, options={"binary": binary}) as kit:
        both(kit, "CREATE TABLE t (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text)")
        kit.run("CREATE TABLE other (id int PRIMARY KEY, n int, v text)")
        kit.at_sink("CREATE TABLE other (id int PRIMARY KEY, n int GENERATED ALWAYS AS IDENTITY, v text)")
        kit.run("INSERT INTO t (v) SELECT 'a' FROM generate_series(1, 10) n")
        kit.run("INSERT INTO other SELECT n, n, 'a' FROM generate_series(1, 10) n")
        follow(kit, "t", "other")
        kit.run("INSERT INTO t (v) SELECT 'b' FROM generate_series(1, 10) n")
        kit.run("UPDATE t SET v = v || id WHERE id < 15")
        kit.run("UPDATE t SET id = DEFAULT WHERE id = 3")
        kit.run("DELETE FROM t WHERE id = 4")
        kit.run("UPDATE other SET v = 'b' WHERE id < 5")
        kit.run("UPDATE other SET n = n + 100, v = 'c' WHERE id > 7")
        kit.run("UPDATE other SET id = 50 WHERE id = 1")
        settle(kit, "t", "other")
        kit.wait_equal("t", "other")
        assert kit.at_sink("SELECT conflicts FROM tablewire.positions") == [(0,), (0,)]


def test_identity_column_that_changes_beside_local_columns(source_db: str, sink_db: str) -> None:
    """The row cannot be written again without losing what only the sink has: an error, whose way out works."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY, v text)")
        kit.at_sink("CREATE TABLE t (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v text, note text)")
        kit.run("INSERT INTO t VALUES (1, 'a')")
        executor = follow(kit, "t")
        kit.at_sink("UPDATE t SET note = 'kept'")
        kit.run("UPDATE t SET id = 2")
        remedy: list[str] = []

        def fails() -> bool:
            try:
                executor.get_table_span_status(kit.span("t"), False)
            except OperatingError as error:
                remedy.append(str(error).partition("sink: ")[2].removesuffix(" there"))
            return bool(remedy)

        wait_until(fails, "the table's error")
        kit.at_sink(remedy[0])
        begin(kit.executor("b", changefeed_epoch=2), [kit.span("t")], kit.start_ts)
        settle(kit, "t")
        assert kit.at_sink("SELECT id, v, note FROM t") == [(2, "a", "kept")]


def test_deferrable_constraints_and_values_that_are_exchanged(source_db: str, sink_db: str) -> None:
    """Rows of a deferrable key, and of another unique column, exchange their values in one transaction or statement."""
    with Kit(source_db, sink_db) as kit:
        both(
            kit,
            "CREATE TABLE k (id int PRIMARY KEY DEFERRABLE, v text)",
            "ALTER TABLE k REPLICA IDENTITY FULL",
            "CREATE TABLE u (id int PRIMARY KEY, v int UNIQUE DEFERRABLE)",
            "CREATE TABLE w (id int PRIMARY KEY, v int UNIQUE)",
        )
        kit.run("INSERT INTO k VALUES (1, 'a'), (2, 'b'), (3, 'c')")
        for name in ("u", "w"):
            kit.run(f"INSERT INTO {name} VALUES (1, 1), (2, 2), (3, 3)")
        follow(kit, "k", "u", "w")
        kit.run("UPDATE k SET id = CASE id WHEN 1 THEN 2 WHEN 2 THEN 3 ELSE 1 END")
        kit.run("UPDATE u SET v = 4 - v")
        kit.run(
            "DO $$ BEGIN UPDATE w SET v = 9 WHERE id = 1; UPDATE w SET v = 1 WHERE id = 2; UPDATE w SET v = 2 WHERE id = 1;"
            " DELETE FROM w WHERE id = 3; INSERT INTO w VALUES (4, 3); END $$"
        )
        settle(kit, "k", "u", "w")
        kit.wait_equal("k", "u", "w")
        assert kit.at_sink("SELECT sum(conflicts) FROM tablewire.positions") == [(0,)]


@BINARY_AND_TEXT
def test_operators_of_types_in_other_schemas(source_db: str, sink_db: str, binary: str) -> None:
    """Keys of extension types are compared by the operator of their index, although the search_path is empty."""
    with Kit(source_db, sink_db, options={"binary": binary}) as kit:
        both(kit, "CREATE SCHEMA ext", "CREATE EXTENSION citext SCHEMA ext", "CREATE EXTENSION ltree SCHEMA ext")
        both(kit, "CREATE DOMAIN ext.mail AS ext.citext CHECK (VALUE <> '')")
        for name, kind in (("c", "ext.citext"), ("l", "ext.ltree"), ("m", "ext.mail")):
            both(kit, f"CREATE TABLE {name} (k {kind} PRIMARY KEY, v int)")
            kit.run(f"INSERT INTO {name} VALUES ('Top.A', 1), ('Top.B', 2), ('Top.C', 3)")
        kit.run("CREATE TABLE plain (k ext.citext PRIMARY KEY, v int)")
        kit.at_sink("CREATE TABLE plain (k ext.citext, v int)")  # no index: the type's own operator
        kit.run("INSERT INTO plain VALUES ('Top.A', 1), ('Top.B', 2), ('Top.C', 3)")
        names = ("c", "l", "m", "plain")
        follow(kit, *names)
        for name in names:
            kit.run(f"UPDATE {name} SET v = 10 WHERE v = 1")
            kit.run(f"UPDATE {name} SET k = 'top.b' WHERE v = 2")
            kit.run(f"DELETE FROM {name} WHERE v = 3")
            kit.run(f"INSERT INTO {name} VALUES ('Top.C', 4)")
        settle(kit, *names)
        kit.wait_equal(*names)
        assert kit.at_sink("SELECT sum(conflicts) FROM tablewire.positions") == [(0,)]


@pytest.mark.parametrize("is_referenced", [False, True])
def test_truncate_restarts_the_sink_s_sequence_if_the_source_s_did(source_db: str, sink_db: str, is_referenced: bool) -> None:
    """RESTART IDENTITY and CASCADE; every table is emptied by its own change."""
    with Kit(source_db, sink_db) as kit:
        both(kit, "CREATE TABLE t (id int GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, v text)")
        if is_referenced:
            both(kit, "CREATE TABLE child (id int PRIMARY KEY, t int REFERENCES t)")
        else:
            both(kit, "CREATE TABLE child (id int PRIMARY KEY, t int)")
        kit.run("INSERT INTO t (v) VALUES ('a'), ('b')")
        kit.run("INSERT INTO child VALUES (1, 1)")
        follow(kit, "t", "child")
        kit.at_sink("SELECT setval('t_id_seq', 77)")
        kit.run("TRUNCATE t CASCADE")
        settle(kit, "t", "child")
        kit.wait_equal("t", "child")
        assert kit.at_sink("SELECT last_value FROM t_id_seq") == [(77,)]
        kit.run("TRUNCATE t, child RESTART IDENTITY CASCADE")
        kit.run("INSERT INTO t (v) VALUES ('c')")
        settle(kit, "t", "child")
        kit.wait_equal("t", "child")
        assert kit.at_sink("SELECT last_value, is_called FROM t_id_seq") == [(1, False)]


def test_temporal_key(source_db: str, sink_db: str) -> None:
    """WITHOUT OVERLAPS: the index is no unique index for ON CONFLICT; a plain table is the source."""
    with Kit(source_db, sink_db) as kit:
        if server_version(kit) < 18:
            with pytest.raises(psycopg.errors.SyntaxError):
                kit.run("CREATE TABLE t (id int, during int4range, PRIMARY KEY (id, during WITHOUT OVERLAPS))")
            return
        both(
            kit,
            "CREATE EXTENSION btree_gist",
            "CREATE TABLE t (id int, during int4range, v text, PRIMARY KEY (id, during WITHOUT OVERLAPS))",
            "ALTER TABLE t REPLICA IDENTITY FULL",
        )
        kit.run("INSERT INTO t SELECT n, int4range(n, n + 10), 'a' FROM generate_series(1, 20) n")
        follow(kit, "t")
        kit.run("UPDATE t SET v = 'b' WHERE id < 5")
        kit.run("UPDATE t SET during = int4range(100, 200) WHERE id = 7")
        kit.run("DELETE FROM t WHERE id = 9")
        kit.run("INSERT INTO t VALUES (7, int4range(7, 17), 'c')")
        settle(kit, "t")
        kit.wait_equal("t")


def test_table_of_key_columns_only(source_db: str, sink_db: str) -> None:
    """There is nothing to set but the key."""
    with Kit(source_db, sink_db) as kit:
        both(kit, "CREATE TABLE t (a int, b int, PRIMARY KEY (a, b))")
        kit.run("INSERT INTO t SELECT n, n FROM generate_series(1, 9) n")
        follow(kit, "t")
        kit.run("UPDATE t SET a = a WHERE a < 3")
        kit.run("UPDATE t SET b = 100 WHERE a = 4")
        kit.run("DELETE FROM t WHERE a = 5")
        settle(kit, "t")
        kit.wait_equal("t")


def test_an_index_finds_rows_without_a_key(source_db: str, sink_db: str) -> None:
    """Whole old rows are looked up by an index of the sink; values before the first NULL are of use."""
    with Kit(source_db, sink_db) as kit:
        both(kit, "CREATE TABLE t (a int, b text, c int)", "ALTER TABLE t REPLICA IDENTITY FULL")
        kit.at_sink("CREATE INDEX found ON t (a, b)")
        kit.run("INSERT INTO t SELECT n, nullif('x' || n % 2, 'x1'), n FROM generate_series(1, 500) n")
        follow(kit, "t")
        kit.run("UPDATE t SET c = -c WHERE a < 20")
        kit.run("UPDATE t SET a = NULL WHERE a = 30")
        kit.run("DELETE FROM t WHERE a > 490 OR a IS NULL")
        settle(kit, "t")
        kit.wait_equal("t")
        kit.at_sink("SELECT pg_stat_force_next_flush()")
        wait_until(
            lambda: int(str(kit.at_sink("SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = 'found'")[0][0])) >= 30,
            "scans of the index are reported",
        )


def test_role_without_temporary_tables(source_db: str, sink_db: str) -> None:
    """Updates of many rows are written without a staging table."""
    sink = as_role(
        sink_db, "GRANT ALL ON SCHEMA public TO %s", f"REVOKE TEMP ON DATABASE {sink_db.rpartition('/')[2]} FROM PUBLIC"
    )
    with Kit(source_db, sink) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY, v int)")
        kit.run("INSERT INTO t SELECT n, 0 FROM generate_series(1, 100) n")
        follow(kit, "t")
        kit.run("UPDATE t SET v = id")
        kit.run("DELETE FROM t WHERE id > 90")
        settle(kit, "t")
        kit.wait_equal("t")


def test_row_level_security_that_hides_rows_is_an_error(source_db: str, sink_db: str) -> None:
    """No update or delete may affect nothing without a word; the way out in the text works."""
    sink = as_role(sink_db, "GRANT ALL ON SCHEMA public TO %s")
    with Kit(source_db, sink) as kit:
        kit.run("CREATE TABLE t (id int PRIMARY KEY, v int)")
        kit.run("INSERT INTO t SELECT n, 0 FROM generate_series(1, 10) n")
        executor = follow(kit, "t")
        kit.at_sink("ALTER TABLE t ENABLE ROW LEVEL SECURITY; ALTER TABLE t FORCE ROW LEVEL SECURITY")
        kit.run("UPDATE t SET v = 1")
        texts: list[str] = []

        def fails() -> bool:
            try:
                executor.get_table_span_status(kit.span("t"), False)
            except OperatingError as error:
                texts.append(str(error))
            return bool(texts)

        wait_until(fails, "the table's error")
        assert "row-level security" in texts[0]
        assert "ALTER TABLE public.t DISABLE ROW LEVEL SECURITY" in texts[0]
        kit.at_sink("ALTER TABLE public.t DISABLE ROW LEVEL SECURITY")
        begin(kit.executor("b", changefeed_epoch=2), [kit.span("t")], kit.start_ts)
        settle(kit, "t")
        kit.wait_equal("t")


def test_deferrable_constraints_that_the_sink_enforces(source_db: str, sink_db: str) -> None:
    """A role that may not set session_replication_role: values are exchanged before the constraint is checked."""
    sink = as_role(sink_db, "GRANT ALL ON SCHEMA public TO %s")
    with Kit(source_db, sink) as kit:
        kit.run("CREATE TABLE u (id int PRIMARY KEY, v int UNIQUE DEFERRABLE, w text)")
        kit.run("CREATE TABLE k (id int PRIMARY KEY DEFERRABLE, v text)")
        kit.run("ALTER TABLE k REPLICA IDENTITY FULL")
        kit.at_sink("CREATE TABLE u (id int PRIMARY KEY, v int UNIQUE DEFERRABLE, w text, note text)")
        kit.at_sink("CREATE TABLE k (id int PRIMARY KEY DEFERRABLE, v text)")
        kit.run("INSERT INTO u SELECT n, n, 'a' FROM generate_series(1, 6) n")
        kit.run("INSERT INTO k SELECT n, 'a' FROM generate_series(1, 6) n")
        follow(kit, "u", "k")
        kit.run("UPDATE u SET v = 7 - v")
        kit.run("UPDATE k SET id = 7 - id")
        settle(kit, "u", "k")
        assert kit.at_sink("SELECT id, v, w FROM u ORDER BY 1") == kit.run("SELECT id, v, w FROM u ORDER BY 1")
        kit.wait_equal("k")
        assert kit.at_sink("SELECT sum(conflicts) FROM tablewire.positions") == [(0,)]


def test_children_soon_follow_their_parents(source_db: str, sink_db: str) -> None:
    """Where foreign keys are enforced, a child that is written before its parent is written soon afterwards."""
    sink = as_role(sink_db, "GRANT ALL ON SCHEMA public TO %s")
    with Kit(source_db, sink) as kit:
        kit.run("CREATE TABLE parent (id int PRIMARY KEY)")
        kit.run("CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent)")
        follow(kit, "parent", "child")
        kit.at_sink("ALTER TABLE child ADD FOREIGN KEY (parent) REFERENCES parent")
        for number in range(5):
            kit.run(
                f"DO $$ BEGIN INSERT INTO parent SELECT {number} * 1000 + n FROM generate_series(1, 500) n;"
                f" INSERT INTO child SELECT {number} * 1000 + n, {number} * 1000 + n FROM generate_series(1, 500) n;"
                f" DELETE FROM child WHERE id % 7 = 0; DELETE FROM parent WHERE id % 7 = 0; END $$"
            )
        kit.wait_equal("parent", "child", deadline_s=10.0)
