"""Addresses and ports on the loopback for servers of ours.

Ports are taken below the kernel's range for outgoing connections, so that nobody's client can sit on one, and by chance,
so that two clusters started at once seldom meet; this process is not given a port again while it may still be about to bind
it; whoever starts a server still retries when the bind is lost to another process.
"""

from __future__ import annotations

import random
import socket
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from deploy.local.process import StartError

_PORT_FIRST, _PORT_LAST = 15_000, 31_999
_PORT_TRIES = 200
_PORTS_REMEMBERED = 1_000

BIND_TRIES = 5
"""How often a server is started again on other ports after it has lost its bind to somebody else."""

_chance = random.SystemRandom()
_given: deque[int] = deque(maxlen=_PORTS_REMEMBERED)
_T = TypeVar("_T")


class BindLostError(StartError):
    """A server could not bind: somebody took its port between our look and its start."""


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on at `host` now, and none of the last that were given here (a server of ours may not
    have bound its port yet); OSError when none is found. From any thread."""
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


def retry_bind(start: Callable[[], _T]) -> _T:
    """What `start` gives, called again (it picks new ports) while it raises BindLostError, at most BIND_TRIES times."""
    for _ in range(BIND_TRIES - 1):
        try:
            return start()
        except BindLostError:
            continue
    return start()


@dataclass(frozen=True, slots=True)
class Subnet:
    """One /24 of the loopback, chosen by chance: every node of a cluster gets an address of its own."""

    prefix: str

    @classmethod
    def any(cls) -> Subnet:
        return cls(f"127.{_chance.randint(16, 250)}.{_chance.randint(1, 250)}")

    def host(self, number: int) -> str:
        """The address of node `number`, 1..254. Where the loopback has one address alone (macOS), that one."""
        if not 1 <= number <= 254:
            raise ValueError(f"a subnet has hosts 1 to 254, not {number}")
        return f"{self.prefix}.{number}" if sys.platform == "linux" else "127.0.0.1"
