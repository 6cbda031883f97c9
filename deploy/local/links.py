"""The links of proxies (their rules and connections) and the thread that carries their bytes; see `proxy.py`."""

from __future__ import annotations

import errno
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from enum import StrEnum

BUFFER_BYTES = 1 << 18
"""Held per direction of a connection at most; then the proxy stops reading, and the sender feels it."""
CHUNK_BYTES = 1 << 16
APPLY_TIMEOUT_S = 10.0
LINGER_RESET = struct.pack("ii", 1, 0)


class Direction(StrEnum):
    TO_TARGET = "to_target"
    FROM_TARGET = "from_target"
    BOTH = "both"


class _Pipe:
    """One direction of one connection: what was read from `source` and is due to be written to `sink`."""

    __slots__ = ("chunks", "direction", "eof", "held", "shut", "sink", "source")

    def __init__(self, direction: Direction, source: socket.socket, sink: socket.socket) -> None:
        self.direction = direction
        self.source = source
        self.sink = sink
        self.chunks: deque[tuple[float, memoryview]] = deque()  # (due, bytes)
        self.held = 0
        self.eof = False
        self.shut = False

    def due(self, now: float) -> bool:
        return bool(self.chunks) and self.chunks[0][0] <= now


class Link:
    """The rules of one client-server pair, and its connections. Made by `TcpProxy` or by hand for several proxies."""

    def __init__(self, loop: ProxyLoop, name: str = "link") -> None:
        self.name = name
        self._loop = loop
        self._connections: set[Connection] = set()
        self._cut = {Direction.TO_TARGET: False, Direction.FROM_TARGET: False}
        self._delay_s = 0.0
        self._refuse = False
        self.accepted = 0
        """Connections so far."""
        self.carried_bytes = 0
        """Bytes delivered so far, both ways."""

    def cut(self, direction: Direction | str = Direction.BOTH) -> None:
        """Nothing passes in this direction until `heal`. While to_target is cut, new connections do not reach the target."""
        self._set_cut(Direction(direction), True)

    def stall(self) -> None:
        """Both directions stand still, as when the other machine hangs; the same as cut("both")."""
        self.cut()

    def refuse(self) -> None:
        """Reset the connections, and every new one at once, as when nobody listens, until `heal`."""

        def apply() -> None:
            self._refuse = True
            self._drop_all()

        self._loop.run(apply)

    def delay_ms(self, milliseconds: float) -> None:
        """What is read from now on arrives this much later, in both directions. 0: at once again."""

        def apply() -> None:
            self._delay_s = milliseconds / 1000

        self._loop.run(apply)

    def reset(self) -> None:
        """End the present connections with an RST at both ends; what was held is lost. New ones are as the rules say."""
        self._loop.run(self._drop_all)

    def heal(self) -> None:
        """No cut, no delay, nothing refused. What was held arrives now."""

        def apply() -> None:
            self._refuse = False
            self._delay_s = 0.0
            self._cut = dict.fromkeys(self._cut, False)
            for connection in list(self._connections):
                for pipe in connection.pipes:
                    pipe.chunks = deque((0.0, chunk) for _, chunk in pipe.chunks)
                connection.refresh()

        self._loop.run(apply)

    @property
    def connections(self) -> int:
        """Open now."""
        return len(self._connections)

    def blocked(self, direction: Direction) -> bool:
        return self._cut[direction]

    @property
    def refusing(self) -> bool:
        return self._refuse

    @property
    def delay_s(self) -> float:
        return self._delay_s

    def _set_cut(self, direction: Direction, value: bool) -> None:
        def apply() -> None:
            for one in (Direction.TO_TARGET, Direction.FROM_TARGET):
                if direction in (one, Direction.BOTH):
                    self._cut[one] = value
            for connection in list(self._connections):
                connection.refresh()

        self._loop.run(apply)

    def _drop_all(self) -> None:
        for connection in list(self._connections):
            connection.drop(reset=True)

    # On the loop's thread.
    def joined(self, connection: Connection) -> None:
        self._connections.add(connection)
        self.accepted += 1

    def left(self, connection: Connection) -> None:
        self._connections.discard(connection)


