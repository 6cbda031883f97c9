"""The network of the simulation: virtual time, and every effect that a network may have on
messages.

A message is lost, or arrives once or twice: at once, a little later, or so much later that its
receiver and its sender have been replaced meanwhile. What is in flight when a node restarts reaches
its successor. A cut link loses the messages of one direction.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tablewire.model.messages import Message


@dataclass(frozen=True, slots=True)
class Weather:
    """Shares of all messages. slow: up to half a second late; late: up to late_s; a duplicate is
    late separately."""

    drop: float = 0.0
    duplicate: float = 0.0
    slow: float = 0.0
    late: float = 0.0
    late_s: float = 8.0

    @classmethod
    def draw(cls, source: random.Random) -> Weather:
        """Draw the shares for a storm, from none to many."""
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
    """Connects owners and agents. The given random source decides everything; one thread."""

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
        """Return the transport of a node. A known id is a restart: it gets a new, empty inbox,
        which receives what was in flight."""
        inbox: list[Message] = []
        self._inboxes[node_id] = inbox
        return SimTransport(self, node_id, inbox)

    def deliver(self) -> None:
        """Deliver the messages that are due; those that are due at the same time arrive in any
        order."""
        now, flight = self._clock(), self._in_flight
        while flight and flight[0][0] <= now:
            self._arrive(heapq.heappop(flight)[3])

    def flush(self) -> None:
        """Deliver all messages in flight, in any order, and restore all links."""
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
    """The endpoint of one node. Messages of owners below `revision_floor` are refused, as a process
    does for its agents."""

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
