"""The links of TCP proxies: rules, connections, and the thread that carries the bytes. See `proxy.py`."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
import struct
import threading
import time
from collections.abc import Callable
from enum import StrEnum
from typing import TypeAlias

CHUNK_BYTES = 1 << 15
CHUNKS_MAX = 32
BUFFER_BYTES = CHUNK_BYTES * CHUNKS_MAX
"""The most that a proxy holds per direction of a connection, beside the buffers of asyncio and the kernel."""
_Chunks: TypeAlias = "asyncio.Queue[tuple[float, int, bytes]]"
"""What was read: (when it is due, the number of heals before, bytes); b"" is the end of the stream."""
APPLY_TIMEOUT_S = 10.0
LINGER_RESET = struct.pack("ii", 1, 0)
"""With this SO_LINGER, closing a socket sends an RST instead of a FIN."""


class Direction(StrEnum):
    TO_TARGET = "to_target"
    FROM_TARGET = "from_target"
    BOTH = "both"


class ProxyLoop:
    """A thread with an event loop that serves any number of proxies."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._closing = asyncio.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="proxies", daemon=True)
        self._thread.start()

    def run(self, job: Callable[[], object]) -> None:
        """Run `job` on the loop's thread, await its result if it is awaitable, and return when it
        has ended.

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
        if not self._closed:
            self._closed = True
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join(APPLY_TIMEOUT_S)

    def _run(self) -> None:
        async def wait_closing() -> None:
            await self._closing.wait()

        with self._runner as runner:  # its end cancels the tasks of all listeners and connections
            runner.run(wait_closing())


class Link:
    """The rules and connections of one pair of client and server. Rules may be set from any thread."""

    def __init__(self, loop: ProxyLoop, name: str = "link") -> None:
        self.name = name
        self._loop = loop
        self._connections: set[asyncio.Task[None]] = set()
        self._cut = {Direction.TO_TARGET: False, Direction.FROM_TARGET: False}
        self.delay_s = 0.0
        self.refusing = False
        self._heals = 0
        self._changed = asyncio.Event()
        self.accepted = 0
        """Connections accepted so far."""
        self.carried_bytes = 0
        """Bytes delivered so far, in both directions."""

    def cut(self, direction: Direction | str = Direction.BOTH) -> None:
        """Let nothing pass in this direction until `heal`, including new connections to the target."""
        cut = list(self._cut) if direction == Direction.BOTH else [Direction(direction)]
        self._apply(lambda: self._cut.update(dict.fromkeys(cut, True)))

    def stall(self) -> None:
        """Stop both directions, as if the other machine hung. The same as cut("both")."""
        self.cut()

    def refuse(self) -> None:
        """Reset all connections, and each new one at once, as if no process listened, until `heal`."""
        self._apply(lambda: setattr(self, "refusing", True))
        self.reset()

    def delay_ms(self, milliseconds: float) -> None:
        """Delay what is read from now on by this much, in both directions; 0 ends the delay."""
        self._apply(lambda: setattr(self, "delay_s", milliseconds / 1000))

    def reset(self) -> None:
        """End the present connections with an RST at both ends. Bytes that were held are lost."""

        async def reset() -> None:
            for task in (tasks := list(self._connections)):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0)  # let the transports close their sockets

        self._loop.run(reset)

    def heal(self) -> None:
        """Remove all rules. Bytes that were held are delivered now."""

        def heal() -> None:
            self.refusing = False
            self.delay_s = 0.0
            self._cut = dict.fromkeys(self._cut, False)
            self._heals += 1

        self._apply(heal)

    @property
    def connections(self) -> int:
        """Return the number of open connections."""
        return len(self._connections)

    def blocked(self, direction: Direction) -> bool:
        return self._cut[direction]

    def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: tuple[str, int]) -> None:
        """Carry an accepted connection to `address`, or refuse it. On the loop's thread."""
        if self.refusing:
            _close(writer, reset=True)
            return
        self.accepted += 1
        task = asyncio.create_task(self._carry(reader, writer, address))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        task.add_done_callback(lambda _task: _close(writer, reset=True))  # it may have been cancelled before its first step

    def _apply(self, change: Callable[[], object]) -> None:
        def apply() -> None:
            change()
            self._changed.set()
            self._changed = asyncio.Event()

        self._loop.run(apply)

    async def _passes(self, direction: Direction, due: float = 0.0, heals: int = 0) -> None:
        """Return when this direction is not cut, and `due` (monotonic) or a further heal has come."""
        while self._cut[direction] or (heals == self._heals and due > time.monotonic()):
            ahead_s = None if self._cut[direction] else due - time.monotonic()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), ahead_s)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: tuple[str, int]) -> None:
        target = None
        reset = True
        try:
            await self._passes(Direction.TO_TARGET)
            answers, target = await asyncio.open_connection(*address, limit=CHUNK_BYTES)
            async with asyncio.TaskGroup() as group:
                for direction, source, sink in (
                    (Direction.TO_TARGET, reader, target),
                    (Direction.FROM_TARGET, answers, writer),
                ):
                    chunks: _Chunks = asyncio.Queue(CHUNKS_MAX)
                    group.create_task(self._read(direction, source, chunks))
                    group.create_task(self._write(direction, chunks, sink))
            reset = False
        except* OSError:
            pass  # one end has reset or refused: `finally` passes that on to the other
        finally:
            for end in (writer, target):
                if end is not None:
                    _close(end, reset=reset)

    async def _read(self, direction: Direction, source: asyncio.StreamReader, chunks: _Chunks) -> None:
        data = b"-"
        while data:
            await self._passes(direction)
            try:
                data = await source.read(CHUNK_BYTES)
            except OSError:
                await self._passes(direction)  # a cut link does not show a reset either
                raise
            await chunks.put((time.monotonic() + self.delay_s if self.delay_s else 0.0, self._heals, data))

    async def _write(self, direction: Direction, chunks: _Chunks, sink: asyncio.StreamWriter) -> None:
        sink.transport.set_write_buffer_limits(0)  # `drain` returns when the kernel has taken everything
        while True:
            due, heals, data = await chunks.get()
            await self._passes(direction, due, heals)
            if not data:
                sink.write_eof()
                return
            sink.write(data)
            await sink.drain()
            self.carried_bytes += len(data)


def _close(end: asyncio.StreamWriter, *, reset: bool) -> None:
    """Close a connection that is not closing already."""
    if end.is_closing():
        return
    if reset:
        end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        end.transport.abort()
    else:
        end.close()
