"""The life of a processor: register, serve, fence itself, register again under a new id, and leave when asked.

A `RegisteredCapture` is one capture id: a registration under a lease, an Exchange server, and the agents' loop. When its lease is
in doubt, `may_write` becomes False for every executor at that moment and the agents are closed. Only when no write can follow
does the service register again, under another id. If an executor does not stop in time, the process ends, so that no write can
follow either.

Threads: main (this module), "agents" (agents.py), "exchange" (gRPC's pool), "lease" and "watch capture" (registration.py),
"open ..." and "close ..." (a changefeed's executor being made and closed), "http".
"""

from __future__ import annotations

import math
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import cast

import structlog

from processor.processor_config import ProcessorConfig
from processor.service.agents import AgentHost, SlotPhase
from processor.service.exchange_server import ExchangeServer
from processor.service.processor_metrics import ProcessorFigures, ProcessorMetrics
from processor.service.registration import Registration
from tablewire.errors import ClosedError, EtcdError, OperatingError
from tablewire.etcd import keys as etcd_keys
from tablewire.etcd.lease import lease_clock
from tablewire.etcd.records import CaptureRecord, ChangefeedInfo, decode, now
from tablewire.etcd.session import EtcdSession, open_session
from tablewire.executor import ExecutorRequest, TableExecutor
from tablewire.model.ids import CaptureID, ChangefeedID
from tablewire.model.liveness import Liveness
from tablewire.model.states import LivenessState
from tablewire.runtime.backoff import Backoff
from tablewire.runtime.http import HttpServer
from tablewire.runtime.plugins import EXECUTORS, make
from tablewire.runtime.shutdown import Shutdown, end_process, run_thread
from tablewire.runtime.tls import interceptors, server_credentials, warn_of_roles
from tablewire.runtime.uris import resolve_uri
from tablewire.wire.versions import SUPPORTED_VERSIONS, ProtocolVersions

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_FENCED = 75
"""An executor did not stop after the lease was lost (EX_TEMPFAIL): a supervisor may start the process again."""
RETRY_MIN_S = 0.2
RETRY_MAX_S = 5.0
POLL_S = 0.1
OTHERS_POLL_S = 1.0
QUIET_EXCHANGES = 3
"""How many Exchanges must have found a leaving processor without spans before it goes."""
SERVER_GRACE_S = 0.5
HANGS_AFTER_S = 15.0
"""Without a round of the agents' loop for this long /healthz fails."""
HEALTH_INTERVAL_S = 1.0
"""How often the status of gRPC's health service is updated."""

_log = structlog.get_logger("processor.service")


def new_capture_id(name: str) -> CaptureID:
    """Return the name (or the host's) with a random part: a new id for every registration."""
    prefix = re.sub(r"[^A-Za-z0-9._-]", "-", name or socket.gethostname())[:100].strip("._-") or "processor"
    return f"{prefix}-{secrets.token_hex(4)}"


