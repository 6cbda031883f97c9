"""The HTTP port of a service: /metrics for Prometheus, /healthz (is this process sound) and /readyz (may it be given work).

A small server on threads of its own, so that it answers while the rest is busy; at most REQUESTS_MAX at once. The two checks
return why not, "" = fine, and must not block: they read what the service's threads last left.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from tablewire.errors import OperatingError
from tablewire.runtime.shutdown import run_thread

REQUESTS_MAX = 8
REQUEST_TIMEOUT_S = 5.0
POLL_INTERVAL_S = 0.1

Check = Callable[[], str]

_log = structlog.get_logger("tablewire.http")


def fine() -> str:
    """The check of what has nothing to say."""
    return ""


class HttpServer:
    """Bound when made (OperatingError when the port cannot be had; port 0: a free one), serves between `start` and `close`."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry, *, healthz: Check = fine, readyz: Check = fine) -> None:
        handler = type("Handler", (_Handler,), {"registry": registry, "checks": {"/healthz": healthz, "/readyz": readyz}})
        try:
            self._server = _Server(host, port, handler)
        except OSError as error:
            raise OperatingError(f"http: cannot listen on {host}:{port}: {error.strerror or error}") from error
        self.host = host
        self.port = int(self._server.server_address[1])
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = run_thread("http", lambda: self._server.serve_forever(POLL_INTERVAL_S))

    def close(self) -> None:
        """Idempotent."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join(REQUEST_TIMEOUT_S)
            self._thread = None
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, handler: Any) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._slots = threading.BoundedSemaphore(REQUESTS_MAX)
        super().__init__((host, port), handler)

    def server_bind(self) -> None:
        # HTTPServer asks DNS for the name of the host here, which nobody needs and which can take long.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that went away is no event
            _log.error("http_request_failed", client=str(client_address), exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    registry: CollectorRegistry
    checks: dict[str, Check]
    timeout = REQUEST_TIMEOUT_S
    server_version = "tablewire"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            self._answer(200, content_type, encode(self.registry))
        elif path in self.checks:
            reason = self.checks[path]()
            self._answer(503 if reason else 200, "text/plain; charset=utf-8", f"{reason or 'ok'}\n".encode())
        else:
            self._answer(404, "text/plain; charset=utf-8", b"not found: /metrics, /healthz and /readyz are\n")

    do_HEAD = do_GET

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: a probe every second is no event."""
