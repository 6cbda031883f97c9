"""Standbys and older copies of a PostgreSQL server, for tests of failovers and restores."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from deploy.local.postgres import PostgresServer
from deploy.local.process import launch_command, wait_until

WAIT_S = 30.0


def data_folder(server: PostgresServer) -> Path:
    """Where a server that has been started keeps its data."""
    assert server._home is not None
    return server._home.base / "data"


def new_standby(primary: PostgresServer, folder: Path, name: str = "standby", **settings: str) -> PostgresServer:
    """A physical standby that streams from the primary; it is running and has caught up."""
    home = primary._home
    assert home is not None
    standby = PostgresServer(folder, name=name, settings={**primary.settings, **settings})
    standby.folder.mkdir(parents=True)
    target = standby.folder / "data"
    conninfo = f"host={primary.host} port={primary.port} user=postgres dbname=postgres"
    arguments = ["-D", str(target), "-d", conninfo, "-X", "stream", "-c", "fast", "-R", "--no-sync"]
    command = launch_command(home.mode, standby.folder, [str(home.bin_folder / "pg_basebackup"), *arguments])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
    subprocess.run(command, check=True, capture_output=True, timeout=120, cwd="/", env=environment)
    standby.start()
    wait_caught_up(primary)
    return standby


def wait_caught_up(primary: PostgresServer) -> None:
    """All WAL of the primary has been replayed by its standby."""
    caught_up = (
        "SELECT 1 FROM pg_stat_replication WHERE replay_lsn >= pg_current_wal_lsn() AND pid NOT IN"
        " (SELECT active_pid FROM pg_replication_slots WHERE slot_type = 'logical' AND active)"
    )
    wait_until("the standby has caught up", lambda: primary.execute(caught_up), WAIT_S)


def promote(standby: PostgresServer) -> None:
    standby.execute("SELECT pg_promote()")
    wait_until("it is promoted", lambda: standby.execute("SELECT pg_is_in_recovery()") == [(False,)], WAIT_S)


def move_to(server: PostgresServer, former: PostgresServer) -> None:
    """Start a server that is stopped at the address of another one that is stopped."""
    server.stop()
    former.stop()
    server._port = former.port
    server.start()


def save_data(server: PostgresServer, folder: Path) -> None:
    """Copy the data of a server that is stopped."""
    shutil.copytree(data_folder(server), folder, symlinks=True)


def restore_data(server: PostgresServer, folder: Path) -> None:
    """Replace the data of a server that is stopped."""
    shutil.rmtree(data_folder(server))
    shutil.copytree(folder, data_folder(server), symlinks=True)
