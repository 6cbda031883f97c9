"""Fixtures of all tests: real servers, one a session, and fresh databases, one a test."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from deploy.local import net
from deploy.local.etcd import EtcdServer
from deploy.local.postgres import PostgresServer

_numbers = itertools.count(1)


def _skips_are_failures() -> bool:
    return os.environ.get("CI", "").lower() in {"1", "true"}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a skipped test is a failed one: whatever it lacks, .ci/run has to bring."""
    report = yield
    if report.skipped and _skips_are_failures() and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which fails in CI: {item.nodeid}: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a module that skips itself while it is imported."""
    report = yield
    if report.skipped and _skips_are_failures():
        report.outcome = "failed"
        report.longrepr = f"skipped, which fails in CI: {collector.nodeid}: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def server_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the session's servers keep their data and logs."""
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def etcd_server(server_folder: Path) -> Iterator[EtcdServer]:
    """One etcd member for the whole session; a test keeps its keys below a prefix of its own (see `etcd_prefix`)."""
    with EtcdServer(server_folder) as server:
        yield server


@pytest.fixture
def etcd_prefix() -> str:
    """A key prefix that no other test has."""
    return f"/test/{os.getpid()}/{next(_numbers)}"


@pytest.fixture(scope="session")
def postgres_server(server_folder: Path) -> Iterator[PostgresServer]:
    """One PostgreSQL for the whole session, `wal_level=logical`; durability as PostgreSQL has it."""
    with PostgresServer(server_folder) as server:
        yield server


def _fresh_database(server: PostgresServer, kind: str) -> Iterator[str]:
    name = f"{kind}_{os.getpid()}_{next(_numbers)}"
    yield server.create_database(name)
    server.drop_database(name)


@pytest.fixture
def source_db(postgres_server: PostgresServer) -> Iterator[str]:
    """The URI of an empty database, dropped at the end with its replication slots and connections."""
    yield from _fresh_database(postgres_server, "source")


@pytest.fixture
def sink_db(postgres_server: PostgresServer) -> Iterator[str]:
    """As `source_db`, another one."""
    yield from _fresh_database(postgres_server, "sink")


@pytest.fixture
def new_postgres(tmp_path: Path) -> Iterator[Callable[..., PostgresServer]]:
    """Starts a PostgreSQL of the test's own: `new_postgres(name=..., settings=...)`; for tests that kill or pause it."""
    servers: list[PostgresServer] = []

    def start(**options: object) -> PostgresServer:
        server = PostgresServer(tmp_path, **{"name": f"postgres{len(servers)}", **options})  # type: ignore[arg-type]
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def new_etcd(tmp_path: Path) -> Iterator[Callable[..., EtcdServer]]:
    """Starts an etcd member of the test's own: `new_etcd(settings=...)`; for tests that kill or pause it."""
    servers: list[EtcdServer] = []

    def start(**options: object) -> EtcdServer:
        server = EtcdServer(tmp_path, **{"name": f"etcd{len(servers)}", **options})  # type: ignore[arg-type]
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that no process listens on now."""
    return net.free_port()
