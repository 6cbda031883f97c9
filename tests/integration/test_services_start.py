"""Services that cannot start say why in one line and end; those that can say where they are."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local.etcd import EtcdServer
from deploy.local.net import free_port
from deploy.local.node import ROOT, service_environment
from deploy.local.process import ManagedProcess, wait_until
from tablewire.runtime.addresses import parse_address

pytestmark = pytest.mark.integration

SERVICES = ["owner", "processor"]
SECTION = {"owner": "admin", "processor": "exchange"}
TIMEOUT_S = 30.0


def _run(service: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**service_environment({}), **variables}
    command = [sys.executable, "-m", service, "serve"]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=ROOT, env=environment)


def _free(service: str) -> dict[str, str]:
    return {f"TABLEWIRE_{SECTION[service].upper()}__PORT": "0", "TABLEWIRE_HTTP__PORT": "0"}


def _error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that is no log event."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.mark.parametrize("service", SERVICES)
def test_without_etcd_it_ends_after_its_timeout(service: str) -> None:
    """Exit code 1, and the endpoint that did not answer."""
    endpoint = f"127.0.0.1:{free_port()}"
    done = _run(
        service,
        TABLEWIRE_ETCD__ENDPOINTS=endpoint,
        TABLEWIRE_ETCD__START_TIMEOUT_MS="1000",
        TABLEWIRE_ETCD__REQUEST_TIMEOUT_MS="300",
        **_free(service),
    )
    assert done.returncode == 1
    assert endpoint in _error_of(done)


@pytest.mark.parametrize("service", SERVICES)
def test_a_wrong_key_is_named(service: str) -> None:
    """By its path and where it came from; nothing is started."""
    done = _run(service, TABLEWIRE_TICK__INTERVAL_MS="soon")
    assert done.returncode == 1
    assert "TABLEWIRE_TICK__INTERVAL_MS" in _error_of(done)


@pytest.mark.parametrize("service", SERVICES)
def test_a_port_that_is_taken_is_named(service: str) -> None:
    """Exit code 1 at once."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = _run(service, **{**_free(service), f"TABLEWIRE_{SECTION[service].upper()}__PORT": port})
    assert done.returncode == 1
    assert port in _error_of(done)


@pytest.mark.parametrize("service", SERVICES)
def test_it_says_where_it_is_and_leaves_when_asked(service: str, tmp_path: Path, etcd_server: EtcdServer) -> None:
    """One event with its addresses once it serves, then /readyz and /metrics answer; SIGTERM ends it with 0."""
    flags = {
        "--etcd": etcd_server.endpoint,
        "--cluster": f"start-{service}",
        "--port": "0",
        "--http-port": "0",
        "--log-format": "json",
    }
    log = tmp_path / "log"
    command = [sys.executable, "-m", service, "serve", *(word for flag in flags.items() for word in flag)]
    process = ManagedProcess(service, command, log=log, env=service_environment({}), cwd=ROOT)
    process.start()
    try:
        wait_until("it is ready", lambda: f'"{service}_ready"' in log.read_text(), TIMEOUT_S)
        ready = next(event for line in log.read_text().splitlines() if (event := json.loads(line))["event"] == f"{service}_ready")
        for path, text in (("/readyz", "200 OK"), ("/healthz", "200 OK"), ("/metrics", f"tablewire_{service}_")):
            wait_until(f"{path} answers", lambda p=path, t=text: t in _get(ready["http"], p), TIMEOUT_S)
        socket.create_connection(parse_address(ready["address"]), 5.0).close()
        assert process.terminate(TIMEOUT_S) == 0
    finally:
        process.kill()


def _get(address: str, path: str) -> str:
    with socket.create_connection(parse_address(address), 5.0) as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(65_536), b"")).decode()
