"""The owner process: it campaigns, leads for one term after another, and serves the admin API and
HTTP all the time.

Threads: main (waits for a signal), "tick" (campaigns; during a term it owns all schedulers),
"lease" and "watch owner" (election), "watch" (the state in etcd), "store" (writes to etcd),
"changefeed ..." (one for each source), "exchange-..." (one for each processor), "admin" (gRPC's
pool), "http".

`OwnerService` is the `OwnerPort` of the admin API, which reads the result of the last round and
never waits for a tick.
"""

from __future__ import annotations

import secrets
import socket
import sys
import threading
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import structlog

from owner.admin.grpc_service import SERVICE_NAMES, AdminServer, new_admin_server
from owner.changefeed.run import ChangefeedRun
from owner.changefeed.source_worker import ChangefeedWorker
from owner.changefeed.sources import new_source
from owner.changefeed.store import EtcdChangefeeds
from owner.exchange.hub import ExchangeHub, ProcessorClientView
from owner.leadership.election import Election, Leadership
from owner.leadership.term import Term
from owner.owner_config import OwnerConfig
from owner.owner_metrics import OwnerMetrics
from tablewire.errors import ClosedError, EtcdError, OperatingError
from tablewire.etcd.lease import lease_clock
from tablewire.etcd.session import open_session
from tablewire.model.ids import ChangefeedID
from tablewire.runtime import logs
from tablewire.runtime.grpc import ServerHealth, add_health_and_reflection, listen, open_channel
from tablewire.runtime.http import HttpServer
from tablewire.runtime.shutdown import Shutdown, run_thread
from tablewire.runtime.tls import interceptors, renewed_channel_credentials, server_credentials, warn_of_roles
from tablewire.runtime.version import software_version
from tablewire.wire.versions import SUPPORTED_VERSIONS, ProtocolVersions

EXIT_DONE = 0
EXIT_FAILED = 1
CAMPAIGN_WAIT_S = 1.0
STOP_TIMEOUT_S = 10.0
HANGS_AFTER_S = 15.0
"""After this long without a tick, /healthz fails and the owner resigns."""
HEALTH_INTERVAL_S = 1.0

_log = structlog.get_logger("owner.service")


