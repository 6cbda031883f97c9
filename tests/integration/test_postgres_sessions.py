"""Settings of roles and databases at either end change no value, hide no row and end no copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
import pytest

from tablewire.errors import OperatingError
from tests.processor.postgres.replication_kit import Kit, begin, checkpoint_of, current, stop, wait_until

pytestmark = pytest.mark.integration

HOSTILE = {
    "datestyle": "'SQL, DMY'",
    "intervalstyle": "sql_standard",
    "timezone": "'Asia/Kathmandu'",
    "extra_float_digits": "-5",
    "bytea_output": "escape",
    "xmloption": "document",
    "array_nulls": "off",
    "quote_all_identifiers": "on",
    "search_path": "hidden, public",
    "standard_conforming_strings": "off",
    "backslash_quote": "off",
    "transform_null_equals": "on",
    "gin_fuzzy_search_limit": "1",
    "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on",
    "default_transaction_deferrable": "on",
    "client_min_messages": "error",
    "exit_on_error": "on",
    "client_encoding": "LATIN1",
    "synchronous_commit": "off",
}
TIMEOUTS = {
    "statement_timeout": "60",
    "lock_timeout": "20",
    "idle_in_transaction_session_timeout": "60",
    "idle_session_timeout": "60",
    "transaction_timeout": "60",
}
COLUMNS = (
    "id int PRIMARY KEY, d date, ts timestamp, tz timestamptz, ti timetz, iv interval, f float8, f4 real, by bytea,"
    " x xml, a text[], t text, m money, r tstzrange, da date[]"
)
ROW = (
    r"'2025-02-03', '2025-02-03 04:05:06.789', '2025-02-03 04:05:06+05', '04:05:06+05:45', '-1 year 2 days -03:04:05.678',"
    r" 0.1::float8 + 0.2, 1.1234567, '\x00ff5c27', 'text <a/> more', '{NULL,\"NULL\",a\\b}', E'\\back ''slash'' \u00e9\u20ac',"
    " '-1234.56',"
    r" '[2025-02-03 00:00+00,2025-03-02 00:00+00)', '{2025-02-03,NULL}'"
)


def _set_for_database(connection: psycopg.Connection[tuple[object, ...]], name: str, value: str) -> None:
    _alter(connection, "ALTER DATABASE {database} SET", name, value)


def _set_for_role(connection: psycopg.Connection[tuple[object, ...]], name: str, value: str) -> None:
    _alter(connection, "ALTER ROLE {role} IN DATABASE {database} SET", name, value)


def _alter(connection: psycopg.Connection[tuple[object, ...]], statement: str, name: str, value: str) -> None:
    known = connection.execute("SELECT 1 FROM pg_settings WHERE name = lower(%s)", (name,)).fetchone()
    if known is not None:  # some came with later versions
        names = {"database": f'"{connection.info.dbname}"', "role": f'"{connection.info.user}"'}
        connection.execute(f"{statement.format(**names)} {name} = {value}".encode())


def alter(kit: Kit, setter: Callable[..., None], settings: dict[str, str]) -> None:
    """Applies the settings to all later sessions at both ends."""
    assert kit.sink_connection is not None
    for connection in (kit.source_connection, kit.sink_connection):
        for name, value in settings.items():
            setter(connection, name, value)


def settle(kit: Kit, *names: str) -> None:
    """Everything committed by now is written, and equal."""
    target = current(kit)
    for name in names:
        span = kit.span(name)
        wait_until(lambda span=span: checkpoint_of(kit.executors[-1], span) >= target, f"the checkpoint of {name}")  # type: ignore[misc]
    kit.wait_equal(*names, deadline_s=2.0)


@pytest.mark.parametrize("binary", ["true", "false"])
@pytest.mark.parametrize("setter", [_set_for_database, _set_for_role])
def test_settings_change_no_value(source_db: str, sink_db: str, setter: Callable[..., None], binary: str) -> None:
    """Every setting that changes the form or the meaning of a value is overridden: copy, changes, new columns, keyless rows."""
    with Kit(source_db, sink_db, options={"binary": binary}) as kit:
        kit.run(f"CREATE TABLE t ({COLUMNS if kit.has_xml() else COLUMNS.replace('x xml', 'x text')})")
        kit.run(f"INSERT INTO t SELECT i, {ROW} FROM generate_series(1, 3) i")
        kit.run("CREATE TABLE keyless (d date, iv interval, f float8)")
        kit.run("ALTER TABLE keyless REPLICA IDENTITY FULL")
        kit.run("INSERT INTO keyless VALUES ('2025-02-03', '1 mon -2 days', 0.1::float8 + 0.2), ('2025-03-02', NULL, NULL)")
        kit.run("CREATE TABLE dated (d date, f float8, v int, PRIMARY KEY (d, f))")
        kit.run("INSERT INTO dated VALUES ('2025-02-03', 0.1::float8 + 0.2, 1), ('2025-03-02', 0.3, 2)")
        alter(kit, setter, HOSTILE)
        start_ts = kit.start()
        begin(kit.executor(), [kit.span(name) for name in ("t", "keyless", "dated")], start_ts)
        settle(kit, "t", "keyless", "dated")
        kit.run(f"INSERT INTO t VALUES (10, {ROW})")
        kit.run(f"INSERT INTO t SELECT i, {ROW} FROM generate_series(100, 200) i")
        kit.run("UPDATE t SET d = d + 1, f = f * 3 WHERE id < 10")
        kit.run("UPDATE keyless SET f = f + 1 WHERE d = '2025-02-03'")
        kit.run("DELETE FROM keyless WHERE d = '2025-03-02'")
        kit.run("UPDATE dated SET v = 3 WHERE v = 1")
        kit.run(
            "ALTER TABLE t ADD COLUMN added date DEFAULT '2025-02-03', ADD COLUMN took interval DEFAULT '-1 year 2 days 03:00'"
        )
        kit.run("INSERT INTO t (id) VALUES (11)")
        settle(kit, "t", "keyless", "dated")


def test_timeouts_end_neither_copies_nor_streams(source_db: str, sink_db: str) -> None:
    """A copy that takes longer than every timeout of the role succeeds at the first attempt, and idle sessions stay open."""
    with Kit(source_db, sink_db) as kit:
        kit.run("CREATE TABLE big (id int PRIMARY KEY, v text)")
        kit.run("INSERT INTO big SELECT i, repeat('x', 300) FROM generate_series(1, 200000) i")
        alter(kit, _set_for_role, TIMEOUTS)
        start_ts = kit.start()
        executor = kit.executor()
        begin(executor, [kit.span("big")], start_ts)
        kit.wait_equal("big", deadline_s=60.0)
        sessions = (
            "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'tablewire%'"
            " AND datname = current_database() ORDER BY 1"
        )
        before = kit.run(sessions), kit.at_sink(sessions)
        kit.run("INSERT INTO big VALUES (0, 'after')")
        settle(kit, "big")
        idle = (
            "SELECT min(clock_timestamp() - state_change) > '300 ms' FROM pg_stat_activity"
            " WHERE application_name LIKE 'tablewire%' AND datname = current_database()"
        )
        wait_until(lambda: kit.at_sink(idle) == [(True,)], "every session at the sink is idle for longer than the timeouts")
        assert (kit.run(sessions), kit.at_sink(sessions)) == before


def failure(kit: Kit, name: str) -> str:
    """Waits until the table has failed; its error."""
    found: list[str] = []

    def has_failed() -> bool:
        try:
            kit.executors[-1].get_table_span_status(kit.span(name), False)
        except OperatingError as error:
            found.append(str(error))
        return bool(found)

    wait_until(has_failed, f"{name} fails")
    return found[0]


def start_again(kit: Kit, name: str) -> None:
    """Removes a failed table and adds it again, as an owner does."""
    span, executor = kit.span(name), kit.executors[-1]
    checkpoint_ts = stop(executor, span)
    begin(executor, [span], max(checkpoint_ts, kit.start_ts))


@contextmanager
def owned_by_a_role(uri: str, *tables: str) -> Iterator[str]:
    """The URI of a role without superuser's rights that owns the tables."""
    name = f"owner_of_{uri.rpartition('/')[2]}"
    with psycopg.connect(uri, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {name} LOGIN REPLICATION".encode())
        connection.execute(
            f"GRANT ALL ON DATABASE {connection.info.dbname} TO {name}; GRANT ALL ON SCHEMA public TO {name}".encode()
        )
        for table in tables:
            connection.execute(f"ALTER TABLE {table} OWNER TO {name}".encode())
        try:
            yield uri.replace("//postgres@", f"//{name}@")
        finally:
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", (name,))
            connection.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}".encode())


