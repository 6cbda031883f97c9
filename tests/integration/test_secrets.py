"""Passwords in URIs: nothing that a run writes or shows holds one, however it was given and whatever went wrong."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pytest

from deploy.local.process import wait_until
from tablewire import etcd_keys
from tablewire.types import ChangefeedID
from tests.integration.tls_world import PASSWORD, USER, WAIT_S, TlsWorld

pytestmark = pytest.mark.integration

ENCODED = quote(PASSWORD, safe="")
WRONG = "wr0ng%40guess"
"""A password that the server refuses: an error text is just where one would leak."""
SECRETS = (PASSWORD, ENCODED, WRONG, "wr0ng@guess", "w0rd")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[TlsWorld]:
    """The services find the password in their environment too."""
    world = TlsWorld(tmp_path, {"DATABASE_PASSWORD": PASSWORD})
    try:
        world.start()
        world.postgres.execute("CREATE TABLE t1 (id int PRIMARY KEY)", "source")
        world.postgres.execute("INSERT INTO t1 VALUES (1)", "source")
        yield world
    finally:
        world.close()


def create(world: TlsWorld, name: str, password: str, *more: str) -> int:
    """The exit code."""
    uris = ("--source", world.uri("source", password), "--sink", world.uri("sink", password))
    return world.cli("changefeed", "create", "--id", name, *uris, "--tables", "public.*", *more).returncode


def ask_everything(world: TlsWorld) -> None:
    """Every command that shows a changefeed, as a table and as JSON."""
    for output in ("table", "json"):
        for command in (("status",), ("changefeed", "list"), ("table", "list", "--changefeed", "literal"), ("capture", "list")):
            world.cli(*command, "-o", output)
        for command in (("events",), ("changefeed", "statistics", "literal")):
            world.cli(*command, "-o", output)
        for name in ("literal", "variable", "none"):
            world.cli("changefeed", "query", name, "-o", output)


def get(address: str, path: str) -> str:
    """Of a service's HTTP port."""
    connection = http.client.HTTPConnection(address, timeout=10)
    with closing(connection):
        connection.request("GET", path)
        return connection.getresponse().read().decode()


def written(world: TlsWorld) -> dict[str, str]:
    """Everything that the run wrote or showed, by where it stands; what the changefeeds' own records hold is apart."""
    texts = {f"log of {name}": world.log(node) for name, node in world.nodes.items()}
    for name, node in world.nodes.items():
        texts |= {f"{path} of {name}": get(node.http_address, path) for path in ("/metrics", "/healthz", "/readyz")}
    texts |= {f"output {number} of the CLI": text for number, text in enumerate(world.outputs)}
    with closing(world.etcd_session()) as session:
        items, _ = session.get_prefix(etcd_keys.cluster_prefix("tls"))
    return texts | {f"etcd key {item.key}": item.value.decode() for item in items}


def test_no_password_is_ever_written(world: TlsWorld) -> None:
    """Given literally and by variable, for changefeeds that run, that fail, that lose their password later, and that go."""
    assert create(world, "literal", ENCODED) == 0
    assert create(world, "variable", "${DATABASE_PASSWORD}") == 0
    assert create(world, "wrong", WRONG) == 1
    assert create(world, "unset", "${NO_SUCH_PASSWORD}") == 1
    assert create(world, "unparsable", PASSWORD) == 1
    assert world.cli("changefeed", "create", "--id", "scheme", "--source", f"mysql://me:{ENCODED}@h/d", "--sink", "file:///x",
                     "--tables", "*").returncode == 1  # fmt: skip
    for name in ("literal", "variable"):
        wait_until(f"{name} runs", lambda name=name: world.ask("changefeed", "query", name)["checkpoint_ts"] > 0, WAIT_S)
    world.postgres.execute(f"ALTER ROLE {USER} PASSWORD 'another'")
    world.postgres.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{USER}'")
    wait_until("the changefeeds fail", lambda: world.ask("changefeed", "query", "literal")["state"] == "warning", WAIT_S)
    assert "password authentication failed" in world.ask("changefeed", "query", "literal")["error"]
    ask_everything(world)
    texts = written(world)
    own = f"etcd key {etcd_keys.changefeed_info_key('tls', ChangefeedID('default', 'literal'))}"
    assert ENCODED in texts.pop(own), "it is stored as it was written"
    variable = f"etcd key {etcd_keys.changefeed_info_key('tls', ChangefeedID('default', 'variable'))}"
    assert "${DATABASE_PASSWORD}" in texts[variable]
    leaks = [(where, secret) for where, text in texts.items() for secret in SECRETS if secret in text]
    assert not leaks
    assert any("***" in text for text in world.outputs)
