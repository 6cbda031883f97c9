"""One owner or processor process of a local cluster: its configuration, its addresses, its log."""

from __future__ import annotations

import http.client
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deploy.local.net import BindLostError, free_port, retry_bind
from deploy.local.process import ManagedProcess, StartError, tail, wait_until

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 60.0
TERMINATE_TIMEOUT_S = 60.0
_HTTP_TIMEOUT_S = 2.0

OWNER, PROCESSOR = "owner", "processor"
_SERVICE_SECTION = {OWNER: "admin", PROCESSOR: "exchange"}


class Node:
    """Started by `start`; every start writes its configuration anew from `config`, which may be changed in between.

    config: nested tables of the service's TOML. address: host:port that the service binds; where the very first start loses
    its bind to a server of somebody else, the next try has other ports, and `on_address` is told. advertised: what others
    dial, a proxy's or the same.
    """

    def __init__(
        self, name: str, kind: str, folder: Path, host: str, config: Mapping[str, Any], environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self.kind = kind
        self.host = host
        self.folder = folder / name
        self.config = {section: dict(value) if isinstance(value, Mapping) else value for section, value in config.items()}
        self.address, self.http_address = self._free_addresses()
        self.advertised = self.address
        self.on_address: Callable[[str], None] = lambda _address: None
        self._been_ready = False
        self.process = ManagedProcess(
            name,
            [sys.executable, "-m", kind, "serve", "--config", str(self.config_file)],
            log=self.log,
            env=service_environment(environment),
            cwd=ROOT,
        )

    @property
    def config_file(self) -> Path:
        return self.folder / f"{self.kind}.toml"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def start(self) -> None:
        """Start it; does not wait."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config_file.write_text(to_toml(self._whole_config()), encoding="utf-8")
        self.process.start()

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Until /readyz answers 200; StartError with the end of its log when it ends before or does not in time."""
        retry_bind(lambda: self._wait_once(timeout_s))

    def _wait_once(self, timeout_s: float) -> None:
        """BindLostError: the first start lost a port, and the next one is under way on others."""
        try:
            wait_until(f"{self.name} is ready", lambda: not self.process.running or self.ready(), timeout_s)
        except TimeoutError as error:
            raise StartError(f"{error}\n{tail(self.log)}") from None
        if self.process.running:
            self._been_ready = True
            return
        text = tail(self.log)
        reason = f"{self.name} ended with {self.process.exit_code}\n{text}"
        if self._been_ready or "cannot listen on" not in text:
            raise StartError(reason)
        self._move()
        raise BindLostError(reason)

    def _move(self) -> None:
        """Start again on other ports: nobody knows the lost ones yet but us."""
        proxied = self.advertised != self.address
        self.address, self.http_address = self._free_addresses()
        if not proxied:
            self.advertised = self.address
        self.on_address(self.address)
        self.start()

    def _free_addresses(self) -> tuple[str, str]:
        return f"{self.host}:{free_port(self.host)}", f"{self.host}:{free_port(self.host)}"

    def ready(self) -> bool:
        """Never raises, never waits longer than 2 s."""
        connection = http.client.HTTPConnection(self.http_address, timeout=_HTTP_TIMEOUT_S)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def metrics(self) -> str:
        """The text of /metrics; OSError when it does not answer."""
        connection = http.client.HTTPConnection(self.http_address, timeout=_HTTP_TIMEOUT_S)
        try:
            connection.request("GET", "/metrics")
            return connection.getresponse().read().decode("utf-8")
        finally:
            connection.close()

    def _whole_config(self) -> dict[str, Any]:
        whole = {name: dict(value) if isinstance(value, dict) else value for name, value in self.config.items()}
        host, port = self.address.rsplit(":", 1)
        http_host, http_port = self.http_address.rsplit(":", 1)
        service = whole.setdefault(_SERVICE_SECTION[self.kind], {})
        service.update(host=host, port=int(port))
        if self.advertised != self.address:
            service["advertise"] = self.advertised
        whole.setdefault("http", {}).update(host=http_host, port=int(http_port))
        return whole


def service_environment(more: Mapping[str, str]) -> dict[str, str]:
    """Ours without TABLEWIRE_* (keys of a service, which would win over the file) and PG*, with the project importable."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TABLEWIRE_", "PG"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return {**kept, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **more}


def to_toml(table: Mapping[str, Any], prefix: str = "") -> str:
    """TOML of nested tables of strings, numbers, booleans and lists of those. JSON's strings are TOML's."""
    plain = [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
    text = "\n".join(plain) + "\n"
    for key, value in table.items():
        if isinstance(value, Mapping):
            text += f"\n[{prefix}{key}]\n" + to_toml(value, f"{prefix}{key}.")
    return text