def hide_rows(connection: psycopg.Connection[tuple[object, ...]], table: str) -> None:
    connection.execute(f"CREATE POLICY p ON {table} USING (tenant = 5)".encode())
    connection.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY".encode())


def test_rows_that_a_policy_hides_at_the_source_are_an_error(source_db: str, sink_db: str) -> None:
    """A table whose rows a policy hides from its owner is not copied without them: the error says what to do, which works."""
    with psycopg.connect(source_db, autocommit=True) as connection:
        for name in ("t", "visible"):
            connection.execute(f"CREATE TABLE {name} (id int PRIMARY KEY, tenant int)".encode())
            connection.execute(f"INSERT INTO {name} SELECT i, i % 2 FROM generate_series(1, 10) i".encode())
        hide_rows(connection, "t")
    with owned_by_a_role(source_db, "t", "visible") as uri, Kit(source_db, sink_db) as kit:
        kit.source_uri = uri
        start_ts = kit.start()
        begin(kit.executor(), [kit.span("t"), kit.span("visible")], start_ts)
        message = failure(kit, "t")
        assert "public.t" in message
        kit.wait_equal("visible")
        assert kit.at_sink("SELECT count(*) FROM t") == [(0,)]
        assert "ALTER TABLE ... NO FORCE ROW LEVEL SECURITY" in message
        kit.run("ALTER TABLE t NO FORCE ROW LEVEL SECURITY")
        start_again(kit, "t")
        kit.wait_equal("t")


