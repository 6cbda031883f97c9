"""The configuration examples start a real owner and a real processor; only etcd and the addresses are replaced."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.local.etcd import EtcdServer
from deploy.local.net import free_port
from deploy.local.node import service_environment
from deploy.local.process import wait_until

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0


def status(port: int, path: str) -> int:
    """Return the HTTP status, or 0 if the service is unreachable."""
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def test_the_examples_start_a_cluster(new_etcd: Callable[..., EtcdServer], tmp_path: Path) -> None:
    """Both services become ready, the processor has the label of its example, and both exit with code 0."""
    etcd = new_etcd()
    ports = {service: (free_port(HOST), free_port(HOST)) for service in ("owner", "processor")}
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for service, (port, http_port) in ports.items():
            command = [
                sys.executable,
                "-m",
                service,
                "serve",
                "--config",
                f"deploy/config/{service}.toml",
                "--etcd",
                etcd.endpoint,
            ]
            command += ["--port", str(port), "--advertise", f"{HOST}:{port}", "--http-port", str(http_port)]
            with (tmp_path / f"{service}.log").open("wb") as log:
                running[service] = subprocess.Popen(command, cwd=ROOT, env=service_environment({}), stdout=log, stderr=log)
        for service, (_, http_port) in ports.items():
            wait_until(f"{service} is ready", lambda port=http_port: status(port, "/readyz") == 200, START_TIMEOUT_S)
            assert status(http_port, "/healthz") == 200
        ask = [sys.executable, "-m", "owner", "-o", "json", "capture", "list", "--endpoint", f"{HOST}:{ports['owner'][0]}"]
        listed = subprocess.run(
            ask, cwd=ROOT, env=service_environment({}), capture_output=True, timeout=START_TIMEOUT_S, check=True
        )
        (capture,) = json.loads(listed.stdout)["captures"]
        assert capture["labels"] == {"zone": "a"}
        assert capture["id"].startswith("processor-1-")
        for service in ("processor", "owner"):
            running[service].send_signal(signal.SIGTERM)
            assert running[service].wait(STOP_TIMEOUT_S) == 0
    finally:
        for process in running.values():
            process.kill()
            process.wait()
