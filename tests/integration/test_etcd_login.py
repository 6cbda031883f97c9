"""An etcd with authentication: sessions and services log in, and again when etcd has dropped their
token.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from deploy.local.etcd import EtcdCluster, EtcdServer
from deploy.local.node import OWNER, PROCESSOR, Node
from deploy.local.process import wait_until
from tablewire.errors import ConfigError, EtcdError
from tablewire.etcd.login import Login, etcd_login
from tablewire.etcd.session import EtcdSession
from tablewire.etcd.values import PrefixState
from tablewire.runtime.sections import EtcdSection
from tests.integration.etcd_faults import gateway

pytestmark = pytest.mark.integration

ROOT_PASSWORD, PASSWORD, CHANGED = "r00t", "s3cr3t of etcd", "an0ther one"
WAIT_S = 30.0
PREFIX = "/tablewire/"


class Guarded:
    """A member that lets `tablewire` read and write below /tablewire/, and refuses every other user."""

    def __init__(self, server: EtcdServer) -> None:
        self.server = server

    def admin(self, path: str, **body: Any) -> None:
        """Send a request as root."""
        token = gateway(self.server, "/v3/auth/authenticate", {"name": "root", "password": ROOT_PASSWORD}).get("token", "")
        answer = gateway(self.server, path, body, token=token)
        assert "error" not in answer, answer

    def enable(self) -> None:
        self.admin("/v3/auth/enable")

    def prepare(self) -> None:
        """Create the users and roles, without enabling authentication."""
        end = PREFIX[:-1] + chr(ord(PREFIX[-1]) + 1)
        permission = {"permType": "READWRITE", "key": _encoded(PREFIX), "range_end": _encoded(end)}
        for path, body in (
            ("/v3/auth/user/add", {"name": "root", "password": ROOT_PASSWORD}),
            ("/v3/auth/role/add", {"name": "root"}),
            ("/v3/auth/user/grant", {"user": "root", "role": "root"}),
            ("/v3/auth/role/add", {"name": "tablewire"}),
            ("/v3/auth/role/grant", {"name": "tablewire", "perm": permission}),
            ("/v3/auth/user/add", {"name": "tablewire", "password": PASSWORD}),
            ("/v3/auth/user/grant", {"user": "tablewire", "role": "tablewire"}),
        ):
            answer = gateway(self.server, path, body)
            assert "error" not in answer, answer


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.fixture
def guarded(new_etcd: Callable[..., EtcdServer]) -> Guarded:
    """Provide a member whose authentication is not enabled yet."""
    guarded = Guarded(new_etcd())
    guarded.prepare()
    return guarded


@pytest.fixture
def new_session(guarded: Guarded) -> Iterator[Callable[..., EtcdSession]]:
    sessions: list[EtcdSession] = []

    def new(password: Callable[[], str] = lambda: PASSWORD, username: str = "tablewire") -> EtcdSession:
        sessions.append(EtcdSession([guarded.server.endpoint], login=Login(username, password)))
        return sessions[-1]

    yield new
    for session in sessions:
        session.close()


def test_a_user_reads_writes_watches_and_keeps_leases(guarded: Guarded, new_session: Callable[..., EtcdSession]) -> None:
    """All requests of the services work; another prefix is refused in one line, and a client
    without a user gets that as the reason.
    """
    guarded.enable()
    session = new_session()
    watch = session.watch_prefix(PREFIX)
    lease, _ = session.grant(60)
    session.put(f"{PREFIX}a", b"1", lease=lease)
    watch.wait_until(lambda state: f"{PREFIX}a" in state.entries, WAIT_S)
    assert session.keep_alive_once(lease) == 60
    session.revoke(lease)
    watch.wait_until(lambda state: not state.entries, WAIT_S)
    with pytest.raises(EtcdError, match="permission denied"):
        session.put("/elsewhere", b"1")
    anonymous = EtcdSession([guarded.server.endpoint])
    with pytest.raises(EtcdError, match="user name is empty"):
        anonymous.get(f"{PREFIX}a")
    anonymous.close()


def test_a_token_that_etcd_dropped_is_renewed(guarded: Guarded, new_session: Callable[..., EtcdSession]) -> None:
    """A token is renewed within the same call, watches included, after a restart of the member or a
    change of its users; an unguarded write is applied once.
    """
    guarded.enable()
    session = new_session()
    watch = session.watch_prefix(PREFIX)
    session.put(f"{PREFIX}a", b"1")
    guarded.server.restart()
    wait_until("it answers", lambda: _answers(session), WAIT_S)
    session.put(f"{PREFIX}a", b"2")
    watch.wait_until(holds(b"2"), WAIT_S)
    guarded.admin("/v3/auth/user/add", name="other", password="x")
    session.put(f"{PREFIX}a", b"3")
    found = session.get(f"{PREFIX}a")
    assert found is not None
    assert (found.value, found.mod_revision - found.create_revision) == (b"3", 2)
    watch.wait_until(holds(b"3"), WAIT_S)


def test_a_changed_password_is_read_again(guarded: Guarded, tmp_path: Path) -> None:
    """The password file is read at every login, so that a changed password needs no new session."""
    guarded.enable()
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    section = EtcdSection(username="tablewire", password_file=str(tmp_path / "password"))
    with capture_logs() as lines:
        session = EtcdSession([guarded.server.endpoint], login=etcd_login(section))
    assert [line["event"] for line in lines] == ["etcd_password_in_plain_text"]
    session.put(f"{PREFIX}a", b"1")
    guarded.admin("/v3/auth/user/changepw", name="tablewire", password=CHANGED)
    with pytest.raises(EtcdError, match=r"log in as tablewire: INVALID_ARGUMENT: .*authentication failed") as caught:
        session.put(f"{PREFIX}a", b"2")
    assert PASSWORD not in str(caught.value)
    (tmp_path / "password").unlink()
    with pytest.raises(EtcdError, match=r"etcd\.password_file: .*password: No such file"):
        session.put(f"{PREFIX}a", b"2")
    (tmp_path / "password").write_text(CHANGED)
    session.put(f"{PREFIX}a", b"2")
    session.close()


def test_authentication_may_be_enabled_later(guarded: Guarded, new_session: Callable[..., EtcdSession]) -> None:
    """A session with a user works while authentication is disabled, and logs in when it is enabled."""
    session = new_session()
    watch = session.watch_prefix(PREFIX)
    session.put(f"{PREFIX}a", b"1")
    guarded.enable()
    session.put(f"{PREFIX}a", b"2")
    watch.wait_until(holds(b"2"), WAIT_S)
    guarded.server.restart()
    wait_until("it answers", lambda: _answers(session), WAIT_S)
    session.put(f"{PREFIX}a", b"3")
    watch.wait_until(holds(b"3"), WAIT_S)


def test_a_frozen_member_costs_one_timeout_for_all(tmp_path: Path) -> None:
    """When the member in use is frozen and no client has a token, simultaneous calls are answered
    by another member, and do not wait for each other's attempts.
    """
    with EtcdCluster(tmp_path) as cluster:
        guarded = Guarded(cluster.members[1])
        guarded.prepare()
        guarded.enable()
        login = Login("tablewire", lambda: PASSWORD)
        session = EtcdSession(cluster.endpoints, login=login, request_timeout_ms=1_000)
        session.put(f"{PREFIX}a", b"1")
        frozen = cluster.members[cluster.endpoints.index(session.members.pick().endpoint)]
        frozen.pause()
        login.forget(session.members.metadata())
        start, took_s = time.monotonic(), []

        def read() -> None:
            assert session.get(f"{PREFIX}a") is not None
            took_s.append(time.monotonic() - start)

        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        frozen.resume()
        session.close()
    assert len(took_s) == len(threads)
    assert max(took_s) < 5.0, took_s


def test_wrong_keys_are_refused_at_the_start(tmp_path: Path) -> None:
    """A user without a password, a missing file and an empty one are refused."""
    with pytest.raises(ValueError, match="username and password_file belong together"):
        EtcdSection(username="tablewire")
    with pytest.raises(ConfigError, match=r"etcd\.password_file: .*gone: No such file"):
        etcd_login(EtcdSection(username="tablewire", password_file=f"{tmp_path}/gone"))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match=r"etcd\.password_file: .*empty is empty"):
        etcd_login(EtcdSection(username="tablewire", password_file=f"{tmp_path}/empty"))


def test_services_log_in(guarded: Guarded, tmp_path: Path) -> None:
    """An owner leads and a processor registers, also after a restart of etcd; a wrong password is
    one line at the start.
    """
    guarded.enable()
    (tmp_path / "password").write_text(PASSWORD)
    (tmp_path / "wrong").write_text("wr0ng")
    nodes = [_node(guarded, tmp_path, kind, f"{kind}0", "password") for kind in (OWNER, PROCESSOR)]
    refused = _node(guarded, tmp_path, OWNER, "refused", "wrong")
    try:
        for node in [*nodes, refused]:
            node.start()
        for node in nodes:
            node.wait_ready()
        guarded.server.restart()
        guarded.admin("/v3/auth/user/add", name="other", password="x")
        for node in nodes:
            wait_until(f"{node.name} is ready", node.ready, WAIT_S)
            assert node.process.running
        assert refused.process.wait(WAIT_S) == 1
        last = refused.log.read_text().strip().splitlines()[-1]
        assert last.startswith("Error: ")
        assert "log in as tablewire" in last
        assert "authentication failed" in last
        text = "".join(node.log.read_text() for node in [*nodes, refused])
        assert PASSWORD not in text
        assert "wr0ng" not in text
    finally:
        for node in [*nodes, refused]:
            print(f"--- {node.name}\n{node.log.read_text()[-3000:]}")
            node.process.kill()


def _node(guarded: Guarded, folder: Path, kind: str, name: str, password: str) -> Node:
    etcd = {
        "endpoints": [guarded.server.endpoint],
        "username": "tablewire",
        "password_file": str(folder / password),
        "start_timeout_ms": 5_000,
    }
    config = {"cluster": "login", "etcd": etcd, "log": {"format": "json"}, "id" if kind == OWNER else "name": name}
    return Node(name, kind, folder, "127.0.0.1", config, {})


def holds(value: bytes) -> Callable[[PrefixState], bool]:
    """Return a condition: /tablewire/a has this value."""
    return lambda state: (found := state.entries.get(f"{PREFIX}a")) is not None and found.value == value


def _answers(session: EtcdSession) -> bool:
    try:
        session.get(f"{PREFIX}a")
    except EtcdError:
        return False
    return True
