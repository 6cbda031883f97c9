"""An owner or processor process of a local cluster: its configuration, addresses and log."""

from __future__ import annotations

import http.client
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deploy.local.net import BindLostError, free_port, retry_bind, wait_answering
from deploy.local.process import ManagedProcess, StartError
from deploy.local.server import Server
from tablewire.runtime.addresses import parse_address

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 60.0
TERMINATE_TIMEOUT_S = 60.0
_HTTP_TIMEOUT_S = 2.0

OWNER, PROCESSOR = "owner", "processor"
_SERVICE_SECTION = {OWNER: "admin", PROCESSOR: "exchange"}


class Node(Server):
    """An owner or processor process. Each start writes its configuration from `config`, which may
    be changed in between.

    config: nested tables of the service's TOML. address: host:port that the service binds. It
    changes only if the very first start loses the port to another process; `on_address` is then
    called with the new one. advertised: the address that others dial; a proxy's, or the same.
    """

    def __init__(
        self, name: str, kind: str, folder: Path, host: str, config: Mapping[str, Any], environment: Mapping[str, str]
    ) -> None:
        super().__init__(folder, name, host, f"{name}.log")
        self.kind = kind
        self.config_file = self.folder / f"{kind}.toml"
        self.config = _copied(config)
        self.address, self.http_address = self._free_addresses()
        self.advertised = self.address
        self.on_address: Callable[[str], None] = lambda _address: None
        self._been_ready = False
        command = [sys.executable, "-m", kind, "serve", "--config", str(self.config_file)]
        self._process = ManagedProcess(name, command, log=self.log, env=service_environment(environment), cwd=ROOT)

    def start(self) -> None:
        """Start it and return at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config_file.write_text(to_toml(self._whole_config()), encoding="utf-8")
        self.process.start()

    def stop(self, timeout_s: float = TERMINATE_TIMEOUT_S) -> None:
        """Send SIGTERM and wait until it has ended. Raises TimeoutError when it does not end."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout_s)

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until /readyz answers 200. Raises StartError with the end of its log when it does not."""

        def wait_once() -> None:
            try:
                wait_answering(self.process, self.ready, timeout_s)
            except BindLostError as error:
                if self._been_ready:  # others know its address
                    raise StartError(str(error)) from None
                self._restart_elsewhere()
                raise
            self._been_ready = True

        retry_bind(wait_once)

    def ready(self) -> bool:
        """Return whether /readyz answers 200. Never raises; waits at most 2 s."""
        try:
            return self._get("/readyz")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def metrics(self) -> str:
        """Return the text of /metrics. Raises OSError when it is unreachable."""
        return self._get("/metrics")[1]

    def _get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(self.http_address, timeout=_HTTP_TIMEOUT_S)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode("utf-8")
        finally:
            connection.close()

    def _restart_elsewhere(self) -> None:
        proxied = self.advertised != self.address
        self.address, self.http_address = self._free_addresses()
        if not proxied:
            self.advertised = self.address
        self.on_address(self.address)
        self.start()

    def _free_addresses(self) -> tuple[str, str]:
        return f"{self.host}:{free_port(self.host)}", f"{self.host}:{free_port(self.host)}"

    def _whole_config(self) -> dict[str, Any]:
        whole = _copied(self.config)
        host, port = parse_address(self.address)
        http_host, http_port = parse_address(self.http_address)
        service = whole.setdefault(_SERVICE_SECTION[self.kind], {})
        service.update(host=host, port=port)
        if self.advertised != self.address:
            service["advertise"] = self.advertised
        whole.setdefault("http", {}).update(host=http_host, port=http_port)
        return whole


def _copied(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}


def service_environment(more: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with the project importable, without PG* and without
    TABLEWIRE_*.

    TABLEWIRE_* variables set keys of a service and would win over its configuration file.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TABLEWIRE_", "PG"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return {**kept, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **more}


def to_toml(table: Mapping[str, Any], prefix: str = "") -> str:
    """Return nested tables of strings, numbers, booleans and lists as TOML. JSON literals are valid TOML."""
    plain = [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
    text = "\n".join(plain) + "\n"
    for key, value in table.items():
        if isinstance(value, Mapping):
            text += f"\n[{prefix}{key}]\n" + to_toml(value, f"{prefix}{key}.")
    return text
