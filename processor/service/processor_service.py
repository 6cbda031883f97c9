"""The processor's life: register, serve, fence itself, come back under a new id, and leave when asked.

One `Capture` is one capture id: a registration under a lease, an Exchange server, and the agents' loop. When its lease cannot
be relied on any more, `may_write` says no to every executor at that same moment, the agents are closed, and only when no write
can follow any more the service registers anew, under another id. An executor that does not stop in time takes the process with
it: then no write can follow either.

Threads: main (this module), "agents" (host.py), "exchange" (gRPC's pool), "lease" and "watch capture" (registration), "open ..."
and "close ..." (a changefeed's executor being made and closed), "http".
"""

from __future__ import annotations

import os
import random
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable

import structlog

from processor.processor_config import ProcessorConfig
from processor.service.agents import AgentHost, SlotPhase
from processor.service.exchange_server import ExchangeServer
from processor.service.executor_plugins import executor_request, new_executor
from processor.service.processor_metrics import ProcessorMetrics
from processor.service.registration import Registration
from tablewire.errors import ClosedError, EtcdError, OperatingError
from tablewire.etcd import keys as etcd_keys
from tablewire.etcd.records import CaptureRecord, ChangefeedInfo, decode, now
from tablewire.etcd.session import EtcdSession, open_session
from tablewire.executor import TableExecutor
from tablewire.model.ids import CaptureID, ChangefeedID
from tablewire.model.liveness import Liveness
from tablewire.model.states import LivenessState
from tablewire.runtime.http import HttpServer
from tablewire.runtime.shutdown import Shutdown, end_process, run_thread
from tablewire.runtime.tls import interceptors, server_credentials, warn_of_roles
from tablewire.wire.versions import SUPPORTED_VERSIONS, ProtocolVersions

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_FENCED = 75
"""An executor did not stop after the lease was lost (EX_TEMPFAIL): a supervisor may start the process again."""
RETRY_MIN_S = 0.2
RETRY_MAX_S = 5.0
POLL_S = 0.1
PEERS_POLL_S = 1.0
QUIET_EXCHANGES = 3
"""How many turns of the owner must have found a leaving processor empty before it goes."""
SERVER_GRACE_S = 0.5
HANGS_AFTER_S = 15.0
"""Without a round of the agents' loop for this long /healthz says so."""
HEALTH_INTERVAL_S = 1.0
"""How often what gRPC's health service says is brought up to date."""

_log = structlog.get_logger("processor.service")


def new_capture_id(name: str) -> CaptureID:
    """The name (or the host's) and a random part: new at every registration."""
    prefix = re.sub(r"[^A-Za-z0-9._-]", "-", name or socket.gethostname())[:100].strip("._-") or "processor"
    return f"{prefix}-{secrets.token_hex(4)}"


class RegisteredCapture:
    """One capture id, from its registration to its end. `start` and `close` belong to the main thread."""

    def __init__(
        self,
        config: ProcessorConfig,
        session: EtcdSession,
        version: str,
        port: int,
        on_lost: Callable[[], None],
        protocols: ProtocolVersions = SUPPORTED_VERSIONS,
    ) -> None:
        """Binds the port (OperatingError when it cannot be had); serves and registers nothing yet."""
        self.id = new_capture_id(config.name)
        self.liveness = Liveness()
        self._config = config
        self._session = session
        self._on_lost = on_lost
        self.server = ExchangeServer(
            self.id,
            config.exchange.host,
            port,
            exchange_wait_ms=config.exchange.wait_ms,
            credentials=server_credentials(config.tls),
            interceptors=interceptors(config.tls),
            versions=protocols,
        )
        self.port = self.server.port
        self.address = config.exchange.advertise or f"{config.exchange.host}:{self.port}"
        self.registration = Registration(
            session,
            config.cluster,
            CaptureRecord(
                id=self.id,
                address=self.address,
                version=version,
                labels=dict(config.labels),
                started_at=now(),
                protocol_lowest=protocols.lowest,
                protocol_highest=protocols.highest,
            ),
            ttl_s=config.etcd.ttl_s,
            margin_s=config.etcd.margin_s,
            on_lost=self._lost,
        )
        self.host = AgentHost(
            capture_id=self.id,
            server=self.server,
            open_executor=self._open_executor,
            may_act=self.registration.is_valid,
            liveness=self.liveness,
            interval_ms=config.tick.interval_ms,
            unsettled_interval_ms=config.tick.unsettled_interval_ms,
        )
        self._thread: threading.Thread | None = None

    @property
    def is_valid(self) -> bool:
        return self.registration.is_valid()

    def start(self) -> None:
        """Serves, then registers: whoever finds the key finds a server behind it. EtcdError: try `register` again."""
        self._thread = run_thread("agents", self.host.run)
        self.server.start(is_ready=False)

    def register(self) -> None:
        self.registration.start()

    def close(self, timeout_s: float) -> bool:
        """Ends the agents, then the registration, then the server. False: an executor has not stopped within timeout_s, so that
        writes may still follow, and nothing else has been ended."""
        self.host.close()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return False
        self.registration.deregister()
        self.server.stop(SERVER_GRACE_S)
        return True

    def _lost(self, reason: str) -> None:
        """`may_write` is False from now on; what is under way at a sink is refused there by its epoch."""
        self.server.wake()
        self._on_lost()

    def _open_executor(self, changefeed: ChangefeedID, epoch: int) -> TableExecutor:
        key = etcd_keys.changefeed_info_key(self._config.cluster, changefeed)
        found = self._session.get(key)
        if found is None:
            raise OperatingError(f"changefeed {changefeed} is not in etcd")
        info = decode(ChangefeedInfo, key, found.value)
        if info.epoch != epoch:
            raise OperatingError(f"changefeed {changefeed} is at epoch {info.epoch} in etcd, the owner speaks of {epoch}")
        request = executor_request(
            info, capture_id=self.id, wake=self.server.wake, may_write=self.registration.is_valid, environ=os.environ
        )
        return new_executor(request)


