"""The servers of a process, and databases that are empty at the beginning of each case."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from pathlib import Path

import psycopg
import structlog

from deploy.local.postgres import PostgresServer
from tests.random_tables.case import Case, Result
from tests.random_tables.generator import Scope, generate
from tests.random_tables.runner import Databases, run_case

SETTINGS = {"fsync": "off", "autovacuum": "off", "shared_buffers": "64MB", "log_min_messages": "fatal"}
CASES_A_DATABASE = 25
"""Catalogues grow with each case, so the databases are replaced."""
_EMPTY = """
DO $$DECLARE n text; BEGIN
  FOR n IN SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema' LOOP
    EXECUTE format('DROP SCHEMA %I CASCADE', n);
  END LOOP;
END$$;
CREATE SCHEMA public"""


class World:
    """One PostgreSQL server with a source and a sink database."""

    def __init__(self, server: PostgresServer) -> None:
        self._server = server
        self._number = 0
        self._cases = 0
        self._names: tuple[str, str] | None = None

    def run(self, case: Case) -> Result:
        return run_case(case, self._databases())

    def _databases(self) -> Databases:
        if self._names is not None and self._cases % CASES_A_DATABASE == 0:
            self.close()
        self._cases += 1
        if self._names is None:
            self._number += 1
            self._names = f"source_{os.getpid()}_{self._number}", f"sink_{os.getpid()}_{self._number}"
            return Databases(*map(self._server.create_database, self._names))
        found = Databases(*map(self._server.uri, self._names))
        for uri in (found.sink, found.source):
            self._clean(uri)
        return found

    def _clean(self, uri: str) -> None:
        with psycopg.connect(uri, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            connection.execute(_EMPTY)

    def close(self) -> None:
        for name in self._names or ():
            self._server.drop_database(name)
        self._names = None


_world: World | None = None


def start_worker(folder: Path) -> None:
    """Start the server of this process."""
    global _world
    quiet()
    server = PostgresServer(folder, name=f"postgres{os.getpid()}", settings=SETTINGS)
    server.start()
    atexit.register(server.close)
    _world = World(server)


def run_seed(seed: int, scope: Scope) -> Result:
    assert _world is not None
    result = _world.run(generate(seed, scope))
    if not result.kind:
        result.trace, result.kept = [], ()
    return result


def run_here(case: Case) -> Result:
    assert _world is not None
    return _world.run(case)


def quiet() -> None:
    """Log to stderr, severe events only."""
    level = logging.getLevelName(os.environ.get("RANDOM_TABLES_LOG", "CRITICAL"))
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(level), logger_factory=structlog.PrintLoggerFactory(sys.stderr)
    )
