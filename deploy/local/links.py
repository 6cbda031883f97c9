"""The links of TCP proxies: their rules, their connections, and the thread that carries the bytes. See `proxy.py`."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from enum import StrEnum

BUFFER_BYTES = 1 << 18
"""The most that a proxy holds for one direction of a connection; above it the proxy stops reading from the sender."""
CHUNK_BYTES = 1 << 16
APPLY_TIMEOUT_S = 10.0
LINGER_RESET = struct.pack("ii", 1, 0)
"""With this SO_LINGER, closing a socket sends an RST instead of a FIN."""


class Direction(StrEnum):
    TO_TARGET = "to_target"
    FROM_TARGET = "from_target"
    BOTH = "both"


class ProxyLoop:
    """A thread with an event loop that serves any number of proxies. `close` ends all of their connections."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._closing = asyncio.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="proxies", daemon=True)
        self._thread.start()

    def run(self, job: Callable[[], object]) -> None:
        """Run `job` on the loop's thread, await its result if it is awaitable, and return when it has ended.

        Any thread except the loop's own. Raises RuntimeError after `close`.
        """
        if self._closed:
            raise RuntimeError("the proxies are closed")

        async def apply() -> None:
            outcome = job()
            if inspect.isawaitable(outcome):
                await outcome

        asyncio.run_coroutine_threadsafe(apply(), self._loop).result(APPLY_TIMEOUT_S)

    def close(self) -> None:
        """End the thread and every connection. Idempotent; not from the loop's own thread."""
        if self._closed:
            return
        self._closed = True
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(APPLY_TIMEOUT_S)

    def _run(self) -> None:
        with self._runner as runner:  # its end cancels every task: the listeners and the connections
            runner.run(self._wait_closing())

    async def _wait_closing(self) -> None:
        await self._closing.wait()


class Link:
    """The rules and connections of one pair of client and server. Rules may be set from any thread."""

    def __init__(self, loop: ProxyLoop, name: str = "link") -> None:
        self.name = name
        self._loop = loop
        self._pipes: set[_Pipe] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._cut = {Direction.TO_TARGET: False, Direction.FROM_TARGET: False}
        self.refusing = False
        self.delay_s = 0.0
        self.accepted = 0
        """Connections accepted so far."""
        self.carried_bytes = 0
        """Bytes delivered so far, in both directions."""

    def cut(self, direction: Direction | str = Direction.BOTH) -> None:
        """Let nothing pass in this direction until `heal`. While to_target is cut, new connections do not reach the target."""
        cut = (Direction.TO_TARGET, Direction.FROM_TARGET) if direction == Direction.BOTH else (Direction(direction),)
        self._apply(lambda: self._cut.update(dict.fromkeys(cut, True)))

    def stall(self) -> None:
        """Stop both directions, as if the other machine hung. The same as cut("both")."""
        self.cut()

    def refuse(self) -> None:
        """Reset all connections, and each new one at once, as if no process listened, until `heal`."""
        self._loop.run(lambda: self._reset(refuse=True))

    def delay_ms(self, milliseconds: float) -> None:
        """Delay what is read from now on by this much, in both directions; 0 ends the delay."""
        self._apply(lambda: setattr(self, "delay_s", milliseconds / 1000))

    def reset(self) -> None:
        """End the present connections with an RST at both ends. Bytes that were held are lost. Rules stay as they are."""
        self._loop.run(self._reset)

    def heal(self) -> None:
        """Remove all rules. Bytes that were held are delivered now."""

        def apply() -> None:
            self.refusing = False
            self.delay_s = 0.0
            self._cut = dict.fromkeys(self._cut, False)
            for pipe in self._pipes:
                pipe.chunks = deque((0.0, chunk) for _, chunk in pipe.chunks)

        self._apply(apply)

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return len(self._tasks)

    def blocked(self, direction: Direction) -> bool:
        return self._cut[direction]

    def carry(self, client: socket.socket, address: tuple[str, int]) -> None:
        """Carry an accepted connection to `address` until either end closes it, or refuse it. On the loop's thread."""
        if self.refusing:
            _close(client, reset=True)
            return
        self.accepted += 1
        task = asyncio.create_task(self._carry(client, address))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _apply(self, change: Callable[[], object]) -> None:
        def apply() -> None:
            change()
            for pipe in self._pipes:
                pipe.changed.set()

        self._loop.run(apply)

    async def _reset(self, *, refuse: bool = False) -> None:
        self.refusing |= refuse
        for task in (tasks := list(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry(self, client: socket.socket, address: tuple[str, int]) -> None:
        target = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        for end in (client, target):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pipes = (_Pipe(self, Direction.TO_TARGET, client, target), _Pipe(self, Direction.FROM_TARGET, target, client))
        self._pipes.update(pipes)
        reset = True
        try:
            await pipes[0].wait_open()
            await asyncio.get_running_loop().sock_connect(target, address)
            async with asyncio.TaskGroup() as group:
                for pipe in pipes:
                    group.create_task(pipe.read())
                    group.create_task(pipe.write())
            reset = False
        except* OSError:
            pass  # one end has reset or refused: `finally` passes that on to the other
        finally:
            self._pipes.difference_update(pipes)
            _close(client, reset=reset)
            _close(target, reset=reset)


class _Pipe:
    """One direction of one connection, carried by two coroutines: one reads from `source`, one writes to `sink`."""

    def __init__(self, link: Link, direction: Direction, source: socket.socket, sink: socket.socket) -> None:
        self._link = link
        self._direction = direction
        self._source = source
        self._sink = sink
        self._held = 0
        self.chunks: deque[tuple[float, memoryview]] = deque()
        """(when it is due by time.monotonic(), the bytes); an empty chunk is the end of the stream."""
        self.changed = asyncio.Event()
        """Set when a rule of the link or the content of this pipe has changed."""

    async def wait_open(self) -> None:
        """Return when the link lets this direction pass."""
        await self._wait(lambda: not self._link.blocked(self._direction))

    async def read(self) -> None:
        data = b"-"
        while data:
            await self._wait(lambda: not self._link.blocked(self._direction) and self._held < BUFFER_BYTES)
            try:
                data = await asyncio.get_running_loop().sock_recv(self._source, CHUNK_BYTES)
            except OSError:
                await self.wait_open()  # a cut link does not show a reset either
                raise
            self._held += len(data)
            delay_s = self._link.delay_s
            self.chunks.append((time.monotonic() + delay_s if delay_s else 0.0, memoryview(data)))
            self.changed.set()

    async def write(self) -> None:
        while True:
            await self._wait(lambda: bool(self.chunks))
            while (ahead_s := self.chunks[0][0] - time.monotonic()) > 0:
                self.changed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.changed.wait(), ahead_s)
            await self.wait_open()
            due, chunk = self.chunks[0]
            if not chunk:
                self._sink.shutdown(socket.SHUT_WR)
                return
            try:
                sent = self._sink.send(chunk)
            except BlockingIOError:
                await _writable(self._sink)
                continue
            self._link.carried_bytes += sent
            self._held -= sent
            self.chunks.popleft()
            if sent < len(chunk):
                self.chunks.appendleft((due, chunk[sent:]))
            self.changed.set()

    async def _wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.changed.clear()
            await self.changed.wait()


async def _writable(sink: socket.socket) -> None:
    """Return when the socket takes bytes again."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_writer(sink, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(sink)


def _close(end: socket.socket, *, reset: bool) -> None:
    if reset:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
    end.close()
