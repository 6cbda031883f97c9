"""The HTTP port of a service: /metrics, /healthz (is it healthy), /readyz (does it accept work).

It is served by threads of its own, so that it answers while the rest of the process is busy. A
check returns the reason why it fails, "" if it passes; it must not block.
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from tablewire.errors import OperatingError
from tablewire.runtime.shutdown import run_thread

REQUESTS_MAX = 8
"""Requests at the same time; the connections of more are closed."""
REQUEST_TIMEOUT_S = 5.0

Check = Callable[[], str]

_log = structlog.get_logger("tablewire.http")


def always_passes() -> str:
    return ""


class HttpServer:
    """Binds the port when it is made (0: a free one; OperatingError), and serves after `start`."""

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        *,
        healthz: Check = always_passes,
        readyz: Check = always_passes,
    ) -> None:
        handler = type("Handler", (_Handler,), {"registry": registry, "checks": {"/healthz": healthz, "/readyz": readyz}})
        try:
            self._server = _TcpServer(host, port, handler)
        except OSError as error:
            raise OperatingError(f"http: cannot listen on {host}:{port}: {error.strerror or error}") from error
        self.host = host
        self.port = int(self._server.server_address[1])
        self._thread: threading.Thread | None = None
        self._closed = False

    def start(self) -> None:
        self._thread = run_thread("http", self._serve)

    def close(self) -> None:
        """Stop serving. Idempotent."""
        self._closed = True
        if self._thread is not None:
            with contextlib.suppress(OSError):
                socket.create_connection((self.host, self.port), REQUEST_TIMEOUT_S).close()  # wakes the thread
            self._thread.join(REQUEST_TIMEOUT_S)
            self._thread = None
        self._server.server_close()

    def _serve(self) -> None:
        """Accept connections until closed; unlike serve_forever, this does not poll."""
        while not self._closed:
            self._server.handle_request()


class _TcpServer(socketserver.ThreadingTCPServer):
    """Not an HTTPServer, which asks DNS for the name of its host."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, handler: Any) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._slots = threading.BoundedSemaphore(REQUESTS_MAX)
        super().__init__((host, port), handler)

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
        if not isinstance(sys.exc_info()[1], OSError):  # an OSError means that the client has disconnected
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
            self._answer(200, encode(self.registry), content_type)
        elif path in self.checks:
            reason = self.checks[path]()
            self._answer(503 if reason else 200, f"{reason or 'ok'}\n".encode())
        else:
            self._answer(404, b"not found; there are /metrics, /healthz and /readyz\n")

    do_HEAD = do_GET

    def _answer(self, status: int, body: bytes, content_type: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing: there is a probe every second."""
