"""A cluster of real processes with TLS on every connection: gRPC and etcd with client certificates
(also between the members of etcd), PostgreSQL with a password.

deploy/tls/make-certs.sh makes a certificate for each role. Owners accept owners and the CLI,
processors accept owners.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

from deploy.local.etcd import etcd_binary
from deploy.local.net import free_port
from deploy.local.node import OWNER, PROCESSOR, ROOT, Node, service_environment
from deploy.local.postgres import PostgresServer
from deploy.local.process import ManagedProcess, wait_until
from deploy.local.proxy import TcpProxy
from tablewire.errors import EtcdError
from tablewire.etcd.session import EtcdSession, etcd_credentials
from tablewire.runtime.sections import ClientTlsSection

MAKE_CERTS = ROOT / "deploy/tls/make-certs.sh"
HOST = "127.0.0.1"
USER = "replicator"
PASSWORD = "s3cr3t/p@ss:w0rd"
"""Of USER; with characters that a URI has to encode."""
WAIT_S = 60.0
CALLERS = {OWNER: ["tablewire-owner", "tablewire-cli"], PROCESSOR: ["tablewire-owner"]}


def make_certs(folder: Path, *hosts: str) -> Path:
    """Run the script as an operator would; return the folder."""
    done = subprocess.run([str(MAKE_CERTS), str(folder), *hosts], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return folder


def identity(certs: Path, role: str) -> dict[str, Any]:
    """Return the keys of a TLS section."""
    return {"enabled": True, "ca_file": f"{certs}/ca.pem", "cert_file": f"{certs}/{role}.pem", "key_file": f"{certs}/{role}.key"}


class TlsWorld:
    """Two owners, two processors, etcd, one PostgreSQL with the databases `source` and `sink`."""

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str] = MappingProxyType({}),
        *,
        members: int = 1,
        lease_ttl_ms: int = 3_000,
        links: bool = False,
    ) -> None:
        """members: of etcd. links: each service is reached through a proxy, `proxies[its name]`."""
        self.folder = folder
        self.certs = make_certs(folder / "certs")
        self.outputs: list[str] = []
        """Whatever the CLI has printed."""
        self.postgres = PostgresServer(folder)
        self._environment = dict(environment)
        self._lease_ttl_ms = lease_ttl_ms
        self._ports = [(free_port(HOST), free_port(HOST)) for _ in range(members)]
        self.etcd = [
            ManagedProcess(f"etcd{at}", self._etcd_command(at), log=folder / f"etcd{at}.log", env=_without("ETCD_"))
            for at in range(members)
        ]
        names = [(OWNER, "owner0"), (OWNER, "owner1"), (PROCESSOR, "processor0"), (PROCESSOR, "processor1")]
        self.nodes = {name: self.new_node(kind, name) for kind, name in names}
        self.proxies = {name: TcpProxy(HOST, node.address, name=name) for name, node in self.nodes.items()} if links else {}
        for name, proxy in self.proxies.items():
            self.nodes[name].advertised = proxy.endpoint
            self.nodes[name].on_address = proxy.retarget

    @property
    def etcd_endpoints(self) -> list[str]:
        return [f"{HOST}:{port}" for port, _ in self._ports]

    @property
    def peer_endpoints(self) -> list[str]:
        """Return the peer endpoints of the members of etcd."""
        return [f"{HOST}:{port}" for _, port in self._ports]

    @property
    def owners(self) -> list[str]:
        return [node.address for node in self.nodes.values() if node.kind == OWNER]

    def new_node(self, kind: str, name: str, certs: Path | None = None) -> Node:
        """Return a node that is not started.

        certs: the folder of its certificates, by default that of the cluster.
        """
        peer = identity(certs or self.certs, kind)
        config: dict[str, Any] = {
            "cluster": "tls",
            "etcd": {"endpoints": self.etcd_endpoints, "lease_ttl_ms": self._lease_ttl_ms, "tls": peer},
            "tls": {**peer, "allowed_common_names": CALLERS[kind]},
            "log": {"format": "json", "level": "debug"},
            "id" if kind == OWNER else "name": name,
        }
        return Node(name, kind, self.folder, HOST, config, self._environment)

    def start(self) -> None:
        for member in self.etcd:
            member.start()
        self._start_postgres()
        self.wait_etcd()
        for node in self.nodes.values():
            node.start()
        for node in self.nodes.values():
            node.wait_ready()
        wait_until("both processors are registered", lambda: sum(self.ask("status")["captures_by_state"].values()) == 2, WAIT_S)

    def close(self) -> None:
        for node in self.nodes.values():
            print(f"--- {node.name}\n{self.log(node)[-4_000:]}")
            node.process.kill()
        for proxy in self.proxies.values():
            proxy.close()
        for member in self.etcd:
            member.kill()
        self.postgres.close()

    def log(self, node: Node) -> str:
        return node.log.read_text() if node.log.exists() else ""

    def wait_etcd(self) -> None:
        """Wait until each member answers."""
        for endpoint in self.etcd_endpoints:
            with closing(self.etcd_session(endpoint)) as session:

                def answers(session: EtcdSession = session) -> bool:
                    try:
                        return session.get("/nothing") is None
                    except EtcdError:
                        return False

                wait_until(f"etcd answers at {endpoint}", answers, WAIT_S)

    def etcd_session(self, *endpoints: str) -> EtcdSession:
        return EtcdSession(
            endpoints or self.etcd_endpoints, credentials=etcd_credentials(ClientTlsSection(**identity(self.certs, "etcd")))
        )

    def cli(self, *arguments: str, role: str = "cli", certs: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run `owner ARGUMENTS` with the certificate of a role; never raise for its exit code."""
        files = identity(certs or self.certs, role)
        flags = ["--tls-ca-file", files["ca_file"], "--tls-cert-file", files["cert_file"], "--tls-key-file", files["key_file"]]
        environment = {**service_environment(self._environment), "TABLEWIRE_ENDPOINTS": ",".join(self.owners)}
        done = subprocess.run(
            [sys.executable, "-m", "owner", *flags, *arguments],
            capture_output=True, text=True, check=False, timeout=120, cwd=ROOT, env=environment,
        )  # fmt: skip
        self.outputs += [done.stdout, done.stderr]
        return done

    def ask(self, *arguments: str) -> dict[str, Any]:
        """Return the output of `owner ARGUMENTS -o json`, which must succeed."""
        done = self.cli(*arguments, "-o", "json")
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def uri(self, database: str, password: str = quote(PASSWORD, safe=""), ca_file: Path | None = None) -> str:
        """Return a URI with TLS and full verification. password: percent-encoded, or `${VARIABLE}`."""
        tls_part = f"sslmode=verify-full&sslrootcert={ca_file or self.certs / 'ca.pem'}"
        return f"postgresql://{USER}:{password}@{self.postgres.endpoint}/{database}?{tls_part}"

    def _etcd_command(self, at: int) -> list[str]:
        """Return the command line as in docs/security.md: the client port and the peer port require
        client certificates.
        """
        urls = [(f"https://{HOST}:{client}", f"https://{HOST}:{peer}") for client, peer in self._ports]
        url, peer_url = urls[at]
        return [
            etcd_binary(), f"--name=e{at}", f"--data-dir={self.folder}/etcd{at}", f"--listen-client-urls={url}",
            f"--advertise-client-urls={url}", f"--listen-peer-urls={peer_url}", f"--initial-advertise-peer-urls={peer_url}",
            "--initial-cluster=" + ",".join(f"e{number}={peer}" for number, (_, peer) in enumerate(urls)),
            f"--cert-file={self.certs}/etcd.pem", f"--key-file={self.certs}/etcd.key", f"--trusted-ca-file={self.certs}/ca.pem",
            "--client-cert-auth", f"--peer-cert-file={self.certs}/etcd.pem", f"--peer-key-file={self.certs}/etcd.key",
            f"--peer-trusted-ca-file={self.certs}/ca.pem", "--peer-client-cert-auth", "--log-level=warn",
        ]  # fmt: skip

    def _start_postgres(self) -> None:
        """Start a server that accepts only TLS, with a password except for postgres.

        The key must belong to the server's user.
        """
        self.postgres.start()
        execute = self.postgres.execute
        for database in ("source", "sink"):
            self.postgres.create_database(database)
        execute(f"CREATE ROLE {USER} SUPERUSER REPLICATION LOGIN PASSWORD '{PASSWORD}'")
        data = Path(str(execute("SHOW data_directory")[0][0]))
        owner = data.stat()
        for source, target in (("postgres.pem", "server.crt"), ("postgres.key", "server.key"), ("ca.pem", "root.crt")):
            shutil.copyfile(self.certs / source, data / target)
            os.chown(data / target, owner.st_uid, owner.st_gid)
            (data / target).chmod(0o600)
        (data / "pg_hba.conf").write_text(f"hostssl all postgres {HOST}/32 trust\nhostssl all all {HOST}/32 scram-sha-256\n")
        execute("ALTER SYSTEM SET ssl = on")
        self.postgres.restart()


def _without(prefix: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(prefix)}
