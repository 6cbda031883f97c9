"""The CLI over TLS: which clients may call, by flags and by configuration, and the errors of the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from owner.admin.caller_identity import CALLER_KEY
from owner.admin.forwarding import FORWARDED_KEY
from owner.cli.main import cli
from tablewire.etcd.records import LeaderRecord
from tablewire.runtime.grpc import open_channel
from tablewire.runtime.sections import PeerTlsSection
from tablewire.runtime.tls import channel_credentials
from tablewire.v1.admin_pb2 import ChangefeedRequest
from tablewire.v1.admin_pb2_grpc import AdminStub
from tests.owner.admin_world import AdminView, serving, ticking
from tests.owner.world import CHANGEFEED

FILES = Path(__file__).parents[1] / "tablewire/tls"
CA = ("--tls-ca-file", str(FILES / "ca.pem"))


def identity(name: str) -> tuple[str, ...]:
    return (*CA, "--tls-cert-file", str(FILES / f"{name}.pem"), "--tls-key-file", str(FILES / f"{name}.key"))


def section(**options: object) -> PeerTlsSection:
    """Return the TLS section of the owners."""
    files = {"ca_file": f"{FILES}/ca.pem", "cert_file": f"{FILES}/server.pem", "key_file": f"{FILES}/server.key"}
    return PeerTlsSection(enabled=True, **{**files, **options})  # type: ignore[arg-type]


@pytest.fixture
def address() -> Iterator[str]:
    """Return the address of a leader that accepts owners and the client named client."""
    view = AdminView()
    view.world.settle()
    with serving(view, section(allowed_common_names=("client", "server"))) as address:
        yield address


def run(address: str, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["--endpoint", address, *arguments], prog_name="owner")


def test_a_client_with_an_allowed_certificate_is_let_in(address: str) -> None:
    """The flags name the certificate."""
    assert run(address, *identity("client"), "capture", "list").exit_code == 0


def test_the_configuration_may_name_the_certificate(address: str, tmp_path: Path) -> None:
    """The section [tls] is the same as in owners and processors."""
    lines = ["[tls]", "enabled = true", f'ca_file = "{FILES}/ca.pem"']
    lines += [f'cert_file = "{FILES}/client.pem"', f'key_file = "{FILES}/client.key"']
    file = tmp_path / "owner.toml"
    file.write_text("\n".join(lines))
    assert run(address, "--config", str(file), "status").exit_code == 0


def test_a_stranger_is_refused_by_name(address: str) -> None:
    """Its certificate is signed by the right authority, but its name is not allowed."""
    result = run(address, *identity("stranger"), "capture", "list")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "certificate of stranger may not call here" in result.stderr


@pytest.mark.parametrize("flags", [(), CA], ids=["plain text", "no certificate"])
def test_without_a_certificate_there_is_no_connection(address: str, flags: tuple[str, ...]) -> None:
    """The error names the endpoint."""
    result = run(address, *flags, "status", "--timeout-s", "3")
    assert result.exit_code == 1
    assert f"no owner answers; tried {address} (" in result.stderr


def test_wrong_files_are_one_line(address: str) -> None:
    """The command fails before it connects."""
    result = run(address, "--tls-ca-file", "nowhere.pem", "status")
    assert result.exit_code == 1
    assert "nowhere.pem" in result.stderr
    half = run(address, *CA, "--tls-cert-file", str(FILES / "client.pem"), "status")
    assert "cert_file and key_file belong together" in half.stderr


def test_a_follower_forwards_calls_over_tls() -> None:
    """It presents its own certificate to the leader."""
    view = AdminView()
    view.world.settle()
    other = AdminView(view.world, "owner-2")
    other.leads = False
    tls = section(allowed_common_names=("client", "server"))
    # The certificate is for this name; a channel checks it.
    with serving(view, tls) as leader, serving(other, tls) as follower:
        other.records = [LeaderRecord(id="owner-1", address=leader)]
        result = run(follower, *identity("client"), "status")
    assert result.exit_code == 0, result.stderr
    assert "answered by owner-1" in result.stdout


def test_events_name_the_certificate_of_the_caller() -> None:
    """A forwarded call shows the client with the follower behind it. A name that a client claims is
    never shown alone."""
    view = AdminView()
    view.world.settle()
    other = AdminView(view.world, "owner-2")
    other.leads = False
    tls = section(allowed_common_names=("client", "server"))
    with serving(view, tls) as leader, serving(other, tls) as follower, ticking(view):
        other.records = [LeaderRecord(id="owner-1", address=leader)]
        for address, verb in ((leader, "pause"), (follower, "resume"), (leader, "pause")):
            result = run(address, *identity("client"), "changefeed", verb)
            assert result.exit_code == 0, result.stderr
        assert view.store.infos[CHANGEFEED].asked_by == "client"
        assert run(follower, *identity("client"), "changefeed", "resume").exit_code == 0
        assert view.store.infos[CHANGEFEED].asked_by == "client via server"
        assert run(follower, *identity("client"), "capture", "drain", "a").exit_code == 0
        assert run(leader, *identity("client"), "rebalance").exit_code == 0
        with open_channel(leader, channel_credentials(section())) as channel:
            claimed = ((CALLER_KEY, "alice%0A"), (FORWARDED_KEY, "owner-9"))
            AdminStub(channel).PauseChangefeed(ChangefeedRequest(changefeed="test"), metadata=claimed, timeout=10)  # type: ignore[no-untyped-call]
        assert view.store.infos[CHANGEFEED].asked_by == "alice via server"
    asked = [(event.record.kind, event.record.by) for event in view.events.events_after(0) if event.record is not None]
    assert asked == [("drain_requested", "client via server"), ("rebalance_requested", "client")]