class ProcessorService:
    """run: the main thread. ready, healthy: any thread, never block."""

    def __init__(
        self, config: ProcessorConfig, shutdown: Shutdown, *, version: str, protocols: ProtocolVersions = SUPPORTED_VERSIONS
    ) -> None:
        """version: of the software. protocols: of the wire."""
        self._protocols = protocols
        self._config = config
        self._shutdown = shutdown
        self._version = version
        self._wake = threading.Event()
        self._capture: RegisteredCapture | None = None
        self._registered = False
        self._restarts = 0
        shutdown.on_request(self._wake.set)
        self._session = open_session(config.etcd)
        self._metrics = ProcessorMetrics(version, self)
        self._http: HttpServer | None = None
        if config.http.enabled:
            self._http = HttpServer(
                config.http.host, config.http.port, self._metrics.registry, healthz=self.healthy, readyz=self.ready
            )

    # -- any thread ---------------------------------------------------------------------------------------------------

    @property
    def capture(self) -> RegisteredCapture | None:
        return self._capture

    @property
    def restarts(self) -> int:
        """How often this process has lost its lease and come back under a new id."""
        return self._restarts

    def ready(self) -> str:
        """Why this processor cannot be given tables; "" = it can."""
        capture = self._capture
        if capture is None or not self._registered:
            return "not registered"
        if not capture.is_valid:
            return f"capture {capture.id} has lost its lease: {capture.registration.lost_reason}"
        return "stopping" if capture.liveness.state is LivenessState.STOPPING else self.healthy()

    def healthy(self) -> str:
        """Why this process should be looked at; "" = fine. Losing etcd is no reason: restarting would not mend it."""
        capture = self._capture
        if capture is None:
            return ""
        silence_s = capture.host.silence_s()
        if self._registered and silence_s > HANGS_AFTER_S:
            return f"an executor has not returned from a call for {silence_s:.0f} s"
        stuck = [view for view in capture.host.views() if view.phase is SlotPhase.CLOSING and view.error]
        return "; ".join(f"changefeed {view.changefeed} {view.error}" for view in stuck)

    # -- the main thread ----------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Until asked to stop; the exit code."""
        warn_of_roles(self._config.tls)
        if self._http is not None:
            self._http.start()
        port = self._config.exchange.port
        try:
            while not self._shutdown.requested:
                capture = self._start(port)
                if capture is None:
                    break
                port = capture.port
                if self._shutdown.requested:
                    self._leave(capture)
                else:
                    self._restart(capture)
        finally:
            if self._http is not None:
                self._http.close()
            self._session.close()
        return EXIT_DONE

    def _start(self, port: int) -> RegisteredCapture | None:
        """A capture that has been registered, and has been asked to end or has lost its lease since; None when the shutdown came
        before it was registered. OperatingError on the first start when etcd does not answer in time."""
        self._wake.clear()
        if self._shutdown.requested:
            return None
        capture = self._capture = RegisteredCapture(
            self._config, self._session, self._version, port, self._wake.set, self._protocols
        )
        capture.start()
        try:
            registered = self._register(capture)
        except OperatingError:
            self._close(capture)
            raise
        if not registered:
            self._close(capture)
            return None
        self._registered = True
        _log.info(
            "processor_ready",
            capture=capture.id,
            address=capture.address,
            http=f"{self._http.host}:{self._http.port}" if self._http is not None else "",
            cluster=self._config.cluster,
        )
        self._tell_health(capture)
        while not self._wake.wait(HEALTH_INTERVAL_S):
            self._tell_health(capture)
        return capture

    def _tell_health(self, capture: RegisteredCapture) -> None:
        capture.server.health.set_serving(not self.ready())

    def _register(self, capture: RegisteredCapture) -> bool:
        """False when asked to stop meanwhile."""
        timeout_ms = self._config.etcd.start_timeout_ms if not self._restarts else 0
        deadline = time.monotonic() + timeout_ms / 1000 if timeout_ms else None
        failures = 0
        while not self._shutdown.requested:
            try:
                capture.register()
                return True
            except EtcdError as error:
                if deadline is not None and time.monotonic() >= deadline:
                    raise
                if failures == 0:
                    _log.warning("cannot_register", capture=capture.id, reason=str(error))
                pause_s = min(RETRY_MAX_S, RETRY_MIN_S * 2 ** min(failures, 10)) * random.uniform(0.5, 1.0)
                failures += 1
                self._shutdown.wait(pause_s)
        return False

    def _restart(self, capture: RegisteredCapture) -> None:
        """After the lease was lost: nothing of the former id may go on beside the new one."""
        self._registered = False
        self._restarts += 1
        self._close(capture)
        _log.warning("capture_ended", capture=capture.id, reason=capture.registration.lost_reason)

    def _close(self, capture: RegisteredCapture) -> None:
        if not capture.close(self._config.stop.close_timeout_ms / 1000):
            _log.critical("executors_do_not_stop", capture=capture.id, timeout_ms=self._config.stop.close_timeout_ms)
            end_process(EXIT_FENCED)

    # -- leaving ------------------------------------------------------------------------------------------------------

    def _leave(self, capture: RegisteredCapture) -> None:
        """Reports stopping, waits until its tables have moved away, and goes."""
        capture.liveness.stop()
        self._tell_health(capture)
        _log.info("stopping", capture=capture.id, spans=capture.host.held_spans(), reason=self._shutdown.reason)
        teller = run_thread("tell stopping", lambda: self._tell_stopping(capture))
        left = self._wait_drained(capture)
        if left:
            _log.warning("leaves_undrained", capture=capture.id, spans=capture.host.held_spans(), reason=left)
        self._close(capture)
        teller.join(POLL_S)
        _log.info("processor_left", capture=capture.id)

    def _tell_stopping(self, capture: RegisteredCapture) -> None:
        while capture.is_valid:
            try:
                capture.registration.update_liveness(LivenessState.STOPPING)
                return
            except ClosedError:
                return
            except EtcdError:
                time.sleep(RETRY_MIN_S)

    def _wait_drained(self, capture: RegisteredCapture) -> str:
        """Why it goes with tables that it still holds; "" = it holds none."""
        deadline = time.monotonic() + self._config.stop.drain_timeout_ms / 1000
        empty_since: int | None = None
        look_at = 0.0
        while True:
            if not capture.is_valid:
                return "its lease is lost"
            if not capture.host.views():
                return ""
            if capture.host.held_spans():
                empty_since = None
            elif empty_since is None:
                empty_since = capture.server.stats.received
            elif capture.server.stats.received - empty_since >= QUIET_EXCHANGES:
                return ""
            if time.monotonic() >= deadline:
                return f"not drained within {self._config.stop.drain_timeout_ms} ms"
            if time.monotonic() >= look_at:
                look_at = time.monotonic() + PEERS_POLL_S
                if not self._has_peers(capture):
                    return "no other processor could take its tables"
            time.sleep(POLL_S)

    def _has_peers(self, capture: RegisteredCapture) -> bool:
        """Whether another processor is registered that is not stopping; True when etcd does not say."""
        prefix = etcd_keys.captures_prefix(self._config.cluster)
        try:
            items, _ = self._session.get_prefix(prefix)
        except EtcdError:
            return True
        for item in items:
            try:
                record = decode(CaptureRecord, item.key, item.value)
            except OperatingError:
                continue
            if record.id != capture.id and record.liveness is LivenessState.ALIVE:
                return True
        return False
