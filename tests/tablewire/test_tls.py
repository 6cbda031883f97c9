"""TLS with gRPC and etcd: identities from files, mutual authentication, allowed common names."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from deploy.local.etcd import etcd_binary
from deploy.local.net import free_port
from deploy.local.process import ManagedProcess, wait_until
from tablewire.errors import ConfigError, EtcdError
from tablewire.etcd.session import EtcdSession, etcd_credentials
from tablewire.etcd.values import EtcdUnavailableError
from tablewire.runtime import tls
from tablewire.runtime.grpc import RenewedChannel, add_health_and_reflection, listen, new_server, open_channel
from tablewire.runtime.sections import ClientTlsSection, PeerTlsSection

FILES = Path(__file__).with_name("tls")
TIMEOUT_S = 20.0


def peer(name: str, **options: object) -> PeerTlsSection:
    files = {"ca_file": f"{FILES}/ca.pem", "cert_file": f"{FILES}/{name}.pem", "key_file": f"{FILES}/{name}.key"}
    return PeerTlsSection(enabled=True, **{**files, **options})  # type: ignore[arg-type]


@pytest.fixture
def server_port() -> Iterator[int]:
    """Start a server that accepts only the client "client"."""
    section = peer("server", allowed_common_names=("client",))
    server = new_server(max_workers=2, max_concurrent_rpcs=4, thread_name="tls", interceptors=tls.interceptors(section))
    add_health_and_reflection(server, ()).set_serving(True)
    port = listen(server, "127.0.0.1", 0, tls.server_credentials(section))
    server.start()
    yield port
    server.stop(0).wait(TIMEOUT_S)


def check(port: int, credentials: grpc.ChannelCredentials | None) -> grpc.StatusCode:
    channel = open_channel(f"127.0.0.1:{port}", credentials)
    try:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        return error.code()
    finally:
        channel.close()
    return grpc.StatusCode.OK


def test_an_allowed_client_may_call(server_port: int) -> None:
    """A certificate of the CA with an allowed name is accepted."""
    assert check(server_port, tls.channel_credentials(peer("client"))) is grpc.StatusCode.OK


def test_another_name_may_not_call(server_port: int) -> None:
    """A certificate of the CA with another name is refused by name."""
    assert check(server_port, tls.channel_credentials(peer("stranger"))) is grpc.StatusCode.PERMISSION_DENIED


def test_no_certificate_and_no_tls_are_refused(server_port: int) -> None:
    """A client without a certificate or without TLS cannot connect."""
    without = grpc.ssl_channel_credentials((FILES / "ca.pem").read_bytes())
    assert check(server_port, without) is grpc.StatusCode.UNAVAILABLE
    assert check(server_port, None) is grpc.StatusCode.UNAVAILABLE


def test_streams_are_checked_too(server_port: int) -> None:
    """The common name is checked for streaming calls as well."""
    channel = open_channel(f"127.0.0.1:{server_port}", tls.channel_credentials(peer("stranger")))
    with pytest.raises(grpc.RpcError, match="certificate of stranger may not call here"):
        next(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S))
    channel.close()


def test_plain_text_is_the_default() -> None:
    """A section that is not enabled has no credentials and no interceptor."""
    assert tls.server_credentials(PeerTlsSection()) is None
    assert tls.channel_credentials(PeerTlsSection()) is None
    assert etcd_credentials(ClientTlsSection()) is None
    assert tls.interceptors(PeerTlsSection()) == ()


def test_roles_that_are_not_distinguished_are_a_warning() -> None:
    """TLS without a list of names lets every certificate of the CA call, and only then a warning is
    logged.
    """
    with capture_logs() as lines:
        tls.warn_of_roles(peer("server"))
        tls.warn_of_roles(peer("server", allowed_common_names=("client",)))
        tls.warn_of_roles(PeerTlsSection())
    assert [(line["event"], line["log_level"]) for line in lines] == [("any_certificate_may_call", "warning")]


def test_wrong_files_are_refused_at_the_start(tmp_path: Path) -> None:
    """A missing file, a key of another certificate and a file without certificates are named by key
    and path.
    """
    with pytest.raises(ConfigError, match=r"tls\.ca_file: .*gone\.pem: No such file"):
        tls.channel_credentials(peer("client", ca_file=f"{tmp_path}/gone.pem"))
    with pytest.raises(ConfigError, match=r"tls\.cert_file, tls\.key_file: .*client\.pem and .*server\.key are no usable pair"):
        tls.server_credentials(peer("client", key_file=f"{FILES}/server.key"))
    (tmp_path / "empty.pem").write_text("nothing")
    with pytest.raises(ConfigError, match=r"tls\.ca_file: .*empty\.pem holds no usable certificates"):
        tls.channel_credentials(peer("client", ca_file=f"{tmp_path}/empty.pem"))


@pytest.fixture
def secure_etcd(tmp_path: Path) -> Iterator[str]:
    """Return the endpoint of an etcd that requires client certificates."""
    client, peer_port = free_port(), free_port()
    url, peer_url = f"https://127.0.0.1:{client}", f"http://127.0.0.1:{peer_port}"
    command = [
        etcd_binary(), "--name=e", f"--data-dir={tmp_path}/data", f"--listen-client-urls={url}", f"--advertise-client-urls={url}",
        f"--listen-peer-urls={peer_url}", f"--initial-advertise-peer-urls={peer_url}", f"--initial-cluster=e={peer_url}",
        f"--cert-file={FILES}/server.pem", f"--key-file={FILES}/server.key", f"--trusted-ca-file={FILES}/ca.pem",
        "--client-cert-auth", "--log-level=warn",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
    process = ManagedProcess("etcd", command, log=tmp_path / "etcd.log", env=environment)
    process.start()
    yield f"127.0.0.1:{client}"
    process.kill()


@pytest.mark.integration
def test_etcd_by_mutual_tls(secure_etcd: str) -> None:
    """With a client certificate reads, writes and watches work; without it, or in plain text, there
    is no connection.
    """
    files = {"ca_file": f"{FILES}/ca.pem", "cert_file": f"{FILES}/client.pem", "key_file": f"{FILES}/client.key"}
    session = EtcdSession([secure_etcd], credentials=etcd_credentials(ClientTlsSection(enabled=True, **files)))

    def answers() -> bool:
        try:
            return session.get("/a") is None
        except EtcdError:
            return False

    wait_until("etcd answers", answers, TIMEOUT_S)
    watch = session.watch_prefix("/")
    session.put("/a", b"1")
    watch.wait_until(lambda state: "/a" in state.entries, TIMEOUT_S)
    session.close()
    anonymous = etcd_credentials(ClientTlsSection(enabled=True, ca_file=f"{FILES}/ca.pem"))
    for credentials in (anonymous, None):
        other = EtcdSession([secure_etcd], credentials=credentials, request_timeout_ms=1_000)
        with pytest.raises(EtcdUnavailableError):
            other.get("/a")
        other.close()


def served_certificate(port: int, section: PeerTlsSection) -> bytes:
    """Return the certificate that a new connection receives."""
    context = ssl.create_default_context(cafile=section.ca_file)
    context.check_hostname = False
    context.load_cert_chain(section.cert_file, section.key_file)
    with socket.create_connection(("127.0.0.1", port), 10) as plain, context.wrap_socket(plain) as secure:
        return secure.getpeercert(binary_form=True) or b""


def der(name: str) -> bytes:
    return ssl.PEM_cert_to_DER_cert((FILES / f"{name}.pem").read_text())


def put(folder: Path, name: str, *endings: str) -> None:
    """Replace own.pem or own.key by these files."""
    for ending in endings:
        shutil.copyfile(FILES / f"{name}.{ending}", folder / "new")
        os.replace(folder / "new", folder / f"own.{ending}")


def test_a_server_uses_the_current_files_for_new_connections(tmp_path: Path) -> None:
    """While the files do not match or one is missing, the previous pair stays in use and a warning
    is logged.
    """
    put(tmp_path, "server", "pem", "key")
    own = peer("server", cert_file=f"{tmp_path}/own.pem", key_file=f"{tmp_path}/own.key")
    server = new_server(max_workers=1, max_concurrent_rpcs=1, thread_name="tls")
    port = listen(server, "127.0.0.1", 0, tls.server_credentials(own))
    server.start()
    with capture_logs() as lines:
        assert served_certificate(port, peer("client")) == der("server")
        put(tmp_path, "stranger", "pem")
        assert served_certificate(port, peer("client")) == der("server")
        put(tmp_path, "stranger", "key")
        assert served_certificate(port, peer("client")) == der("stranger")
        (tmp_path / "own.key").unlink()
        assert served_certificate(port, peer("client")) == der("stranger")
    server.stop(0).wait(TIMEOUT_S)
    assert [line["event"] for line in lines] == ["certificates_unusable", "certificates_replaced", "certificates_unusable"]


def test_a_client_gets_new_credentials_when_the_files_change(tmp_path: Path) -> None:
    """The provider returns the same object until the files change; only then a failed channel is
    replaced.
    """
    put(tmp_path, "client", "pem", "key")
    provide = tls.renewed_channel_credentials(peer("client", cert_file=f"{tmp_path}/own.pem", key_file=f"{tmp_path}/own.key"))
    assert provide is not None
    first = provide()
    line = RenewedChannel("127.0.0.1:1", provide)
    assert provide() is first
    assert not line.renew()
    put(tmp_path, "stranger", "pem", "key")
    assert provide() is not first
    before = line.channel
    assert line.renew()
    assert line.channel is not before
    assert not line.renew()
    line.close()
    assert tls.renewed_channel_credentials(PeerTlsSection()) is None


def test_a_server_may_accept_clients_without_a_certificate() -> None:
    """If it is configured so; a plain-text client is still refused."""
    section = peer("server", require_client_cert=False)
    server = new_server(max_workers=2, max_concurrent_rpcs=4, thread_name="tls", interceptors=tls.interceptors(section))
    add_health_and_reflection(server, ()).set_serving(True)
    port = listen(server, "127.0.0.1", 0, tls.server_credentials(section))
    server.start()
    assert check(port, grpc.ssl_channel_credentials((FILES / "ca.pem").read_bytes())) is grpc.StatusCode.OK
    assert check(port, None) is grpc.StatusCode.UNAVAILABLE
    server.stop(0).wait(TIMEOUT_S)
