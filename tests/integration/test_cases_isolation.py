"""One bad table is one bad table: the others are listed, copied and written, and the slot advances."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import psycopg
import pytest

from deploy.local.cluster import Cluster
from deploy.local.postgres import PostgresServer
from tests.integration.data_plane import DataPlane, data_plane

pytestmark = pytest.mark.integration

_numbers = count(1)


@pytest.fixture
def role(postgres_server: PostgresServer) -> Iterator[str]:
    """A role that may replicate and owns only what it creates; it is dropped after the databases."""
    name = f"replicator_{next(_numbers)}"
    postgres_server.execute(f"CREATE ROLE {name} LOGIN REPLICATION")
    yield name
    postgres_server.execute(f"DROP ROLE {name}")


@pytest.fixture
def superuser(source_db: str) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    with psycopg.connect(source_db, autocommit=True) as connection:
        yield connection


def allow(superuser: psycopg.Connection[tuple[object, ...]], role: str) -> None:
    """Give a role what a source needs of it."""
    superuser.execute(
        f"GRANT CREATE ON DATABASE {superuser.info.dbname} TO {role}; GRANT ALL ON SCHEMA public TO {role}".encode()
    )


def slot_position(plane: DataPlane) -> int:
    source = plane.kit.source
    assert source is not None
    rows = plane.observer.source.execute(
        "SELECT confirmed_flush_lsn - '0/0'::pg_lsn FROM pg_replication_slots WHERE slot_name = %s", (source._name,)
    ).fetchall()
    return int(str(rows[0][0]))


def assert_goes_on(plane: DataPlane, *names: str, number: int = 1000) -> None:
    """A row of each of these tables arrives, and the slot passes it."""
    for name in names:
        plane.kit.run(f"INSERT INTO {name} VALUES ({number})")
    position = plane._position()
    plane.settle(*names)
    plane.wait_until(lambda: slot_position(plane) >= position, "the slot advances past it")


def test_table_of_another_owner(
    role: str, source_db: str, sink_db: str, superuser: psycopg.Connection[tuple[object, ...]]
) -> None:
    """A table that the role may not publish matches the filter: it says so, and tables that are created later are added."""
    allow(superuser, role)
    with data_plane(source_db.replace("postgres@", f"{role}@"), sink_db) as plane:
        plane.kit.run("CREATE TABLE a (id int PRIMARY KEY)")
        plane.start()
        superuser.execute("CREATE TABLE m_foreign (id int PRIMARY KEY)")
        plane.kit.run("CREATE TABLE z (id int PRIMARY KEY)")
        assert_goes_on(plane, "a", "z")
        superuser.execute(f"ALTER TABLE m_foreign OWNER TO {role}".encode())
        assert_goes_on(plane, "m_foreign")


def test_table_of_another_owner_is_there_from_the_start(
    role: str, source_db: str, sink_db: str, superuser: psycopg.Connection[tuple[object, ...]]
) -> None:
    """The changefeed starts without it."""
    allow(superuser, role)
    superuser.execute("CREATE TABLE m_foreign (id int PRIMARY KEY)")
    with data_plane(source_db.replace("postgres@", f"{role}@"), sink_db) as plane:
        plane.kit.run("CREATE TABLE a (id int PRIMARY KEY)")
        plane.start()
        assert_goes_on(plane, "a")


@pytest.mark.parametrize("mode", ["SHARE UPDATE EXCLUSIVE", "EXCLUSIVE"])
def test_new_table_that_is_locked(source_db: str, sink_db: str, mode: str) -> None:
    """A table that another session holds is added when it can be; the others are not delayed."""
    with data_plane(source_db, sink_db) as plane, psycopg.connect(source_db) as session:
        plane.kit.run("CREATE TABLE a (id int PRIMARY KEY)")
        plane.start()
        plane.kit.run("CREATE TABLE m_locked (id int PRIMARY KEY)")
        session.execute(f"LOCK TABLE m_locked IN {mode} MODE".encode())
        plane.kit.run("CREATE TABLE z (id int PRIMARY KEY)")
        assert_goes_on(plane, "a", "z")
        session.rollback()
        assert_goes_on(plane, "m_locked", "a", number=2000)


def test_new_table_that_is_being_altered(source_db: str, sink_db: str) -> None:
    """A transaction with changes of its own delays first copies, not the tables that are copied already."""
    with data_plane(source_db, sink_db) as plane, psycopg.connect(source_db) as session:
        plane.kit.run("CREATE TABLE a (id int PRIMARY KEY)")
        plane.start()
        plane.settle("a")
        plane.kit.run("CREATE TABLE m_locked (id int PRIMARY KEY)")
        session.execute("ALTER TABLE m_locked ADD COLUMN v int")
        plane.kit.run("CREATE TABLE z (id int PRIMARY KEY)")
        plane.kit.run("INSERT INTO a VALUES (1000)")
        plane.settle("a")
        session.rollback()
        assert_goes_on(plane, "m_locked", "z", "a", number=2000)


def test_table_that_is_locked_at_the_sink(source_db: str, sink_db: str) -> None:
    """Its rows wait; those of other tables do not."""
    with data_plane(source_db, sink_db, options={"statement_timeout_ms": "2000"}) as plane, psycopg.connect(sink_db) as session:
        plane.kit.run("CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE z (id int PRIMARY KEY)")
        plane.start()
        plane.settle("a", "z")
        session.execute("LOCK TABLE z IN ACCESS EXCLUSIVE MODE")
        plane.kit.run("INSERT INTO z VALUES (1)")
        plane.kit.run("INSERT INTO a VALUES (1)")
        plane.settle("a")
        session.rollback()
        plane.settle("z")


@pytest.mark.parametrize(
    ("bad", "remedy"),
    [
        ("CREATE TYPE odd AS ENUM ('a'); CREATE TABLE m_bad (id int PRIMARY KEY, v odd)", "sink: CREATE TYPE odd AS ENUM ('a')"),
        ("CREATE TABLE m_bad (id int)", "ALTER TABLE m_bad ADD PRIMARY KEY (id)"),
        ("CREATE TABLE m_bad (id int PRIMARY KEY); ALTER TABLE m_bad REPLICA IDENTITY NOTHING",
         "ALTER TABLE m_bad REPLICA IDENTITY DEFAULT"),
    ],
    ids=["type is missing", "no key", "identity nothing"],
)  # fmt: skip
def test_new_table_that_cannot_be_replicated(source_db: str, sink_db: str, bad: str, remedy: str) -> None:
    """It shows its error and is replicated when that is repaired; the others go on at once."""
    with data_plane(source_db, sink_db) as plane:
        kit = plane.kit
        kit.run("CREATE TABLE a (id int PRIMARY KEY)")
        plane.start()
        kit.run(bad)
        kit.run("CREATE TABLE z (id int PRIMARY KEY)")
        for name in ("a", "z", "m_bad"):
            kit.run(f"INSERT INTO {name} VALUES (1)")
        plane.settle("a", "z")
        plane.wait_error("m_bad", "m_bad|odd")
        (kit.at_sink if remedy.startswith("sink: ") else kit.run)(remedy.removeprefix("sink: "))
        plane.settle("m_bad", "a", "z")


def test_value_that_the_sink_refuses(source_db: str, sink_db: str) -> None:
    """A constraint of the sink stops its table only, and the table continues when the constraint is gone."""
    with data_plane(source_db, sink_db) as plane:
        kit = plane.kit
        kit.run("CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY)")
        plane.start()
        plane.settle("a", "b")
        kit.at_sink("ALTER TABLE b ADD CONSTRAINT small CHECK (id < 10)")
        kit.run("BEGIN; INSERT INTO a VALUES (20); INSERT INTO b VALUES (20); COMMIT")
        plane.settle("a")
        plane.wait_error("b", "small")
        kit.at_sink("ALTER TABLE b DROP CONSTRAINT small")
        plane.settle("a", "b")


def test_checkpoint_passes_a_table_that_cannot_be_replicated(tmp_path: Path, source_db: str, sink_db: str) -> None:
    """A table without a key appears in a running changefeed: the others' rows arrive, and the slot follows them."""
    with (
        psycopg.connect(source_db, autocommit=True) as source,
        Cluster(
            tmp_path, etcd=1, owners=1, processors=1, links=False, owner_config={"source": {"poll_interval_ms": 200}}
        ) as cluster,
    ):
        source.execute("CREATE TABLE a (id int PRIMARY KEY)")
        cluster.owner_json(
            "changefeed", "create", "--id", "one", "--source", source_db, "--sink", sink_db, "--tables", "public.*"
        )
        cluster.wait_replicating("one", tables=1)
        source.execute("CREATE TABLE m_keyless (id int)")
        source.execute("INSERT INTO m_keyless VALUES (1)")
        source.execute("CREATE TABLE z (id int PRIMARY KEY)")
        source.execute("INSERT INTO z VALUES (1)")
        row = source.execute("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn").fetchone()
        assert row is not None

        def slot_has_passed() -> bool:
            found = source.execute(
                "SELECT confirmed_flush_lsn - '0/0'::pg_lsn >= %s FROM pg_replication_slots WHERE slot_name = 'tablewire_one'",
                row,
            ).fetchone()
            return found is not None and bool(found[0])

        cluster.wait("the slot has passed the other tables' rows", slot_has_passed, 30.0)
