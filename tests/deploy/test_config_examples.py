"""The services can load the configuration examples of deploy/."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from owner.owner_config import OwnerConfig
from processor.processor_config import ProcessorConfig
from tablewire.runtime import config as configuration
from tablewire.runtime.config import OTHER_VARIABLES, Section

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy/config"
EXAMPLES = sorted(FOLDER.glob("*.toml"))


def kind_of(path: Path) -> type[Section]:
    """Return the configuration class, which the start of the file name determines."""
    return {"owner": OwnerConfig, "processor": ProcessorConfig}[re.split(r"[-.]", path.name)[0]]


def test_there_are_examples_for_both_services() -> None:
    """There is one for an owner and one for a processor, each with and without TLS."""
    assert [path.name for path in EXAMPLES] == ["owner-tls.toml", "owner.toml", "processor-tls.toml", "processor.toml"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_accepted(path: Path) -> None:
    """All keys exist and all values are within their bounds."""
    found = configuration.load(kind_of(path), files=[path])
    assert isinstance(found, OwnerConfig | ProcessorConfig)
    assert found.cluster == "prod"
    assert len(found.etcd.endpoints) == 3


def test_a_wrong_example_would_be_noticed(tmp_path: Path) -> None:
    """The loader refuses an unknown key."""
    path = tmp_path / "owner.toml"
    path.write_text((FOLDER / "owner.toml").read_text().replace("lease_ttl_ms", "lease_ttl_s"))
    with pytest.raises(configuration.ConfigError, match=r"unknown key etcd\.lease_ttl_s"):
        configuration.load(OwnerConfig, files=[path])


@pytest.mark.parametrize("name", ["owner-tls.toml", "processor-tls.toml"])
def test_tls_examples_encrypt_every_connection_and_list_roles(name: str) -> None:
    """They enable TLS to etcd and between the services, and set allowed_common_names."""
    found = configuration.load(kind_of(Path(name)), files=[FOLDER / name])
    assert isinstance(found, OwnerConfig | ProcessorConfig)
    assert found.etcd.tls.enabled
    assert found.tls.enabled
    assert found.tls.require_client_cert
    assert "tablewire-owner" in found.tls.allowed_common_names


def test_the_secrets_example_has_no_secret_and_no_configuration_key() -> None:
    """Each line has a name that is not a configuration key, and the value `change-me`."""
    text = (FOLDER / "secrets.env.example").read_text()
    pairs = [line.split("=", 1) for line in text.splitlines() if line and not line.startswith("#")]
    assert pairs
    for name, value in pairs:
        assert not name.startswith("TABLEWIRE_") or name in OTHER_VARIABLES
        assert value == "change-me"
