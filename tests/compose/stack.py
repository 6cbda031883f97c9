"""The cluster of deploy/compose.yaml on a separate engine, operated with docker-compose, docker and the owner CLI in a container.

Methods that only read (captures, tables, checkpoints) call the admin API over the containers' bridge.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psycopg

from deploy.local.admin import Admin, AdminError, Json
from tests.compose.engine import CommandError, Engine, run
from tests.compose.images import BASE, ROOT

COMPOSE_FILE = ROOT / "deploy/compose.yaml"
OVERRIDE_FILE = Path(__file__).resolve().parent / "override.yaml"
MAKE_SECRETS = ROOT / "deploy/compose/make-secrets.sh"
PROJECT = "tablewire-test"
COMPOSE_TIMEOUT_S = 240.0
WAIT_TIMEOUT_S = 90.0
POLL_INTERVAL_S = 0.1
LEASE_TTL_S = 10.0
"""The value in compose.yaml, which the test does not change."""

LOG_LINES = 12
"""Of each container, in the report of a failure."""

Container = dict[str, Any]


class Stack:
    """The cluster as a docker-compose project. Not thread-safe."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.secrets_folder = engine.folder / "secrets"
        self.secrets_folder.mkdir()
        self.environment = {
            **engine.environment,
            "COMPOSE_PROJECT_NAME": PROJECT,
            "SECRETS_DIR": str(self.secrets_folder),
            "BASE_IMAGE": BASE,
            "TEST_BRIDGE": engine.bridge,
        }
        run([str(MAKE_SECRETS), str(self.secrets_folder)], environment=self.environment, timeout_s=30.0)

    # -- docker-compose ------------------------------------------------------------------------------------------------

    def compose(self, *arguments: str, timeout_s: float = COMPOSE_TIMEOUT_S, override: bool = True) -> str:
        """Run docker-compose on the shipped file, by default with the test's override, and return its standard output."""
        files = ["--file", str(COMPOSE_FILE), *(["--file", str(OVERRIDE_FILE)] if override else [])]
        command = ["docker-compose", "--ansi", "never", *files, *arguments]
        return run(command, environment=self.environment, timeout_s=timeout_s, cwd=ROOT)

    def up(self, *arguments: str) -> None:
        """Run `up --detach` without building."""
        self.compose("up", "--detach", "--no-build", *arguments)

    def owner(self, *arguments: str) -> Json:
        """Run `owner ARGUMENTS -o json` in a new container of the service `cli` and return its output."""
        output = self.compose("run", "--rm", "-T", "cli", "owner", *arguments, "-o", "json")
        result: Json = json.loads(output.splitlines()[-1])
        return result

    def owner_exec(self, *arguments: str) -> Json:
        """Run `owner ARGUMENTS -o json` in a running owner container, which is faster."""
        container = self.containers("owner")[0]["Id"]
        output = self.engine.docker("exec", container, "owner", *arguments, "-o", "json")
        result: Json = json.loads(output.splitlines()[-1])
        return result

    # -- containers ----------------------------------------------------------------------------------------------------

    def containers(self, service: str, *, stopped: bool = False) -> list[Container]:
        """Return `docker inspect` of the containers of a service, ordered by their number."""
        labels = (f"com.docker.compose.project={PROJECT}", f"com.docker.compose.service={service}")
        filters = [word for label in labels for word in ("--filter", f"label={label}")]
        ids = self.engine.docker("ps", "--quiet", "--no-trunc", *(["--all"] if stopped else []), *filters).split()
        return sorted(self.engine.inspect(*ids), key=lambda found: int(found["Config"]["Labels"][_NUMBER]))

    def container_of(self, capture: str) -> Container:
        """Return the container of a capture or an owner, whose ids start with those of their containers."""
        found = [c for service in ("processor", "owner") for c in self.containers(service) if capture.startswith(c["Id"][:12])]
        assert len(found) == 1, f"{capture} is in {len(found)} containers"
        return found[0]

    def leader(self) -> Container:
        """Return the container of the leader."""
        address = self.admin().status()["leader"]["address"]
        return self.container_of(address.partition(":")[0])

    def address(self, service: str) -> str:
        """Return the network address of the first running container of a service."""
        return _address(self.containers(service)[0])

    def wait_healthy(self, services: Sequence[str], timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Wait until docker reports every container of these services as healthy."""

        def healthy() -> bool:
            found = [container for service in services for container in self.containers(service)]
            return bool(found) and all(c["State"].get("Health", {}).get("Status") == "healthy" for c in found)

        self.wait(f"{', '.join(services)} are healthy", healthy, timeout_s)

    def logs(self, container: Container) -> list[Json]:
        """Return the events of a service's log."""
        lines = self.engine.docker("logs", container["Id"]).splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def describe(self) -> str:
        """Return the state and the last output of every container."""
        try:
            ids = self.engine.docker("ps", "--all", "--quiet").split()
            parts = []
            for container in self.engine.inspect(*ids):
                state = container["State"]
                health = state.get("Health", {})
                output = [entry["Output"].strip() for entry in health.get("Log", [])[-1:]]
                parts.append(f"{container['Name']}: {state['Status']} {state['ExitCode']} {health.get('Status', '')} {output}")
                parts.append(self._last_output(container))
            return "\n".join(parts)
        except CommandError as error:
            return str(error)

    def _last_output(self, container: Container) -> str:
        command = ["sh", "-c", 'docker logs --tail "$1" "$2" 2>&1', "sh", str(LOG_LINES), container["Id"]]
        return run(command, environment=self.environment, timeout_s=30.0)

    # -- the cluster ------------------------------------------------------------------------------------------------

    def admin(self) -> Admin:
        """Return a client for all owners that run now."""
        return Admin([f"{_address(container)}:7440" for container in self.containers("owner")])

    def call(self, method: Callable[[Admin], Any]) -> Any:
        """Make one call of the admin API."""
        admin = self.admin()
        try:
            return method(admin)
        finally:
            admin.close()

    def captures(self) -> list[str]:
        """Return the ids of the captures that answer their owner."""
        return sorted(row["id"] for row in self.call(Admin.captures) if row["state"] in ("ready", "idle"))

    def tables(self, changefeed: str) -> list[Json]:
        rows: list[Json] = self.call(lambda admin: admin.tables(changefeed))
        return rows

    def checkpoint(self, changefeed: str) -> int:
        return int(self.call(lambda admin: admin.changefeed(changefeed))["checkpoint_ts"])

    def wait(self, what: str, condition: Callable[[], object], timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Wait until condition() is true, ignoring unreachable owners. Raises TimeoutError that names `what`."""
        deadline = time.monotonic() + timeout_s
        last = ""
        while True:
            try:
                if condition():
                    return
            except AdminError as error:
                last = f" ({error})"
            if time.monotonic() >= deadline:
                raise TimeoutError(f"timed out after {timeout_s:g} s: {what}{last}")
            _pause.wait(POLL_INTERVAL_S)

    def wait_replicating(self, changefeed: str, *, tables: int, without: str = "", timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Wait until that many tables have a writer that answers and is not `without`."""

        def steady() -> bool:
            alive = {capture for capture in self.captures() if capture != without}
            rows = self.tables(changefeed)
            steady_rows = [row for row in rows if row["state"] == "replicating" and row["primary"] in alive]
            return len(rows) == len(steady_rows) == tables and not any(row["stall_reason"] for row in rows)

        self.wait(f"{tables} tables of {changefeed} replicate", steady, timeout_s)

    def wait_progress(self, changefeed: str, timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Wait until the checkpoint reaches the current position of the source."""
        self.wait_checkpoint(changefeed, self.source_ts(), timeout_s)

    def wait_checkpoint(self, changefeed: str, ts: int, timeout_s: float = WAIT_TIMEOUT_S) -> None:
        self.wait(f"the checkpoint of {changefeed} reaches {ts}", lambda: self.checkpoint(changefeed) >= ts, timeout_s)

    # -- the databases -------------------------------------------------------------------------------------------------

    def uri(self, service: str) -> str:
        """Return the URI of the superuser, as seen from this machine."""
        secrets = dict(line.split("=", 1) for line in (self.secrets_folder / f"{service}.env").read_text().split())
        return f"postgresql://postgres:{secrets['POSTGRES_PASSWORD']}@{self.address(service)}/shop"

    def source_ts(self) -> int:
        """Return the current WAL position of the source as a Ts."""
        with psycopg.connect(self.uri("source"), autocommit=True, connect_timeout=10) as connection:
            row = connection.execute("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn").fetchone()
        assert row is not None
        return int(row[0])

    def kill_process(self, container: Container) -> None:
        """Send SIGKILL to the service itself, as the kernel does when memory is short, not with `docker kill`."""
        os.kill(int(container["State"]["Pid"]), signal.SIGKILL)


_NUMBER = "com.docker.compose.container-number"
_pause = threading.Event()


def _address(container: Container) -> str:
    (network,) = container["NetworkSettings"]["Networks"].values()
    return str(network["IPAddress"])
