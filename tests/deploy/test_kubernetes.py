"""The Kubernetes manifests: validation against the schemas, and requirements of the services that no schema covers.

The validator includes the schemas of several Kubernetes versions. No cluster is used.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from owner.owner_config import OwnerConfig
from owner.service import STOP_TIMEOUT_S
from processor.processor_config import ProcessorConfig
from tablewire.runtime import config as configuration
from tablewire.runtime.config import Section, describe

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy/kubernetes"
VERSIONS = ["1.29", "1.33", "1.37"]
KINDS: Mapping[str, type[Section]] = {"owner": OwnerConfig, "processor": ProcessorConfig}

Manifest = dict[str, Any]


def documents(path: Path) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def applied() -> list[Manifest]:
    """Return what `kubectl apply -k` applies: the files that the kustomization lists, in order."""
    (kustomization,) = documents(FOLDER / "kustomization.yaml")
    return [document for name in kustomization["resources"] for document in documents(FOLDER / name)]


def named(kind: str, name: str) -> Manifest:
    (found,) = [item for item in applied() if (item["kind"], item["metadata"]["name"]) == (kind, name)]
    return found


def workloads() -> Iterator[tuple[str, Manifest]]:
    for service in KINDS:
        yield service, named("StatefulSet", f"tablewire-{service}")


def container_of(workload: Manifest) -> Manifest:
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def test_every_manifest_is_applied() -> None:
    """The kustomization lists each file of the folder."""
    (kustomization,) = documents(FOLDER / "kustomization.yaml")
    beside = {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == beside
    assert {document["metadata"].get("namespace", "tablewire") for document in applied()} == {kustomization["namespace"]}


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_are_valid(version: str) -> None:
    """Validation is strict: unknown fields are errors."""
    for document in applied():
        kubernetes_validate.validate(document, version, strict=True)


def test_a_wrong_manifest_would_be_noticed() -> None:
    """The validator refuses an unknown field and a value of the wrong type."""
    for change in ({"terminationGracePeriodSecs": 95}, {"terminationGracePeriodSeconds": "95"}):
        document = named("StatefulSet", "tablewire-processor")
        document["spec"]["template"]["spec"].update(change)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(document, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("service", KINDS)
def test_the_configuration_is_valid(service: str, tmp_path: Path) -> None:
    """The service can load the file of the ConfigMap with the variables of the pod."""
    text = named("ConfigMap", "tablewire-config")["data"][f"{service}.toml"]
    path = tmp_path / f"{service}.toml"
    path.write_text(text)
    container = container_of(dict(workloads())[service])
    environ = {entry["name"]: entry.get("value", "pod-0").replace("$(POD_NAME)", "pod-0") for entry in container["env"]}
    found = configuration.load(KINDS[service], files=[path], environ=environ)
    assert isinstance(found, OwnerConfig | ProcessorConfig)
    advertised = found.admin.advertise if isinstance(found, OwnerConfig) else found.exchange.advertise
    port = found.admin.port if isinstance(found, OwnerConfig) else found.exchange.port
    assert advertised == f"pod-0.tablewire-{service}.tablewire.svc:{port}"
    assert container["command"] == [service, "serve", "--config", f"/etc/tablewire/{service}.toml"]


def test_kubernetes_sets_no_variable_that_looks_like_a_key() -> None:
    """Service links would set TABLEWIRE_... variables, and the services refuse variables that are not keys."""
    for _, workload in workloads():
        assert workload["spec"]["template"]["spec"]["enableServiceLinks"] is False
    for service, kind in KINDS.items():
        known = {row.environment for row in describe(kind)}
        given = {entry["name"] for entry in container_of(dict(workloads())[service])["env"]}
        assert {name for name in given if name.startswith("TABLEWIRE_")} <= known


def test_ports_match_the_configuration() -> None:
    """Containers, services and configuration use the same ports."""
    for service, workload in workloads():
        ports = {port["name"]: port["containerPort"] for port in container_of(workload)["ports"]}
        config = tomllib.loads(named("ConfigMap", "tablewire-config")["data"][f"{service}.toml"])
        section = "admin" if service == "owner" else "exchange"
        assert ports == {section: config[section]["port"], "http": config["http"]["port"]}
        headless = named("Service", f"tablewire-{service}")
        assert {port["name"]: port["port"] for port in headless["spec"]["ports"]} == ports
        assert headless["spec"]["clusterIP"] == "None"
        for host in (config[section]["host"], config["http"]["host"]):
            assert host == "0.0.0.0"


def test_probes_use_the_right_paths() -> None:
    """Startup and liveness use /healthz, readiness /readyz."""
    for _, workload in workloads():
        container = container_of(workload)
        paths = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
        assert paths == {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}


def test_pods_have_enough_time_to_stop() -> None:
    """The grace period is longer than a drain and the closing of executors."""
    grace_s = {name: workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] for name, workload in workloads()}
    stop = tomllib.loads(named("ConfigMap", "tablewire-config")["data"]["processor.toml"])["stop"]
    assert grace_s["processor"] > (stop["drain_timeout_ms"] + stop["close_timeout_ms"]) / 1000
    assert grace_s["owner"] > STOP_TIMEOUT_S


def test_selectors_find_the_pods() -> None:
    """Services, disruption budgets and network policies select existing pod labels."""
    labels = [workload["spec"]["template"]["metadata"]["labels"] for _, workload in workloads()]
    for document in applied():
        spec = document.get("spec", {})
        selector = {
            "Service": spec.get("selector"),
            "PodDisruptionBudget": spec.get("selector", {}).get("matchLabels"),
            "NetworkPolicy": spec.get("podSelector", {}).get("matchLabels"),
            "StatefulSet": spec.get("selector", {}).get("matchLabels"),
        }.get(document["kind"])
        if selector:
            assert any(selector.items() <= found.items() for found in labels), document["metadata"]["name"]


def test_pods_have_no_more_rights_than_they_need() -> None:
    """They have no root user, no writable root file system, no capability, no token and no literal secret."""
    for _, workload in workloads():
        pod, container = workload["spec"]["template"]["spec"], container_of(workload)
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]
        assert [source["secretRef"]["name"] for source in container["envFrom"]] == ["tablewire-databases"]
    assert "Secret" not in {document["kind"] for document in applied()}
