"""The cluster of deploy/compose.yaml on an engine of the test's own, driven as an operator drives it: by docker-compose, docker
and the owner CLI in a container. What only looks (captures, tables, checkpoints) asks the admin API over the containers' bridge.
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
"""What compose.yaml sets; the test leaves it there."""

LOG_LINES = 12
"""Of each container, beside a failure."""

Container = dict[str, Any]


class Stack:
    """`up` it, use it, `down` it. One thread."""

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
        """The standard output of docker-compose on the shipped file, with the test's override unless told otherwise."""
        files = ["--file", str(COMPOSE_FILE), *(["--file", str(OVERRIDE_FILE)] if override else [])]
        command = ["docker-compose", "--ansi", "never", *files, *arguments]
        return run(command, environment=self.environment, timeout_s=timeout_s, cwd=ROOT)

    def up(self, *arguments: str) -> None:
        """`up --detach`, never building or pulling."""
        self.compose("up", "--detach", "--no-build", *arguments)

    def owner(self, *arguments: str) -> Json:
        """What `owner ARGUMENTS -o json` answers in a container of the service `cli`."""
        said = self.compose("run", "--rm", "-T", "cli", "owner", *arguments, "-o", "json")
        answer: Json = json.loads(said.splitlines()[-1])
        return answer

    def owner_exec(self, *arguments: str) -> Json:
        """The same in a container that runs already: `docker exec OWNER owner ARGUMENTS`. Quicker."""
        container = self.containers("owner")[0]["Id"]
        said = self.engine.docker("exec", container, "owner", *arguments, "-o", "json")
        answer: Json = json.loads(said.splitlines()[-1])
        return answer

    # -- containers ----------------------------------------------------------------------------------------------------

    def containers(self, service: str, *, stopped: bool = False) -> list[Container]:
        """What docker tells about the containers of a service, by their numbers."""
        labels = (f"com.docker.compose.project={PROJECT}", f"com.docker.compose.service={service}")
        filters = [word for label in labels for word in ("--filter", f"label={label}")]
        ids = self.engine.docker("ps", "--quiet", "--no-trunc", *(["--all"] if stopped else []), *filters).split()
        return sorted(self.engine.inspect(*ids), key=lambda found: int(found["Config"]["Labels"][_NUMBER]))

    def container_of(self, capture: str) -> Container:
        """The container of a capture or an owner: ids begin with the host name, which is how the container's id begins."""
        found = [c for service in ("processor", "owner") for c in self.containers(service) if capture.startswith(c["Id"][:12])]
        assert len(found) == 1, f"{capture} is in {len(found)} containers"
        return found[0]

    def leader(self) -> Container:
        """The container of the owner that leads."""
        address = self.admin().status()["leader"]["address"]
        return self.container_of(address.partition(":")[0])

    def address(self, service: str) -> str:
        """The address of the first running container of a service on the cluster's network."""
        return _address(self.containers(service)[0])

    def wait_healthy(self, services: Sequence[str], timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Until docker calls every container of these services healthy."""

        def healthy() -> bool:
            found = [container for service in services for container in self.containers(service)]
            return bool(found) and all(c["State"].get("Health", {}).get("Status") == "healthy" for c in found)

        self.wait(f"{', '.join(services)} are healthy", healthy, timeout_s)

    def logs(self, container: Container) -> list[Json]:
        """The events of a service's log."""
        lines = self.engine.docker("logs", container["Id"]).splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def describe(self) -> str:
        """State and last words of every container."""
        try:
            ids = self.engine.docker("ps", "--all", "--quiet").split()
            parts = []
            for container in self.engine.inspect(*ids):
                state = container["State"]
                health = state.get("Health", {})
                said = [entry["Output"].strip() for entry in health.get("Log", [])[-1:]]
                parts.append(f"{container['Name']}: {state['Status']} {state['ExitCode']} {health.get('Status', '')} {said}")
                parts.append(self._last_words(container))
            return "\n".join(parts)
        except CommandError as error:
            return str(error)

    def _last_words(self, container: Container) -> str:
        command = ["sh", "-c", 'docker logs --tail "$1" "$2" 2>&1', "sh", str(LOG_LINES), container["Id"]]
        return run(command, environment=self.environment, timeout_s=30.0)

    # -- what the cluster says -----------------------------------------------------------------------------------------

    def admin(self) -> Admin:
        """Of all owners that run now."""
        return Admin([f"{_address(container)}:7440" for container in self.containers("owner")])

    def ask(self, question: Callable[[Admin], Any]) -> Any:
        """One answer of the admin API."""
        admin = self.admin()
        try:
            return question(admin)
        finally:
            admin.close()

    def captures(self) -> list[str]:
        """Ids of the captures that answer their owner."""
        return sorted(row["id"] for row in self.ask(Admin.captures) if row["state"] in ("ready", "idle"))

    def tables(self, changefeed: str) -> list[Json]:
        rows: list[Json] = self.ask(lambda admin: admin.tables(changefeed))
        return rows

    def checkpoint(self, changefeed: str) -> int:
        return int(self.ask(lambda admin: admin.changefeed(changefeed))["checkpoint_ts"])

    def wait(self, what: str, condition: Callable[[], object], timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Until condition() is true; that no owner answers counts as not yet. TimeoutError that names `what`."""
        deadline = time.monotonic() + timeout_s
        last = ""
        while True:
            try:
                if condition():
                    return
            except AdminError as error:
                last = f" ({error})"
            if time.monotonic() >= deadline:
                raise TimeoutError(f"not within {timeout_s:g} s: {what}{last}")
            _pause.wait(POLL_INTERVAL_S)

    def wait_replicating(self, changefeed: str, *, tables: int, without: str = "", timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Until so many tables have a writer that answers, none of them `without`."""

        def steady() -> bool:
            alive = {capture for capture in self.captures() if capture != without}
            rows = self.tables(changefeed)
            steady_rows = [row for row in rows if row["state"] == "replicating" and row["primary"] in alive]
            return len(rows) == len(steady_rows) == tables and not any(row["stall_reason"] for row in rows)

        self.wait(f"{tables} tables of {changefeed} replicate", steady, timeout_s)

    def wait_progress(self, changefeed: str, timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Until the checkpoint has moved on from where the source is now."""
        self.wait_checkpoint(changefeed, self.source_ts(), timeout_s)

    def wait_checkpoint(self, changefeed: str, ts: int, timeout_s: float = WAIT_TIMEOUT_S) -> None:
        self.wait(f"the checkpoint of {changefeed} reaches {ts}", lambda: self.checkpoint(changefeed) >= ts, timeout_s)

    # -- the databases -------------------------------------------------------------------------------------------------

    def uri(self, service: str) -> str:
        """Of the superuser, as this machine reaches the container."""
        secrets = dict(line.split("=", 1) for line in (self.secrets_folder / f"{service}.env").read_text().split())
        return f"postgresql://postgres:{secrets['POSTGRES_PASSWORD']}@{self.address(service)}/shop"

    def source_ts(self) -> int:
        """Where the source's WAL is now, as a Ts."""
        with psycopg.connect(self.uri("source"), autocommit=True, connect_timeout=10) as connection:
            row = connection.execute("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn").fetchone()
        assert row is not None
        return int(row[0])

    def kill_process(self, container: Container) -> None:
        """SIGKILL to the service itself, as the kernel does it when memory is short; not by `docker kill`."""
        os.kill(int(container["State"]["Pid"]), signal.SIGKILL)


_NUMBER = "com.docker.compose.container-number"
_pause = threading.Event()


def _address(container: Container) -> str:
    (network,) = container["NetworkSettings"]["Networks"].values()
    return str(network["IPAddress"])