class OwnerService:
    """run: the main thread. Everything else: any thread."""

    def __init__(self, config: OwnerConfig, shutdown: Shutdown, *, protocols: ProtocolVersions = SUPPORTED_VERSIONS) -> None:
        """Bind the ports (OperatingError if one is not free). Nothing runs before `run`. protocols:
        of the wire."""
        self._protocols = protocols
        self._config = config
        self.cluster = config.cluster
        self.new_source = new_source
        self._shutdown = shutdown
        self.owner_id = config.id or f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self.term: Term | None = None
        self._workers: Mapping[ChangefeedID, ChangefeedWorker] = {}
        self._wake = threading.Event()
        self._stopping = False
        self._metrics = OwnerMetrics(software_version(), self)
        peer_credentials = renewed_channel_credentials(config.tls)
        self._admin: AdminServer = new_admin_server(
            self,
            lambda address: open_channel(address, peer_credentials() if peer_credentials is not None else None),
            interceptors(config.tls),
        )
        self._health: ServerHealth = add_health_and_reflection(self._admin.server, SERVICE_NAMES)
        port = listen(self._admin.server, config.admin.host, config.admin.port, server_credentials(config.tls))
        self.address = config.admin.advertise or f"{config.admin.host}:{port}"
        self._http: HttpServer | None = None
        if config.http.enabled:
            self._http = HttpServer(
                config.http.host, config.http.port, self._metrics.registry, healthz=self._healthy, readyz=self._ready
            )
        self._session = open_session(config.etcd)
        self.election = Election(
            self._session,
            config.cluster,
            self.owner_id,
            self.address,
            ttl_s=config.etcd.ttl_s,
            margin_s=config.etcd.margin_s,
            version=software_version(),
            on_change=self.wake,
        )
        self._hub = ExchangeHub(
            self.owner_id,
            config=config.exchange,
            on_answer=self._answered,
            may_send=self._may_send,
            credentials=peer_credentials,
            clock=lease_clock,
        )
        self.changefeeds = EtcdChangefeeds(self._session, config.cluster, self.election.guarded_write)

    # -- the main thread ----------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Serve until asked to stop, and return the exit code. OperatingError: etcd did not answer
        in time at the start."""
        if self._http is not None:
            self._http.start()
        timeout_ms = self._config.etcd.start_timeout_ms
        try:
            self.election.start(timeout_ms / 1000 if timeout_ms else None)
        except EtcdError:
            self._close()
            raise
        self._admin.server.start()
        tick = run_thread("tick", self._run)
        warn_of_roles(self._config.tls)
        _log.info(
            "owner_ready",
            address=self.address,
            http=f"{self._http.host}:{self._http.port}" if self._http is not None else "",
            cluster=self._config.cluster,
        )
        self._monitor()
        _log.info("stopping", reason=self._shutdown.reason, leading=self.is_leading())
        self._stopping = True
        term = self.term
        if term is not None:
            term.stop("this owner is leaving")
        self.wake()
        tick.join(STOP_TIMEOUT_S)
        self._close()
        _log.info("owner_left")
        return EXIT_DONE

    def _monitor(self) -> None:
        """Keep gRPC's health equal to /readyz and resign if the tick hangs, until asked to stop.

        A hang is confirmed by a second look: a process that continues after SIGSTOP has not ticked
        for long either.
        """
        hung_before = False
        while True:
            hung = self._healthy()
            self._health.set_serving(not self._ready())
            if hung and hung_before and self.election.leadership() is not None:
                _log.error("tick_hangs", reason=hung)
                self._resign()
            hung_before = bool(hung)
            if self._shutdown.wait(HEALTH_INTERVAL_S):
                return

    def _resign(self) -> None:
        try:
            self.election.resign()
        except (EtcdError, ClosedError) as error:
            _log.warning("resign_failed", reason=str(error))

    def _close(self) -> None:
        self._health.leave()
        self.election.close()
        self._admin.close()
        self._hub.close()
        if self._http is not None:
            self._http.close()
        self._session.close()

    # -- the thread "tick" --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            leadership = self.election.leadership()
            if leadership is None:
                self._wake.wait(CAMPAIGN_WAIT_S)
                continue
            self._lead(leadership)

    def _lead(self, leadership: Leadership) -> None:
        self._metrics.elections.inc()
        _log.info("leads", owner_revision=leadership.revision)
        term = self.term = Term(
            leadership,
            owner_id=self.owner_id,
            config=self._config,
            session=self._session,
            election=self.election,
            hub=self._hub,
            changefeeds=self.changefeeds,
            counters=self._metrics.placement,
            observe_tick=self._metrics.tick_seconds.observe,
            previous_workers=self._workers,
            protocols=self._protocols,
        )
        if self._stopping:
            term.stop("this owner is leaving")
        reason = term.run()
        self.term = None
        _log.warning("steps_down", owner_revision=leadership.revision, reason=reason)
        now = self.election.leadership()
        if now is not None and now.revision == leadership.revision:
            self._resign()  # the term was stopped; the next owner must not have to wait for the lease
        term.close()
        self._workers = term.workers

    # -- for metrics, http and the hub --------------------------------------------------------------------------------

    def is_leading(self) -> bool:
        term, leadership = self.term, self.election.leadership()
        return term is not None and leadership is not None and leadership.revision == term.revision

    def runs(self) -> Mapping[ChangefeedID, ChangefeedRun]:
        term = self.term
        return term.runs if term is not None else MappingProxyType({})

    def client_views(self) -> Iterable[ProcessorClientView]:
        return self._hub.client_views()

    def margin_s(self) -> float | None:
        leadership = self.election.leadership()
        return leadership.remaining_s() if leadership is not None else None

    def _may_send(self) -> bool:
        """Return whether the term of the hub leads now. Called under the hub's lock right before
        each Exchange."""
        leadership = self.election.leadership()
        return leadership is not None and leadership.revision == self._hub.owner_revision

    def _answered(self, matters: bool) -> None:
        if matters:
            self.wake()

    def _ready(self) -> str:
        """Return why /readyz fails; empty if it does not. A follower is ready too, since it
        forwards calls to the leader."""
        if self._stopping:
            return "stopping"
        if self.election.error:
            return f"no candidate: {self.election.error}"
        return self._healthy() if self.election.leader() is not None else "no owner leads"

    def _healthy(self) -> str:
        """Return why /healthz fails; empty if it does not. The loss of etcd is no reason, because a
        restart would not help."""
        term = self.term
        since_tick_s = term.since_tick_s() if term is not None and term.is_loaded else 0.0
        return f"no tick for {since_tick_s:.0f} s" if since_tick_s > HANGS_AFTER_S else ""

    # -- OwnerPort, with the attributes above -------------------------------------------------------------------------

    def wake(self) -> None:
        self._wake.set()
        term = self.term
        if term is not None:
            term.wake()


def serve(config: OwnerConfig, protocols: ProtocolVersions = SUPPORTED_VERSIONS) -> None:
    """Run an owner until SIGTERM, and exit with its exit code. Print one line on stderr if it
    cannot start."""
    shutdown = Shutdown()
    shutdown.install()
    try:
        service = OwnerService(config, shutdown, protocols=protocols)
        logs.configure(config.log.format, config.log.level, service="owner", owner=service.owner_id)
        code = service.run()
    except OperatingError as error:
        sys.stderr.write(f"Error: {error}\n")
        code = EXIT_FAILED
    finally:
        shutdown.uninstall()
    sys.exit(code)
