"""TCP proxies that can be told to misbehave: cut a link (also one way), delay it, stall it, reset it, refuse it.

One thread carries all proxies of a `ProxyLoop`. A `Link` is what one client says to one server: its rules can be changed at
any time from any thread, and a change has taken effect when the call returns. One proxy (one address) may serve several links:
`classify` names the link of an accepted connection, so that "owner0 -> processor1" can be cut while "owner1 -> processor1"
goes on, although both dial the same address.

What a cut means: as behind a firewall that drops, nothing arrives and nobody is told. Bytes that were sent are held, as TCP
holds what it has to send again, and arrive after `heal`, however late. `reset` is the loud form: both ends get an RST.
"""

from __future__ import annotations

import selectors
import socket
from collections.abc import Callable
from types import TracebackType

from deploy.local.links import BUFFER_BYTES, LINGER_RESET, Connection, Direction, Link, ProxyLoop

__all__ = ["BUFFER_BYTES", "Direction", "Link", "ProxyLoop", "TcpProxy"]

Classify = Callable[[tuple[str, int]], Link]


class TcpProxy:
    """Listens at a free port of `listen_host` and carries every connection to `target` ("host:port").

    The address never changes; the target may (`retarget`). Without `classify` all connections are of one link, `link`, whose
    rules (`cut`, `heal`, `delay_ms`, `stall`, `reset`, `refuse`) are also methods here.
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
        """loop: shared with other proxies, None = one of its own, closed with it. classify: (client address) -> its link."""
        self._own_loop = loop is None
        self._loop = loop if loop is not None else ProxyLoop()
        self.link = Link(self._loop, name)
        self._classify = classify
        self._target = _address(target)
        self._listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((listen_host, 0))
        self._listener.listen(128)
        self._listener.setblocking(False)
        host, port = self._listener.getsockname()
        self.endpoint = f"{host}:{port}"
        self._open = True
        self._loop.run(lambda: self._loop.selector.register(self._listener, selectors.EVENT_READ, lambda _events: self._accept()))

    def retarget(self, target: str) -> None:
        """New connections go there."""
        address = _address(target)

        def apply() -> None:
            self._target = address

        self._loop.run(apply)

    def cut(self, direction: Direction | str = Direction.BOTH) -> None:
        self.link.cut(direction)

    def heal(self) -> None:
        self.link.heal()

    def delay_ms(self, milliseconds: float) -> None:
        self.link.delay_ms(milliseconds)

    def stall(self) -> None:
        self.link.stall()

    def reset(self) -> None:
        self.link.reset()

    def refuse(self) -> None:
        self.link.refuse()

    def close(self) -> None:
        """Stop listening; with a loop of its own, end every connection too. Idempotent."""
        if not self._open:
            return
        self._open = False
        if self._own_loop:
            self._loop.close()
            return

        def apply() -> None:
            self._loop.selector.unregister(self._listener)
            self._listener.close()

        self._loop.run(apply)

    def __enter__(self) -> TcpProxy:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _accept(self) -> None:
        if not self._open:
            return
        try:
            client, address = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        link = self._classify(address) if self._classify is not None else self.link
        if link.refusing:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
            client.close()
            return
        Connection(self._loop, link, client, self._target)


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit():
        raise ValueError(f"{text!r} is not host:port")
    return host, int(port)
