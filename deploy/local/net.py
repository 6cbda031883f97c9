"""Loopback addresses and ports for local servers, and the start of a server that may lose its port
to another process.

Ports are chosen below the kernel's range for outgoing connections, so that no client can occupy
one, and at random, so that two clusters that start at once rarely collide. A port may still be
taken before the server binds it; the start is then repeated.
"""

from __future__ import annotations

import random
import socket
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from deploy.local.process import ManagedProcess, StartError, tail, wait_until

_PORT_FIRST, _PORT_LAST = 15_000, 31_999
_PORT_TRIES = 200
_PORTS_REMEMBERED = 1_000
_BIND_ERRORS = ("address already in use", "cannot listen on", "could not bind", "could not create any TCP/IP sockets")
"""What the log of etcd, of Tablewire's services, or of PostgreSQL says when a port is taken."""

BIND_TRIES = 5
"""How often a server is started on new ports before its lost bind is an error."""

_chance = random.SystemRandom()
_given: deque[int] = deque(maxlen=_PORTS_REMEMBERED)
_T = TypeVar("_T")


class BindLostError(StartError):
    """A server could not bind its port, because another process took it first."""


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port that is free at `host` and was not returned recently (its server may not
    have bound it yet).

    Any thread. Raises OSError when none is found.
    """
    for _ in range(_PORT_TRIES):
        port = _chance.randint(_PORT_FIRST, _PORT_LAST)
        if port in _given:
            continue
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
        _given.append(port)
        return port
    raise OSError(f"no free TCP port at {host} between {_PORT_FIRST} and {_PORT_LAST}")


def wait_answering(process: ManagedProcess, answers: Callable[[], bool], timeout_s: float) -> None:
    """Wait until a server answers after its start.

    Raises StartError with the end of its log when it ends first or does not answer in time,
    BindLostError when its log says that it could not bind.
    """
    try:
        wait_until(f"{process.name} is ready", lambda: not process.running or answers(), timeout_s)
    except TimeoutError as error:
        raise StartError(f"{error}\n{tail(process.log)}") from None
    if not process.running:
        text = process.log_since_start()
        reason = f"{process.name} ended with {process.exit_code}\n{text[-4000:]}"
        raise BindLostError(reason) if any(sign in text for sign in _BIND_ERRORS) else StartError(reason)


def retry_bind(start: Callable[[], _T]) -> _T:
    """Call `start`, which chooses new ports each time, until it raises no BindLostError; BIND_TRIES times."""
    for _ in range(BIND_TRIES - 1):
        try:
            return start()
        except BindLostError:
            continue
    return start()


@dataclass(frozen=True, slots=True)
class Subnet:
    """A random /24 of the loopback, so that each node of a cluster has an address of its own."""

    prefix: str

    @classmethod
    def any(cls) -> Subnet:
        return cls(f"127.{_chance.randint(16, 250)}.{_chance.randint(1, 250)}")

    def host(self, number: int) -> str:
        """Return the address of node `number` (1 to 254); on macOS the loopback has a single one."""
        if not 1 <= number <= 254:
            raise ValueError(f"a subnet has hosts 1 to 254, not {number}")
        return f"{self.prefix}.{number}" if sys.platform == "linux" else "127.0.0.1"
