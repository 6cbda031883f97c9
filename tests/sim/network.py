"""The network of the simulation: virtual time, and everything that a network may do to a message.

A message that is sent is lost, or arrives once or twice: at once, a little later, or so much later that its receiver, its sender
and half of what it speaks of are others by then. What is in flight when a node restarts reaches its successor. A cut link loses
what is sent over it, in one direction.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tablewire.model.messages import Message


@dataclass(frozen=True, slots=True)
class Weather:
    """Shares of all messages. slow: up to half a second late; late: up to late_s; a doubled one is late a second time."""

    drop: float = 0.0
    duplicate: float = 0.0
    slow: float = 0.0
    late: float = 0.0
    late_s: float = 8.0

    @classmethod
    def draw(cls, source: random.Random) -> Weather:
        """From fine to foul."""
        draw, badness = source.random, source.choice((0.0, 0.3, 1.0))
        return cls(
            drop=0.25 * badness * draw(),
            duplicate=0.3 * badness * draw(),
            slow=0.4 * badness * draw(),
            late=0.2 * badness * draw(),
            late_s=source.choice((1.0, 4.0, 12.0)),
        )


FINE = Weather()
SLOW_S = 0.5


def _ignore(_message: Message) -> None:
    pass


class SimNetwork:
    """Joins owners and agents. Everything it decides comes from the given random source; one thread."""

    def __init__(self, source: random.Random, clock: Callable[[], float]) -> None:
        self.weather = FINE
        self.on_send: Callable[[Message], None] = _ignore
        self.on_arrive: Callable[[Message], None] = _ignore
        self.cuts: dict[tuple[str, str], float] = {}
        """(sender, receiver), "*" for any -> when the link is whole again."""
        self._random, self._clock = source, clock
        self._inboxes: dict[str, list[Message]] = {}
        self._in_flight: list[tuple[float, float, int, Message]] = []
        self._sent = 0

    def transport(self, node_id: str) -> SimTransport:
        """A known id is a restart: a new, empty inbox, which gets what was in flight."""
        inbox: list[Message] = []
        self._inboxes[node_id] = inbox
        return SimTransport(self, node_id, inbox)

    def deliver(self) -> None:
        """What is due arrives; what is due at the same time, in any order."""
        now, flight = self._clock(), self._in_flight
        while flight and flight[0][0] <= now:
            self._arrive(heapq.heappop(flight)[3])

    def flush(self) -> None:
        """All that is in flight arrives now, in any order, and all links are whole."""
        self.cuts.clear()
        flight, self._in_flight = self._in_flight, []
        self._random.shuffle(flight)
        for *_, message in flight:
            self._arrive(message)

    def send(self, message: Message) -> None:
        self.on_send(message)
        if self.cuts and self._is_cut(message.sender, message.receiver):
            return
        weather, draw = self.weather, self._random.random
        if weather is FINE:
            self._arrive(message)
            return
        if draw() < weather.drop:
            return
        if draw() < weather.duplicate:
            self._later(message, draw() * weather.late_s)
        fate = draw()
        if fate < weather.late:
            self._later(message, draw() * weather.late_s)
        elif fate < weather.late + weather.slow:
            self._later(message, draw() * SLOW_S)
        else:
            self._arrive(message)

    def close(self, node_id: str, inbox: list[Message]) -> None:
        if self._inboxes.get(node_id) is inbox:
            del self._inboxes[node_id]

    def _is_cut(self, sender: str, receiver: str) -> bool:
        now = self._clock()
        return any(self.cuts.get(link, now) > now for link in ((sender, receiver), (sender, "*"), ("*", receiver)))

    def _later(self, message: Message, delay_s: float) -> None:
        self._sent += 1
        heapq.heappush(self._in_flight, (self._clock() + delay_s, self._random.random(), self._sent, message))

    def _arrive(self, message: Message) -> None:
        inbox = self._inboxes.get(message.receiver)
        if inbox is not None:
            self.on_arrive(message)
            inbox.append(message)


class SimTransport:
    """One node's end. `revision_floor`: messages of older owners do not get in (a process remembers what its agents may not)."""

    def __init__(self, network: SimNetwork, node_id: str, inbox: list[Message]) -> None:
        self._network, self._node_id, self._inbox = network, node_id, inbox
        self._is_open = True
        self.revision_floor = 0
        self.seen_revision = 0

    @property
    def is_empty(self) -> bool:
        return not self._inbox

    def send(self, messages: Sequence[Message]) -> None:
        if self._is_open:
            for message in messages:
                self._network.send(message)

    def recv(self) -> Sequence[Message]:
        inbox = self._inbox
        if not inbox:
            return ()
        messages = [message for message in inbox if message.owner_revision >= self.revision_floor]
        inbox.clear()
        for message in messages:
            self.seen_revision = max(self.seen_revision, message.owner_revision)
        return messages

    def close(self) -> None:
        self._is_open = False
        self._network.close(self._node_id, self._inbox)
        self._inbox.clear()
