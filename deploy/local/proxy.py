"""TCP proxies that inject faults: cut a link (also one way), delay it, stall it, reset it, refuse
it.

One thread carries all proxies of a `ProxyLoop`. A `Link` is the traffic from one client to one
server. Its rules can be changed at any time from any thread, and a change has taken effect when the
call returns. One proxy (one address) may serve several links: `classify` returns the link of an
accepted connection, so that "owner0 -> processor1" can be cut while "owner1 -> processor1" stays
up, although both dial the same address.

A cut behaves like a firewall that drops packets: nothing arrives, and neither end is notified.
Bytes that were sent are held, as TCP holds what it has to send again, and arrive after `heal`,
however late. With `reset` both ends receive an RST.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import TracebackType

from deploy.local.links import BUFFER_BYTES, CHUNK_BYTES, Direction, Link, ProxyLoop
from tablewire.runtime.addresses import parse_address

__all__ = ["BUFFER_BYTES", "Direction", "Link", "ProxyLoop", "TcpProxy"]

Classify = Callable[[tuple[str, int]], Link]


class TcpProxy(Link):
    """Listens on a free port of `listen_host` and carries every connection to `target`
    ("host:port").

    The address never changes; the target may (`retarget`). Without `classify` the proxy is itself
    the link of all of its connections.
    """

    def __init__(
        self,
        listen_host: str,
        target: str,
        *,
        loop: ProxyLoop | None = None,
        name: str = "link",
        classify: Classify | None = None,
    ) -> None:
        """Start listening.

        loop: shared with other proxies; None = a loop of its own, closed with the proxy. classify:
        client address -> its link.
        """
        super().__init__(loop if loop is not None else ProxyLoop(), name)
        self._own_loop = loop is None
        self._classify = classify
        self._target = parse_address(target)
        listener = socket.create_server((listen_host, 0), backlog=128)
        self.endpoint = "{}:{}".format(*listener.getsockname())
        self._serving: asyncio.Task[None]
        self._open = True
        self._loop.run(lambda: self._serve(listener))

    @property
    def link(self) -> Link:
        return self

    def retarget(self, target: str) -> None:
        """Carry new connections to another target."""
        self._target = parse_address(target)

    def close(self) -> None:
        """Stop listening. With a loop of its own, end every connection too. Idempotent."""
        if self._open:
            self._open = False
            self._loop.run(self._serving.cancel)
            if self._own_loop:
                self._loop.close()

    def __enter__(self) -> TcpProxy:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _serve(self, listener: socket.socket) -> None:
        async def serve() -> None:
            async with await asyncio.start_server(self._accepted, sock=listener, limit=CHUNK_BYTES) as server:
                await server.serve_forever()

        self._serving = asyncio.create_task(serve())

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = self._classify(writer.get_extra_info("peername")) if self._classify is not None else self
        link.carry(reader, writer, self._target)