def test_rows_that_a_policy_hides_at_the_sink_are_an_error(source_db: str, sink_db: str) -> None:
    """An update that a policy at the sink would make affect no row is the table's error: what it proposes works."""
    with psycopg.connect(sink_db, autocommit=True) as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY, tenant int)")
    with owned_by_a_role(sink_db, "t") as uri, Kit(source_db, sink_db) as kit:
        kit.sink_uri = uri
        kit.run("CREATE TABLE t (id int PRIMARY KEY, tenant int)")
        kit.run("CREATE TABLE visible (id int PRIMARY KEY, tenant int)")
        kit.run("INSERT INTO t SELECT i, i % 2 FROM generate_series(1, 10) i")
        start_ts = kit.start()
        begin(kit.executor(), [kit.span("t"), kit.span("visible")], start_ts)
        kit.wait_equal("t")
        assert kit.sink_connection is not None
        hide_rows(kit.sink_connection, "t")
        kit.run("UPDATE t SET tenant = 7 WHERE id = 1")
        kit.run("INSERT INTO visible VALUES (1, 1)")
        message = failure(kit, "t")
        assert "row-level security" in message
        assert "without FORCE ROW LEVEL SECURITY" in message
        kit.wait_equal("visible")
        kit.at_sink("ALTER TABLE t NO FORCE ROW LEVEL SECURITY")
        start_again(kit, "t")
        kit.wait_equal("t")


