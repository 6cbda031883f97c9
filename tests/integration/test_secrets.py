"""Passwords in URIs: nothing that a run writes or shows holds one, however it was given and whatever went wrong."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pytest

from deploy.local.process import wait_until
from tablewire.etcd import keys as etcd_keys
from tablewire.model.ids import ChangefeedID
from tests.integration.tls_world import PASSWORD, USER, WAIT_S, TlsWorld
from tests.plugins.counter_world import CounterWorld, install_plugin

pytestmark = pytest.mark.integration

ENCODED = quote(PASSWORD, safe="")
OTHER_USER, OTHER_PASSWORD = "by_variable", "v4riable/s3crets@?#&"
"""Whose password the services find in their environment: it is written nowhere at all."""
WRONG = "wr0ng%40guess"
"""A password that the server refuses: an error text is just where one would leak."""
ETCD_PASSWORD = "of3tcd@alone"
SECRETS = (
    PASSWORD,
    ENCODED,
    WRONG,
    "wr0ng@guess",
    "w0rd",
    "gu3ss",
    OTHER_PASSWORD,
    quote(OTHER_PASSWORD, safe=""),
    ETCD_PASSWORD,
)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[TlsWorld]:
    """The services find two passwords in their environment, and one for etcd in a file."""
    world = TlsWorld(tmp_path, {"DATABASE_PASSWORD": OTHER_PASSWORD, "WRONG_PASSWORD": "wr0ng@guess"})
    world.folder.joinpath("etcd-password").write_text(ETCD_PASSWORD)
    for node in world.nodes.values():
        node.config["etcd"].update(username="tablewire", password_file=f"{world.folder}/etcd-password")
    try:
        world.start()
        world.postgres.execute(f"CREATE ROLE {OTHER_USER} SUPERUSER REPLICATION LOGIN PASSWORD '{OTHER_PASSWORD}'")
        world.postgres.execute("CREATE TABLE t1 (id int PRIMARY KEY)", "source")
        world.postgres.execute("INSERT INTO t1 VALUES (1)", "source")
        yield world
    finally:
        world.close()


def create(world: TlsWorld, name: str, password: str, user: str = USER) -> int:
    """The exit code."""
    uris = [world.uri(database, password).replace(f"//{USER}:", f"//{user}:") for database in ("source", "sink")]
    return create_of(world, name, *uris)


def create_of(world: TlsWorld, name: str, source: str, sink: str) -> int:
    return world.cli("changefeed", "create", "--id", name, "--source", source, "--sink", sink, "--tables", "public.*").returncode


def ask_everything(world: TlsWorld) -> None:
    """Every command that shows a changefeed or a configuration, as a table and as JSON."""
    for output in ("table", "json"):
        for command in (("status",), ("changefeed", "list"), ("table", "list", "--changefeed", "literal"), ("capture", "list")):
            world.cli(*command, "-o", output)
        for command in (("events",), ("changefeed", "statistics", "literal")):
            world.cli(*command, "-o", output)
        for name in ("literal", "variable", "query", "none"):
            world.cli("changefeed", "query", name, "-o", output)
        world.cli("--config", str(world.nodes["owner0"].config_file), "config", "show", "-o", output)


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


def on_disk(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file of the run: logs, configurations, the data folders of etcd and PostgreSQL."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "etcd-password":
            yield str(path.relative_to(folder)), path.read_bytes()


@pytest.mark.timeout(600)  # some forty runs of the CLI
def test_no_password_is_ever_written(world: TlsWorld) -> None:
    """Given literally, percent-encoded, as a parameter, in libpq's keyword form and by variable; for changefeeds that run, that
    fail, that lose their password later, and that cannot be parsed."""
    assert create(world, "literal", ENCODED) == 0
    assert create(world, "variable", "${DATABASE_PASSWORD}", OTHER_USER) == 0
    parameter = [f"{world.uri(db, '').replace(':@', '@')}&password={ENCODED}" for db in ("source", "sink")]
    assert create_of(world, "query", *parameter) == 0
    refused = {
        "wrong": create(world, "wrong", WRONG),
        "wrong variable": create(world, "wrong-variable", "${WRONG_PASSWORD}"),
        "wrong parameter": create_of(world, "wrong-query", *(uri.replace(ENCODED, WRONG) for uri in parameter)),
        "unset": create(world, "unset", "${NO_SUCH_PASSWORD}"),
        "unparsable": create(world, "unparsable", PASSWORD),
        "unparsable query": create(world, "unparsable-query", "gu3ss?w0rd"),
        "unparsable text": create(world, "unparsable-text", "gu3ss w0rd"),
        "unparsable code": create(world, "unparsable-code", "gu3ss%zz"),
        "keywords": create_of(world, "keywords", f"host={world.postgres.endpoint} user={USER} password=gu3ss,w0rd", "file:///x"),
        "keywords of the sink": create_of(world, "keywords-sink", parameter[0], "host=h password='gu3ss w0rd'"),
        "scheme": create_of(world, "scheme", f"mysql://me:{ENCODED}@h/d", "file:///x"),
    }
    assert refused == dict.fromkeys(refused, 1)
    for name in ("literal", "variable", "query"):
        wait_until(f"{name} runs", lambda name=name: world.ask("changefeed", "query", name)["checkpoint_ts"] > 0, WAIT_S)
    for user in (USER, OTHER_USER):
        world.postgres.execute(f"ALTER ROLE {user} PASSWORD 'another'")
        world.postgres.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{user}'")
    for name in ("literal", "variable", "query"):
        wait_until(f"{name} fails", lambda name=name: world.ask("changefeed", "query", name)["state"] == "warning", WAIT_S)
        assert "password authentication failed" in world.ask("changefeed", "query", name)["error"]
    ask_everything(world)
    texts = written(world)
    for name in ("literal", "query"):
        own = f"etcd key {etcd_keys.changefeed_info_key('tls', ChangefeedID('default', name))}"
        assert ENCODED in texts.pop(own), "it is stored as it was written"
    variable = f"etcd key {etcd_keys.changefeed_info_key('tls', ChangefeedID('default', 'variable'))}"
    assert "${DATABASE_PASSWORD}" in texts[variable]
    leaks = [(where, secret) for where, text in texts.items() for secret in SECRETS if secret in text]
    assert not leaks
    assert any("***" in text for text in world.outputs)
    # What etcd stores is what was written: the literal ones are on its disk, in its log of changes too; others are nowhere.
    found = {
        (where.split("/")[0], secret) for where, data in on_disk(world.folder) for secret in SECRETS if secret.encode() in data
    }
    assert found <= {("etcd0", ENCODED), ("etcd0", "w0rd")}
    assert ("etcd0", ENCODED) in found


def test_no_password_in_a_plug_ins_own_words(tmp_path: Path) -> None:
    """A source and an executor whose errors quote a URI with its password: it is hidden in lists, events, logs and metrics."""
    plugin = install_plugin(tmp_path / "plugin")
    world = CounterWorld(tmp_path / "world", plugin)
    try:
        world.set_tables("public.t1", "public.t2")
        world.cluster.start()
        world.create()
        world.wait_steady(2)
        said = f"no way to postgresql://me:{PASSWORD}@host/db?password={ENCODED} or host=h password='{PASSWORD}'"
        (world.source / "broken-1").write_text(said)
        world.cluster.wait("the table's error is shown", lambda: "no way to" in str(world.cluster.admin.tables("one")), WAIT_S)
        world.cluster.wait("and the changefeed's", lambda: "no way to" in str(world.cluster.admin.changefeed("one")), WAIT_S)
        (world.source / "broken").write_text(said)
        world.cluster.owner_cli("changefeed", "remove", "one")
        world.cluster.wait("the removal's too", lambda: "no way to" in world.cluster.admin.changefeed("one")["error"], WAIT_S)
        shown = [world.cluster.owner_cli(*words, "-o", output).stdout
                 for words in (("changefeed", "query", "one"), ("changefeed", "list"), ("events",), ("status",))
                 for output in ("table", "json")]  # fmt: skip
        nodes = world.cluster.nodes.values()
        shown += [get(node.http_address, path) for node in nodes for path in ("/metrics", "/healthz", "/readyz")]
        shown += [world.log(name) for name in world.cluster.nodes]
        shown.append(str(world.cluster.etcd.members[0].dump()))
        assert any("no way to postgresql://me:***@host/db" in text for text in shown)
        assert not [text for text in shown if "w0rd" in text]
    finally:
        world.close()