class RegisteredCapture:
    """One capture id, from its registration to its end. start, register and close: the main thread."""

    def __init__(
        self,
        config: ProcessorConfig,
        session: EtcdSession,
        version: str,
        port: int,
        on_lost: Callable[[], None],
        protocols: ProtocolVersions = SUPPORTED_VERSIONS,
    ) -> None:
        """Bind the port (OperatingError when it cannot be had); nothing is served or registered yet."""
        self.id = new_capture_id(config.name)
        self.liveness = Liveness()
        self._config, self._session, self._on_lost = config, session, on_lost
        self.server = ExchangeServer(
            self.id,
            config.exchange.host,
            port,
            exchange_wait_ms=config.exchange.wait_ms,
            credentials=server_credentials(config.tls),
            interceptors=interceptors(config.tls),
            versions=protocols,
        )
        self.address = config.exchange.advertise or f"{config.exchange.host}:{self.server.port}"
        record = CaptureRecord(
            id=self.id,
            address=self.address,
            version=version,
            labels=dict(config.labels),
            started_at=now(),
            protocol_lowest=protocols.lowest,
            protocol_highest=protocols.highest,
        )
        self.registration = Registration(
            session, config.cluster, record, ttl_s=config.etcd.ttl_s, margin_s=config.etcd.margin_s, on_lost=self._lost
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

    def start(self) -> None:
        """Serve. An owner that finds the key of `register` finds a server behind it."""
        self._thread = run_thread("agents", self.host.run)
        self.server.start(is_ready=False)

    def close(self, timeout_s: float) -> bool:
        """End the agents, then the registration, then the server. False: an executor has not stopped within timeout_s, so
        writes may still follow, and nothing else was ended."""
        self.host.close()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return False
        self.registration.deregister()
        self.server.stop(SERVER_GRACE_S)
        return True

    def _lost(self, _reason: str) -> None:
        """React to a lost lease: `may_write` is False from now on, and the sink refuses a write under way by its epoch."""
        self.server.wake()
        self._on_lost()

    def _open_executor(self, changefeed: ChangefeedID, epoch: int) -> TableExecutor:
        key = etcd_keys.changefeed_info_key(self._config.cluster, changefeed)
        found = self._session.get(key)
        if found is None:
            raise OperatingError(f"changefeed {changefeed} is not in etcd")
        info = decode(ChangefeedInfo, key, found.value)
        if info.epoch != epoch:
            raise OperatingError(f"changefeed {changefeed} has epoch {info.epoch} in etcd, and {epoch} in the owner's batch")
        request = ExecutorRequest(
            capture_id=self.id,
            changefeed=changefeed,
            changefeed_epoch=epoch,
            source_uri=resolve_uri(info.source_uri, os.environ),
            sink_uri=resolve_uri(info.sink_uri, os.environ),
            tables=tuple(info.tables),
            start_ts=info.start_ts,
            initial_snapshot=info.initial_snapshot,
            options=dict(info.options),
            wake=self.server.wake,
            may_write=self.registration.is_valid,
        )
        return cast(TableExecutor, make(EXECUTORS, request.source_uri, request))


class ProcessorService:
    """run: the main thread. ready, healthy, figures: any thread; they never block."""

    def __init__(
        self, config: ProcessorConfig, shutdown: Shutdown, *, version: str, protocols: ProtocolVersions = SUPPORTED_VERSIONS
    ) -> None:
        """version: of the software. protocols: of the wire."""
        self._config, self._shutdown, self._version, self._protocols = config, shutdown, version, protocols
        self._wake = threading.Event()
        self._capture: RegisteredCapture | None = None
        self._registered = False
        self._lease_losses = 0
        shutdown.on_request(self._wake.set)
        self._session = open_session(config.etcd)
        metrics = ProcessorMetrics(version, self.figures)
        self._http: HttpServer | None = None
        if config.http.enabled:
            self._http = HttpServer(config.http.host, config.http.port, metrics.registry, healthz=self.healthy, readyz=self.ready)

    # Any thread ------------------------------------------------------------------------------------------------------

    def figures(self) -> ProcessorFigures:
        capture = self._capture
        if capture is None:
            return ProcessorFigures()
        margin_s = capture.registration.deadline() - lease_clock()
        return ProcessorFigures(
            is_ready=not self.ready(),
            lease_losses=self._lease_losses,
            lease_margin_s=margin_s if math.isfinite(margin_s) else None,
            views=capture.host.views(),
            exchanges=capture.server.stats,
        )

    def ready(self) -> str:
        """Return why this processor cannot be assigned tables; "" if it can."""
        capture = self._capture
        if capture is None or not self._registered:
            return "not registered"
        if not capture.registration.is_valid():
            return f"capture {capture.id} has lost its lease: {capture.registration.lost_reason}"
        return "stopping" if capture.liveness.state is LivenessState.STOPPING else self.healthy()

    def healthy(self) -> str:
        """Return why this process needs attention; "" if it does not. A lost etcd is no reason: a restart would not help."""
        capture = self._capture
        if capture is None:
            return ""
        silence_s = capture.host.silence_s()
        if self._registered and silence_s > HANGS_AFTER_S:
            return f"an executor has not returned from a call for {silence_s:.0f} s"
        stuck = [view for view in capture.host.views() if view.phase is SlotPhase.CLOSING and view.error]
        return "; ".join(f"changefeed {view.changefeed} {view.error}" for view in stuck)

    # The main thread -------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run until asked to stop, and return the exit code. OperatingError if etcd does not answer the first registration in
        time, or the port is taken."""
        warn_of_roles(self._config.tls)
        if self._http is not None:
            self._http.start()
        port = self._config.exchange.port
        try:
            while True:
                self._wake.clear()
                if self._shutdown.requested:
                    return EXIT_DONE
                capture = self._capture = RegisteredCapture(
                    self._config, self._session, self._version, port, self._wake.set, self._protocols
                )
                port = capture.server.port
                self._run_capture(capture)
        finally:
            if self._http is not None:
                self._http.close()
            self._session.close()

    def _run_capture(self, capture: RegisteredCapture) -> None:
        """Serve under one capture id until asked to stop or its lease is lost; then end it."""
        capture.start()
        try:
            is_registered = self._registered = self._register(capture)
            if is_registered:
                self._serve(capture)
        finally:
            self._registered = False
            self._close(capture)
        if not is_registered:
            return
        if self._shutdown.requested:
            _log.info("processor_left", capture=capture.id)
        else:
            self._lease_losses += 1
            _log.warning("capture_ended", capture=capture.id, reason=capture.registration.lost_reason)

    def _serve(self, capture: RegisteredCapture) -> None:
        """Return when the lease is lost, or the tables have moved away after a request to stop."""
        _log.info(
            "processor_ready",
            capture=capture.id,
            address=capture.address,
            http=f"{self._http.host}:{self._http.port}" if self._http is not None else "",
            cluster=self._config.cluster,
        )
        while True:
            self._update_health(capture)
            if self._wake.wait(HEALTH_INTERVAL_S):
                break
        if self._shutdown.requested:
            self._leave(capture)

    def _update_health(self, capture: RegisteredCapture) -> None:
        capture.server.health.set_serving(not self.ready())

    def _register(self, capture: RegisteredCapture) -> bool:
        """Register, and retry while etcd does not answer. False when asked to stop meanwhile."""
        timeout_s = self._config.etcd.start_timeout_ms / 1000 if not self._lease_losses else 0.0
        deadline = time.monotonic() + timeout_s if timeout_s else math.inf
        backoff = Backoff(RETRY_MIN_S, RETRY_MAX_S)
        while not self._shutdown.requested:
            try:
                capture.registration.start()
                return True
            except EtcdError as error:
                if time.monotonic() >= deadline:
                    raise
                if not backoff.failures:
                    _log.warning("cannot_register", capture=capture.id, reason=str(error))
                self._shutdown.wait(backoff.next_s())
        return False

    def _close(self, capture: RegisteredCapture) -> None:
        if not capture.close(self._config.stop.close_timeout_ms / 1000):
            _log.critical("executors_do_not_stop", capture=capture.id, timeout_ms=self._config.stop.close_timeout_ms)
            end_process(EXIT_FENCED)

    # Leaving ---------------------------------------------------------------------------------------------------------

    def _leave(self, capture: RegisteredCapture) -> None:
        """Report stopping, and wait until the tables have moved away."""
        capture.liveness.stop()
        self._update_health(capture)
        _log.info("stopping", capture=capture.id, spans=capture.host.held_spans(), reason=self._shutdown.reason)
        run_thread("report stopping", lambda: self._report_stopping(capture))
        reason = self._wait_drained(capture)
        if reason:
            _log.warning("leaves_undrained", capture=capture.id, spans=capture.host.held_spans(), reason=reason)

    def _report_stopping(self, capture: RegisteredCapture) -> None:
        """Write to etcd that this capture is stopping, and retry until that succeeds or the lease is over."""
        backoff = Backoff(RETRY_MIN_S, RETRY_MAX_S)
        while capture.registration.is_valid():
            try:
                capture.registration.update_liveness(LivenessState.STOPPING)
                return
            except ClosedError:
                return
            except EtcdError:
                time.sleep(backoff.next_s())

    def _wait_drained(self, capture: RegisteredCapture) -> str:
        """Wait until this capture holds no spans, and return "", or why it has to leave with some."""
        deadline = time.monotonic() + self._config.stop.drain_timeout_ms / 1000
        empty_since: int | None = None
        poll_others_at = 0.0
        while True:
            exchanges = capture.server.stats.received
            if not capture.registration.is_valid():
                return "its lease is lost"
            if not capture.host.views():
                return ""
            if capture.host.held_spans():
                empty_since = None
            elif empty_since is None:
                empty_since = exchanges
            elif exchanges - empty_since >= QUIET_EXCHANGES:
                return ""
            if time.monotonic() >= deadline:
                return f"not drained within {self._config.stop.drain_timeout_ms} ms"
            if time.monotonic() >= poll_others_at:
                poll_others_at = time.monotonic() + OTHERS_POLL_S
                if not self._has_others(capture):
                    return "no other processor could take its tables"
            time.sleep(POLL_S)

    def _has_others(self, capture: RegisteredCapture) -> bool:
        """Return whether another processor is registered that is not stopping; True if etcd does not answer."""
        try:
            items, _ = self._session.get_prefix(etcd_keys.captures_prefix(self._config.cluster))
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