@contextmanager
def database(uri: str, encoding: str) -> Iterator[str]:
    """The URI of another database of the same server with this encoding."""
    name = f"{uri.rpartition('/')[2]}_{encoding.lower()}"
    with psycopg.connect(uri, autocommit=True) as connection:
        locale = "TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
        connection.execute(f"CREATE DATABASE {name} ENCODING '{encoding}' {locale}".encode())
        try:
            yield f"{uri.rpartition('/')[0]}/{name}"
        finally:
            connection.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = %s", (name,)
            )
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.mark.parametrize("copied", [True, False], ids=["copied", "changed"])
def test_a_value_that_is_no_text_is_the_error_of_its_table(source_db: str, sink_db: str, copied: bool) -> None:
    """A source of encoding SQL_ASCII sends what no UTF-8 sink can hold: only that table fails, and its error names it."""
    with database(source_db, "SQL_ASCII") as uri, Kit(uri, sink_db) as kit:
        for name in ("bad", "good"):
            kit.run(f"CREATE TABLE {name} (id int PRIMARY KEY, v text)")
            kit.run(f"INSERT INTO {name} VALUES (1, E'caf\\303\\251')")
        if copied:
            kit.run("INSERT INTO bad VALUES (2, E'caf\\351')")
        start_ts = kit.start()
        begin(kit.executor(), [kit.span("bad"), kit.span("good")], start_ts)
        if not copied:
            wait_until(lambda: kit.at_sink("SELECT v FROM bad") == [("café",)], "the copy")
            kit.run("INSERT INTO bad VALUES (2, E'caf\\351')")
        kit.run("INSERT INTO good VALUES (2, E'\\342\\202\\254')")
        wait_until(lambda: kit.at_sink("SELECT v FROM good ORDER BY id") == [("café",), ("€",)], "the other table")
        message = failure(kit, "bad")
        assert "public.bad" in message
        assert "owner changefeed resync" in message


@pytest.mark.parametrize("binary", ["true", "false"])
def test_databases_without_an_encoding(source_db: str, sink_db: str, binary: str) -> None:
    """Between two databases of encoding SQL_ASCII every byte arrives, by copies, single changes and many, and in keys."""
    with (
        database(source_db, "SQL_ASCII") as source,
        database(sink_db, "SQL_ASCII") as sink,
        Kit(source, sink, options={"binary": binary}) as kit,
    ):
        content = "SELECT count(*), md5(string_agg(md5(k) || md5(v), '' ORDER BY k)) FROM t"
        kit.run("CREATE TABLE t (k text PRIMARY KEY, v varchar(20))")
        kit.run("INSERT INTO t VALUES (E'k\\351', E'caf\\351')")
        start_ts = kit.start()
        begin(kit.executor(), [kit.span("t")], start_ts)
        wait_until(lambda: kit.at_sink(content) == kit.run(content), "the copy")
        kit.run("INSERT INTO t VALUES (E'\\377', E'\\200')")
        kit.run("INSERT INTO t SELECT i || E'\\377', E'\\200\\303' FROM generate_series(1, 99) i")
        kit.run("UPDATE t SET v = E'\\376' WHERE k = E'k\\351'")
        kit.run("DELETE FROM t WHERE k = E'\\377'")
        wait_until(lambda: kit.at_sink(content) == kit.run(content), "every byte")


def test_databases_of_other_encodings(source_db: str, sink_db: str) -> None:
    """Text is converted between LATIN1 and UTF8; what LATIN1 does not have is the error of its table."""
    with database(source_db, "LATIN1") as latin, Kit(latin, sink_db) as kit:
        kit.run("CREATE TABLE t (k text PRIMARY KEY, v text)")
        kit.run("INSERT INTO t VALUES ('ü', 'é')")
        start_ts = kit.start()
        begin(kit.executor(), [kit.span("t")], start_ts)
        kit.run("UPDATE t SET v = 'ß' WHERE k = 'ü'")
        kit.run("INSERT INTO t VALUES ('ä', 'ÿ')")
        settle(kit, "t")
    with database(sink_db, "LATIN1") as latin, Kit(source_db, latin) as kit:
        for name in ("bad", "good"):
            kit.run(f"CREATE TABLE {name} (k text PRIMARY KEY, v text)")
            kit.run(f"INSERT INTO {name} VALUES ('ü', 'é')")
        start_ts = kit.start()
        begin(kit.executor(), [kit.span("bad"), kit.span("good")], start_ts)
        settle(kit, "good")
        kit.run("INSERT INTO bad VALUES ('€', '')")
        kit.run("INSERT INTO good VALUES ('ä', 'ÿ')")
        settle(kit, "good")
        assert "public.bad" in failure(kit, "bad")
