"""A Tablewire cluster of real processes on this machine, each at a loopback address of its own.

    with Cluster(folder, etcd=3, owners=2, processors=3, postgres={"source": server, "sink": server}) as cluster:
        cluster.owner_json("changefeed", "create", "--id", "one", "--source", cluster.uri("source", "db"), ...)
        cluster.link("owner0", "processor1").cut()
        cluster.kill("processor2")

Nodes are named etcd0.., owner0.., processor0..; the caller names the PostgreSQL servers. With
`links=True` every connection goes through a proxy, so that each link can be cut, delayed, stalled
and reset by the names of its two ends: node -> etcd member, owner -> processor, owner -> owner,
owner or processor -> PostgreSQL, and "cli" (any other process) -> server. A server advertises the
address of its proxy. The link of a connection follows from the process that opened it
(`identify.py`).
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from deploy.local.admin import Admin, AdminError, Json
from deploy.local.etcd import EtcdCluster
from deploy.local.identify import client_name
from deploy.local.net import Subnet
from deploy.local.node import OWNER, PROCESSOR, ROOT, TERMINATE_TIMEOUT_S, Node, service_environment
from deploy.local.postgres import PostgresServer
from deploy.local.process import Scoped, wait_until
from deploy.local.proxy import Link, ProxyLoop, TcpProxy
from deploy.local.server import Server
from tablewire.runtime.addresses import parse_address

CLI = "cli"
CLI_TIMEOUT_S = 120.0
LEASE_TTL_MS = 3_000
WAIT_TIMEOUT_S = 60.0
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_FIRST_HOSTS = {"etcd": 1, OWNER: 21, PROCESSOR: 51}


class CliError(Exception):
    """The owner CLI failed. The text holds its exit code and output."""


class Cluster(Scoped):
    """A cluster with all of its nodes. For one thread; rules of links may be set from any."""

    def __init__(
        self,
        folder: Path,
        *,
        etcd: int = 3,
        owners: int = 2,
        processors: int = 3,
        postgres: Mapping[str, PostgresServer] = MappingProxyType({}),
        name: str = "local",
        lease_ttl_ms: int = LEASE_TTL_MS,
        links: bool = True,
        owner_config: Mapping[str, Any] = _NOTHING,
        processor_config: Mapping[str, Any] = _NOTHING,
        environment: Mapping[str, str] = MappingProxyType({}),
        etcd_settings: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Describe the cluster. postgres: running servers by their names in links; the caller closes them.

        lease_ttl_ms: of owners and processors. links False: no proxies; nodes dial each other directly.
        owner_config, processor_config: more keys of the services, as nested tables. environment: more
        variables of the services and the CLI.
        """
        self.folder = folder
        self.name = name
        self._subnet = Subnet.any()
        self._lease_ttl_ms = lease_ttl_ms
        self._postgres = dict(postgres)
        self._environment = dict(environment)
        self._configs = {OWNER: owner_config, PROCESSOR: processor_config}
        hosts = [self._subnet.host(_FIRST_HOSTS["etcd"] + number) for number in range(etcd)]
        self.etcd = EtcdCluster(folder, etcd, hosts, settings=etcd_settings)
        self._counts = {OWNER: owners, PROCESSOR: processors}
        self.nodes: dict[str, Node] = {}
        self._loop = ProxyLoop() if links else None
        self._proxies: dict[str, TcpProxy] = {}
        self._links: dict[tuple[str, str], Link] = {}
        self._links_lock = threading.Lock()  # the proxies' thread makes links too
        self._admin: Admin | None = None

    def start(self) -> None:
        """Start all nodes, and wait until they are ready, one owner leads and all processors are
        registered.

        Raises StartError when a node does not become ready.
        """
        self.etcd.start()
        for name, server in self._servers().items():
            self._proxy(name, server.endpoint)
        for kind in (OWNER, PROCESSOR):
            for number in range(self._counts[kind]):
                self.add_node(kind, number)
        for node in self.nodes.values():
            node.start()
        for node in self.nodes.values():
            node.wait_ready()
        if self._counts[OWNER]:
            self.wait_for_leader()
            self.wait("all processors are registered", lambda: set(self.captures()) >= set(self.processors))

    def add_node(self, kind: str, number: int) -> Node:
        """Add an owner or processor without starting it."""
        name = f"{kind}{number}"
        host = self._subnet.host(_FIRST_HOSTS[kind] + number)
        node = Node(name, kind, self.folder, host, self._config(kind, name), self._environment)
        node.advertised = self._proxy(name, node.address)
        if name in self._proxies:
            node.on_address = self._proxies[name].retarget
        self.nodes[name] = node
        return node

    def close(self) -> None:
        """Kill all nodes. Files stay in the caller's folder. Idempotent."""
        if self._admin is not None:
            self._admin.close()
            self._admin = None
        for node in self.nodes.values():
            node.kill()
        self.etcd.kill()
        if self._loop is not None:
            self._loop.close()

    @property
    def owners(self) -> list[str]:
        return [name for name, node in self.nodes.items() if node.kind == OWNER]

    @property
    def processors(self) -> list[str]:
        return [name for name, node in self.nodes.items() if node.kind == PROCESSOR]

    def node(self, name: str) -> Node:
        """Return an owner or processor. Raises LookupError when there is none of this name."""
        if name not in self.nodes:
            raise LookupError(f"no node {name}; there are {', '.join(self.nodes)}")
        return self.nodes[name]

    def start_node(self, name: str, *, wait: bool = True) -> None:
        """Start a node or etcd member that has ended, as a new process at the same address."""
        server = self._server(name)
        server.start()
        if wait and isinstance(server, Node):
            server.wait_ready()

    def kill(self, name: str) -> None:
        """Kill a node with SIGKILL and return when it is gone."""
        self._server(name).kill()

    def pause(self, name: str) -> None:
        """Stop a node with SIGSTOP."""
        self._server(name).pause()

    def resume(self, name: str) -> None:
        """Continue a node with SIGCONT."""
        self._server(name).resume()

    def terminate(self, name: str, *, timeout_s: float = TERMINATE_TIMEOUT_S) -> int:
        """Send SIGTERM and return the exit code. Raises TimeoutError when the node does not end."""
        process = self._server(name).process
        process.send_signal(signal.SIGTERM)
        return process.wait(timeout_s)

    def _servers(self) -> dict[str, Server]:
        return {**{member.name: member for member in self.etcd.members}, **self.nodes, **self._postgres}

    def _server(self, name: str) -> Server:
        return self._servers().get(name) or self.node(name)

    def link(self, client: str, server: str) -> Link:
        """Return the link from `client` (a node, or "cli") to `server`, which need not be connected yet."""
        if self._loop is None:
            raise RuntimeError("this cluster was made with links=False")
        if server not in self._proxies:
            raise LookupError(f"no server {server}; there are {', '.join(self._proxies)}")
        key = (client, server)
        with self._links_lock:
            if key not in self._links:
                self._links[key] = Link(self._loop, f"{client} -> {server}")
            return self._links[key]

    def links_of(self, name: str) -> list[Link]:
        """Return every link of a node, as client or server. Cutting them all isolates the node."""
        ends = self._servers()
        links = [self.link(name, other) for other in ends if other != name and other in self._proxies]
        if name in self._proxies:
            links += [self.link(other, name) for other in [*ends, CLI] if other != name]
        return links

    def heal(self) -> None:
        """Remove all rules from all links."""
        for link in list(self._links.values()):
            link.heal()

    @property
    def etcd_names(self) -> list[str]:
        return [member.name for member in self.etcd.members]

    def _proxy(self, name: str, address: str) -> str:
        """Return the address that clients of a server dial: that of its proxy, if there are proxies."""
        if self._loop is None:
            return address
        if name not in self._proxies:

            def classify(client: tuple[str, int]) -> Link:
                return self.link(client_name(client, self._pids()) or CLI, name)

            self._proxies[name] = TcpProxy(parse_address(address)[0], address, loop=self._loop, name=name, classify=classify)
        return self._proxies[name].endpoint

    def _pids(self) -> dict[str, int]:
        return {name: node.process.pid for name, node in list(self.nodes.items()) if node.process.running}

    @property
    def admin_endpoints(self) -> list[str]:
        """Return the addresses of all owners as the CLI dials them, through the proxies."""
        return [self.nodes[name].advertised for name in self.owners]

    @property
    def etcd_endpoints(self) -> list[str]:
        """Return the addresses of etcd as the nodes dial them."""
        return [self._proxy(member.name, member.endpoint) for member in self.etcd.members]

    @property
    def admin(self) -> Admin:
        """Return a client that reads the admin API without going through the proxies."""
        if self._admin is None:
            self._admin = Admin([self.nodes[name].address for name in self.owners])
        return self._admin

    def uri(self, server: str, dbname: str) -> str:
        """Return the URI of a database as the nodes dial it."""
        postgres = self._postgres[server]
        return postgres.uri(dbname, endpoint=self._proxy(server, postgres.endpoint))

    def owner_cli(self, *arguments: str, timeout_s: float = CLI_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        """Run `owner ARGUMENTS`, whatever its exit code. Raises TimeoutError when it does not end."""
        environment = service_environment(self._environment)
        environment["TABLEWIRE_ENDPOINTS"] = ",".join(self.admin_endpoints)
        command = [sys.executable, "-m", "owner", *arguments]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=ROOT, env=environment
            )
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"owner {' '.join(arguments)}: did not end within {timeout_s:g} s") from None

    def owner_json(self, *arguments: str, timeout_s: float = CLI_TIMEOUT_S) -> Json:
        """Return what `owner ARGUMENTS -o json` prints. Raises CliError for an exit code other than 0."""
        done = self.owner_cli(*arguments, "-o", "json", timeout_s=timeout_s)
        if done.returncode != 0:
            raise CliError(f"owner {' '.join(arguments)}: exit code {done.returncode}: {(done.stderr or done.stdout).strip()}")
        answer: Json = json.loads(done.stdout)
        return answer

    def leader(self) -> str | None:
        """Return the name of the leading owner, None while there is none or no owner is reachable."""
        try:
            leader = self.admin.status()["leader"]
        except AdminError:
            return None
        names = {node.advertised: name for name, node in self.nodes.items() if node.kind == OWNER}
        return names.get(leader["address"]) if leader is not None else None

    def captures(self) -> dict[str, str]:
        """Return processor node -> (newest) capture id, empty while no leader is reachable."""
        try:
            rows = self.admin.captures()
        except AdminError:
            return {}
        rows.sort(key=lambda row: row["state"] != "silent")
        return {row["labels"]["node"]: row["id"] for row in rows if "node" in row["labels"]}

    def wait(self, what: str, condition: Callable[[], object], timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Wait until condition() is true; AdminError counts as false. Raises TimeoutError."""

        def holds() -> bool:
            try:
                return bool(condition())
            except AdminError:
                return False

        wait_until(what, holds, timeout_s)

    def wait_for_leader(self, *, other_than: str | None = None, timeout_s: float = WAIT_TIMEOUT_S) -> str:
        """Wait until an owner leads, other than `other_than` if given, and return its name."""
        what = f"an owner leads{f' other than {other_than}' if other_than else ''}"
        leader = wait_until(what, lambda: None if (leader := self.leader()) == other_than else leader, timeout_s)
        assert leader is not None
        return leader

    def wait_replicating(self, changefeed: str = "", *, tables: int | None = None, timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Wait until all spans, and at least `tables`, replicate on live processors."""

        def steady() -> bool:
            rows = self.admin.tables(changefeed)
            alive = {row["id"] for row in self.admin.captures()}
            return len(rows) >= (tables or 1) and all(
                row["state"] == "replicating" and row["primary"] in alive and not row["stall_reason"] for row in rows
            )

        self.wait(f"all tables of changefeed {changefeed or 'the only one'} are replicating", steady, timeout_s)

    def wait_checkpoint(self, ts: int, changefeed: str = "", timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Wait until the changefeed's global checkpoint has reached ts."""
        self.wait(
            f"checkpoint of {changefeed or 'the changefeed'} reaches {ts}",
            lambda: self.admin.changefeed(changefeed)["checkpoint_ts"] >= ts,
            timeout_s,
        )

    def collect(self, target: Path) -> Path:
        """Write all logs and configurations, the content of etcd, and the admin API's answers to `target`."""
        target.mkdir(parents=True, exist_ok=True)
        files = {f"{name}.log": server.log for name, server in self._servers().items()}
        files |= {f"{name}.toml": node.config_file for name, node in self.nodes.items()}
        for name, path in files.items():
            if path.exists():
                shutil.copy(path, target / name)
        dump = next((found for member in self.etcd.members if (found := member.dump()) is not None), None)
        text = json.dumps(dump, indent=1, sort_keys=True) if dump is not None else "no etcd member is reachable"
        (target / "etcd.json").write_text(text, encoding="utf-8")
        (target / "owner.json").write_text(json.dumps(self._admin_answers(), indent=1), encoding="utf-8")
        return target

    def _admin_answers(self) -> Json:
        """Return what the admin API answers to each read, up to the first failure."""
        answers: Json = {}
        try:
            answers["status"] = self.admin.status()
            answers["captures"] = self.admin.captures()
            answers["changefeeds"] = self.admin.changefeeds()
            answers["tables"] = {row["changefeed"]: self.admin.tables(row["changefeed"]) for row in answers["changefeeds"]}
        except AdminError as error:
            answers["error"] = str(error)
        return answers

    def _config(self, kind: str, name: str) -> dict[str, Any]:
        config: dict[str, Any] = {
            "cluster": self.name,
            "etcd": {"endpoints": self.etcd_endpoints, "lease_ttl_ms": self._lease_ttl_ms},
            "log": {"format": "json"},
        }
        config |= {"id": name} if kind == OWNER else {"name": name, "labels": {"node": name}}
        for key, value in self._configs[kind].items():
            config[key] = {**config.get(key, {}), **value} if isinstance(value, Mapping) else value
        return config