class Connection:
    """A client's socket and ours to the target. Lives on the loop's thread alone."""

    def __init__(self, loop: ProxyLoop, link: Link, client: socket.socket, target: tuple[str, int]) -> None:
        self._loop = loop
        self.link = link
        self._client = client
        self._target_address = target
        self._target = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        for end in (self._client, self._target):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._dialled = False
        self._connected = False
        self._closed = False
        self._interest: dict[socket.socket, int] = {}
        self.pipes = (
            _Pipe(Direction.TO_TARGET, self._client, self._target),
            _Pipe(Direction.FROM_TARGET, self._target, self._client),
        )
        link.joined(self)
        self.refresh()

    def refresh(self) -> None:
        """Dial if it is time to, and watch exactly what may move now under the link's rules."""
        if self._closed:
            return
        if not self._dialled and not self.link.blocked(Direction.TO_TARGET):
            self._dialled = True
            outcome = self._target.connect_ex(self._target_address)
            self._connected = outcome == 0
            if outcome not in (0, errno.EINPROGRESS):
                self.drop(reset=True)
                return
        now = time.monotonic()
        wanted = {self._client: 0, self._target: 0}
        if self._dialled and not self._connected:
            wanted[self._target] |= selectors.EVENT_WRITE
        next_due = 0.0
        for pipe in self.pipes:
            if self.link.blocked(pipe.direction) or not self._connected:
                continue
            if not pipe.eof and pipe.held < BUFFER_BYTES:
                wanted[pipe.source] |= selectors.EVENT_READ
            if pipe.due(now) or (pipe.eof and not pipe.chunks and not pipe.shut):
                wanted[pipe.sink] |= selectors.EVENT_WRITE
            elif pipe.chunks:
                next_due = min(next_due or pipe.chunks[0][0], pipe.chunks[0][0])
        for end, mask in wanted.items():
            self._watch(end, mask)
        self._loop.wake_at(self, next_due)

    def on_event(self, end: socket.socket, mask: int) -> None:
        if self._closed:  # by an earlier event of this round
            return
        try:
            if not self._connected:
                self._finish_dialling()
            else:
                for pipe in self.pipes:
                    if pipe.source is end and mask & selectors.EVENT_READ:
                        self._read(pipe)
                    if pipe.sink is end and mask & selectors.EVENT_WRITE:
                        self._write(pipe)
        except OSError:  # either end has reset: the other one shall know
            self.drop(reset=True)
            return
        if all(pipe.shut for pipe in self.pipes):
            self.drop(reset=False)
            return
        self.refresh()

    def drop(self, *, reset: bool) -> None:
        """Close both ends; with reset, both get an RST. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._loop.wake_at(self, 0.0)
        for end in (self._client, self._target):
            self._watch(end, 0)
            if reset:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
            end.close()
        self.link.left(self)

    def _finish_dialling(self) -> None:
        error = self._target.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, "the target refused")
        self._connected = True

    def _read(self, pipe: _Pipe) -> None:
        try:
            data = pipe.source.recv(CHUNK_BYTES)
        except BlockingIOError:
            return
        if not data:
            pipe.eof = True
            return
        pipe.held += len(data)
        delay_s = self.link.delay_s
        pipe.chunks.append((time.monotonic() + delay_s if delay_s else 0.0, memoryview(data)))
        if not delay_s:
            self._write(pipe)

    def _write(self, pipe: _Pipe) -> None:
        now = time.monotonic()
        while pipe.due(now):
            due, chunk = pipe.chunks[0]
            try:
                sent = pipe.sink.send(chunk)
            except BlockingIOError:
                return
            pipe.held -= sent
            self.link.carried_bytes += sent
            if sent < len(chunk):
                pipe.chunks[0] = (due, chunk[sent:])
                return
            pipe.chunks.popleft()
        if pipe.eof and not pipe.chunks and not pipe.shut:
            pipe.shut = True
            pipe.sink.shutdown(socket.SHUT_WR)

    def _watch(self, end: socket.socket, mask: int) -> None:
        before = self._interest.get(end, 0)
        if mask == before:
            return
        selector = self._loop.selector
        if not before:
            selector.register(end, mask, lambda events, end=end: self.on_event(end, events))
        elif not mask:
            selector.unregister(end)
        else:
            selector.modify(end, mask, lambda events, end=end: self.on_event(end, events))
        self._interest[end] = mask


class ProxyLoop:
    """The thread that carries bytes for any number of proxies. `close` ends it with all of them."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self._wakers: dict[Connection, float] = {}
        self._jobs: deque[tuple[Callable[[], object], Future[None]]] = deque()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self.selector.register(self._reader, selectors.EVENT_READ, lambda _events: self._drain())
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="proxies", daemon=True)
        self._thread.start()

    def run(self, job: Callable[[], object]) -> None:
        """Run `job` on the loop's thread and wait until it has run. Any thread. RuntimeError after close."""
        if threading.current_thread() is self._thread:
            job()
            return
        if self._closing:
            raise RuntimeError("the proxies are closed")
        answer: Future[None] = Future()
        self._jobs.append((job, answer))
        self._wake()
        answer.result(APPLY_TIMEOUT_S)

    def wake_at(self, connection: Connection, due: float) -> None:
        """Refresh the connection at this time of time.monotonic(); 0 = no need."""
        if due:
            self._wakers[connection] = due
        else:
            self._wakers.pop(connection, None)

    def close(self) -> None:
        """End the thread and every connection. Idempotent; not from the loop's own thread."""
        if self._closing:
            return
        self._closing = True
        self._wake()
        self._thread.join(APPLY_TIMEOUT_S)

    def _wake(self) -> None:
        try:
            self._writer.send(b"\0")
        except BlockingIOError:
            return  # the pipe is full of wake-ups
        except OSError:
            if not self._closing:
                raise
            return  # the thread saw `_closing` by itself, and has gone with the pipe

    def _drain(self) -> None:
        try:
            while self._reader.recv(4096):
                continue
        except BlockingIOError:
            return

    def _run(self) -> None:
        while not self._closing:
            timeout = None
            if self._wakers:
                timeout = max(0.0, min(self._wakers.values()) - time.monotonic())
            for key, mask in self.selector.select(timeout):
                key.data(mask)
            now = time.monotonic()
            for connection in [c for c, due in self._wakers.items() if due <= now]:
                self._wakers.pop(connection, None)
                connection.refresh()
            while self._jobs:
                job, answer = self._jobs.popleft()
                try:
                    job()
                    answer.set_result(None)
                except OSError as error:
                    answer.set_exception(error)
        for key in list(self.selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self.selector.close()
        self._writer.close()
