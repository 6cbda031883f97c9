"""A whole Tablewire cluster of real processes on this machine, every node at a loopback address of its own.

    with Cluster(folder, etcd=3, owners=2, processors=3, postgres={"source": server, "sink": server}) as cluster:
        cluster.owner_json("changefeed", "create", "--id", "one", "--source", cluster.uri("source", "db"), ...)
        cluster.link("owner0", "processor1").cut()
        cluster.kill("processor2")

Nodes are named etcd0.., owner0.., processor0.., and the PostgreSQL servers as the caller names them. Every connection goes
through a proxy of ours (`links=True`), so that each link can be cut, delayed, stalled and reset by the names of its two ends:
node -> etcd member, owner -> processor, owner -> owner, processor or owner -> PostgreSQL, and
"cli" (whatever is no node) -> anything. A server advertises its proxy's address; which link an accepted connection belongs
to is found from the process that dialled (`identify.py`).
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
from deploy.local.process import ManagedProcess, Scoped, wait_until
from deploy.local.proxy import Link, ProxyLoop, TcpProxy

CLI = "cli"
CLI_TIMEOUT_S = 120.0
LEASE_TTL_MS = 3_000
WAIT_TIMEOUT_S = 60.0
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_HOSTS = {"etcd": 1, OWNER: 21, PROCESSOR: 51}


class CliError(Exception):
    """The owner CLI ended with another exit code than 0; the text is what it said."""


class Cluster(Scoped):
    """Start it, use it, close it. Methods may be called from one thread; `link(...)`'s rules from any."""

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
        """postgres: running servers by the names of their ends of links; not closed here. lease_ttl_ms: of owners and
        processors. links False: no proxies, nodes dial each other directly. owner_config, processor_config: further keys of
        the services, as nested tables. environment: further variables of the services and the CLI."""
        self.folder = folder
        self.name = name
        self._subnet = Subnet.any()
        self._links_on = links
        self._lease_ttl_ms = lease_ttl_ms
        self._postgres = dict(postgres)
        self._environment = dict(environment)
        self._configs = {OWNER: owner_config, PROCESSOR: processor_config}
        self.etcd = EtcdCluster(
            folder, etcd, [self._subnet.host(_HOSTS["etcd"] + i) for i in range(etcd)], settings=etcd_settings
        )
        self._counts = {OWNER: owners, PROCESSOR: processors}
        self.nodes: dict[str, Node] = {}
        self._loop = ProxyLoop() if links else None
        self._proxies: dict[str, TcpProxy] = {}
        self._links: dict[tuple[str, str], Link] = {}
        self._links_lock = threading.Lock()  # the proxies' thread makes links too
        self._admin: Admin | None = None

    # ------------------------------------------------------------------------------------------------------------------
    # Life

    def start(self) -> None:
        """Start everything and wait until all nodes are ready and one owner leads. StartError otherwise."""
        self.etcd.start()
        for member in self.etcd.members:
            self._proxy(member.name, member.endpoint)
        for server_name, server in self._postgres.items():
            self._proxy(server_name, server.endpoint)
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
        """A further owner or processor, not started yet."""
        name = f"{kind}{number}"
        host = self._subnet.host(_HOSTS[kind] + number)
        node = Node(name, kind, self.folder, host, self._config(kind, name), self._environment)
        node.advertised = self._proxy(name, node.address)
        if name in self._proxies:
            node.on_address = self._proxies[name].retarget
        self.nodes[name] = node
        return node

    def close(self) -> None:
        """Kill everything that runs. Files stay: they are in the caller's folder. Idempotent."""
        if self._admin is not None:
            self._admin.close()
            self._admin = None
        for node in self.nodes.values():
            node.process.kill()
        self.etcd.kill()
        if self._loop is not None:
            self._loop.close()

    # ------------------------------------------------------------------------------------------------------------------
    # Nodes

    @property
    def owners(self) -> list[str]:
        return [name for name, node in self.nodes.items() if node.kind == OWNER]

    @property
    def processors(self) -> list[str]:
        return [name for name, node in self.nodes.items() if node.kind == PROCESSOR]

    def node(self, name: str) -> Node:
        """LookupError when there is none."""
        if name not in self.nodes:
            raise LookupError(f"no node {name}; there are {', '.join(self.nodes)}")
        return self.nodes[name]

    def start_node(self, name: str, *, wait: bool = True) -> None:
        """Start a node (or an etcd member) that was killed or has ended, as a new process at the same address."""
        if name.startswith("etcd"):
            self.etcd.member(name).start()
            return
        self.node(name).start()
        if wait:
            self.node(name).wait_ready()

    def kill(self, name: str) -> None:
        """SIGKILL; returns when the process is gone."""
        self._process(name).kill()

    def pause(self, name: str) -> None:
        """SIGSTOP."""
        self._process(name).pause()

    def resume(self, name: str) -> None:
        """SIGCONT."""
        self._process(name).resume()

    def terminate(self, name: str, *, timeout_s: float = TERMINATE_TIMEOUT_S) -> int:
        """SIGTERM, and wait until it has left by itself; its exit code. TimeoutError when it does not leave."""
        process = self._process(name)
        process.send_signal(signal.SIGTERM)
        return process.wait(timeout_s)

    def _process(self, name: str) -> ManagedProcess:
        if name.startswith("etcd"):
            return self.etcd.member(name).process
        if name in self._postgres:
            return self._postgres[name].process
        return self.node(name).process

    # ------------------------------------------------------------------------------------------------------------------
    # Links

    def link(self, client: str, server: str) -> Link:
        """What `client` says to `server`: names of nodes, or "cli" as client. It may be ruled before its first connection."""
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
        """Every link that this node has as client or as server: cutting them all isolates it."""
        ends = [*self.etcd_names, *self.nodes, *self._postgres]
        links = [self.link(name, other) for other in ends if other != name and other in self._proxies]
        if name in self._proxies:
            links += [self.link(other, name) for other in [*ends, CLI] if other != name]
        return links

    def heal(self) -> None:
        """No rule on any link any more."""
        for link in list(self._links.values()):
            link.heal()

    @property
    def etcd_names(self) -> list[str]:
        return [member.name for member in self.etcd.members]

    def _proxy(self, name: str, address: str) -> str:
        """The address that clients of this server dial."""
        if self._loop is None:
            return address
        if name not in self._proxies:

            def classify(client: tuple[str, int]) -> Link:
                return self.link(client_name(client, self._pids()) or CLI, name)

            self._proxies[name] = TcpProxy(address.rsplit(":", 1)[0], address, loop=self._loop, name=name, classify=classify)
        return self._proxies[name].endpoint

    def _pids(self) -> dict[str, int]:
        return {name: node.process.pid for name, node in list(self.nodes.items()) if node.process.running}

    # ------------------------------------------------------------------------------------------------------------------
    # What it says

    @property
    def admin_endpoints(self) -> list[str]:
        """Of all owners, as the CLI dials them (through the proxies)."""
        return [self.nodes[name].advertised for name in self.owners]

    @property
    def etcd_endpoints(self) -> list[str]:
        """As the nodes dial them."""
        return [self._proxy(member.name, member.endpoint) for member in self.etcd.members]

    @property
    def admin(self) -> Admin:
        """Reads of the admin API, past the proxies."""
        if self._admin is None:
            self._admin = Admin([self.nodes[name].address for name in self.owners])
        return self._admin

    def uri(self, server: str, dbname: str) -> str:
        """A database's URI as the nodes shall dial it."""
        postgres = self._postgres[server]
        return postgres.uri(dbname, endpoint=self._proxy(server, postgres.endpoint))

    def owner_cli(self, *arguments: str, timeout_s: float = CLI_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        """Run `owner ARGUMENTS` against all owners; never raises for its exit code. TimeoutError when it does not end."""
        environment = service_environment(self._environment)
        environment["TABLEWIRE_ENDPOINTS"] = ",".join(self.admin_endpoints)
        command = [sys.executable, "-m", "owner", *arguments]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=ROOT, env=environment
            )
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"owner {' '.join(arguments)}: no answer within {timeout_s:g} s") from None

    def owner_json(self, *arguments: str, timeout_s: float = CLI_TIMEOUT_S) -> Json:
        """What `owner ARGUMENTS -o json` answers; CliError when it ended with another exit code than 0."""
        done = self.owner_cli(*arguments, "-o", "json", timeout_s=timeout_s)
        if done.returncode != 0:
            raise CliError(f"owner {' '.join(arguments)}: exit code {done.returncode}: {(done.stderr or done.stdout).strip()}")
        answer: Json = json.loads(done.stdout)
        return answer

    def leader(self) -> str | None:
        """The node that leads, None while nobody does or nobody answers."""
        try:
            leader = self.admin.status()["leader"]
        except AdminError:
            return None
        if leader is None:
            return None
        return next((name for name in self.owners if self.nodes[name].advertised == leader["address"]), None)

    def captures(self) -> dict[str, str]:
        """Processor node -> its capture id (the one that answers, after a restart). Empty while no leader answers."""
        try:
            rows = self.admin.captures()
        except AdminError:
            return {}
        found: dict[str, str] = {}
        for row in sorted(rows, key=lambda row: row["state"] != "silent"):
            node = row["labels"].get("node")
            if node is not None:
                found[node] = row["id"]
        return found

    def wait(self, what: str, condition: Callable[[], object], timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Until condition() is true; an AdminError inside of it counts as not yet. TimeoutError that names `what`."""

        def holds() -> bool:
            try:
                return bool(condition())
            except AdminError:
                return False

        wait_until(what, holds, timeout_s)

    def wait_for_leader(self, *, other_than: str | None = None, timeout_s: float = WAIT_TIMEOUT_S) -> str:
        """The name of the node that leads, as soon as one does (another one than given)."""
        found: list[str] = []

        def led() -> bool:
            leader = self.leader()
            if leader is None or leader == other_than:
                return False
            found.append(leader)
            return True

        wait_until(f"an owner leads{f' other than {other_than}' if other_than else ''}", led, timeout_s)
        return found[0]

    def wait_replicating(self, changefeed: str = "", *, tables: int | None = None, timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Until every span of the changefeed (and at least so many) is replicating with a primary that is alive."""

        def steady() -> bool:
            rows = self.admin.tables(changefeed)
            alive = {row["id"] for row in self.admin.captures()}
            return len(rows) >= (tables or 1) and all(
                row["state"] == "replicating" and row["primary"] in alive and not row["stall_reason"] for row in rows
            )

        self.wait(f"all tables of changefeed {changefeed or 'the only one'} are replicating", steady, timeout_s)

    def wait_checkpoint(self, ts: int, changefeed: str = "", timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Until the changefeed's global checkpoint has reached ts."""
        self.wait(
            f"checkpoint of {changefeed or 'the changefeed'} reaches {ts}",
            lambda: self.admin.changefeed(changefeed)["checkpoint_ts"] >= ts,
            timeout_s,
        )

    def collect(self, target: Path) -> Path:
        """Copy all logs and configurations, and write what etcd holds, to `target`: what one needs after a failure."""
        target.mkdir(parents=True, exist_ok=True)
        files = {f"{name}.log": node.log for name, node in self.nodes.items()}
        files |= {f"{name}.toml": node.config_file for name, node in self.nodes.items()}
        files |= {f"{name}.log": server.log for name, server in self._postgres.items()}
        files |= {f"{member.name}.log": member.log for member in self.etcd.members}
        for name, path in files.items():
            if path.exists():
                shutil.copy(path, target / name)
        dump = next((found for member in self.etcd.members if (found := member.dump()) is not None), None)
        text = json.dumps(dump, indent=1, sort_keys=True) if dump is not None else "no etcd member answered"
        (target / "etcd.json").write_text(text, encoding="utf-8")
        (target / "owner.json").write_text(json.dumps(self._what_the_owner_says(), indent=1), encoding="utf-8")
        return target

    def _what_the_owner_says(self) -> Json:
        """Everything that the admin API can be asked for, as far as it answers."""
        said: Json = {}
        try:
            said["status"] = self.admin.status()
            said["captures"] = self.admin.captures()
            said["changefeeds"] = self.admin.changefeeds()
            said["tables"] = {row["changefeed"]: self.admin.tables(row["changefeed"]) for row in said["changefeeds"]}
        except AdminError as error:
            said["error"] = str(error)
        return said

    def _config(self, kind: str, name: str) -> dict[str, Any]:
        config: dict[str, Any] = {
            "cluster": self.name,
            "etcd": {"endpoints": self.etcd_endpoints, "lease_ttl_ms": self._lease_ttl_ms},
            "log": {"format": "json"},
        }
        if kind == OWNER:
            config["id"] = name
        else:
            config["name"] = name
            config["labels"] = {"node": name}
        for key, value in self._configs[kind].items():
            config[key] = {**config.get(key, {}), **value} if isinstance(value, Mapping) else value
        return config
