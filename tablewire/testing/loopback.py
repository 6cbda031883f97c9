"""A network in one thread, for tests of schedulers and agents.

    network = LoopbackNetwork(seed=7)
    scheduler = new_scheduler(owner_id="owner", transport=network.transport("owner"), …)
    executor = FakeTableExecutor()
    agent = new_agent(capture_id="a", transport=network.transport("a"), executor=executor, …)
    network.hook = lambda sender, receiver, message: Deliver.DROP if receiver == "a" else Deliver.DELIVER

It starts no thread and reads no clock, and the seed determines all of its random numbers.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum

from tablewire.model.messages import Message, Transport
from tablewire.wire.codec import decode_message, encode_message

MAX_INBOX_MESSAGES = 100_000
"""Of one inbox, and of held messages. More are lost, as on any Transport."""


class Deliver(Enum):
    """The fate of a message."""

    DELIVER = "deliver"
    DROP = "drop"
    DUPLICATE = "duplicate"
    HOLD = "hold"


def _deliver(_sender: str, _receiver: str, _message: Message) -> Deliver:
    return Deliver.DELIVER


class LoopbackNetwork:
    """Connects a Scheduler and Agents. Not thread-safe.

    A sent message is in the receiver's next `recv`; a message to an id without a transport is lost.
    Unless `codec` is False, each message is encoded and decoded on the way.
    """

    hook: Callable[[str, str, Message], Deliver]
    """(sender, receiver, message) -> its fate; called when a message is sent."""

    def __init__(self, seed: int = 0, *, codec: bool = True) -> None:
        self.hook = _deliver
        self._random = random.Random(seed)
        self._codec = codec
        self._inboxes: dict[str, deque[Message]] = {}
        self._held: list[Message] = []

    def transport(self, node_id: str) -> Transport:
        """Return the transport of a node. A second call for the same id is a restart.

        The inbox is new, and the previous transport no longer receives anything.
        """
        inbox: deque[Message] = deque(maxlen=MAX_INBOX_MESSAGES)
        self._inboxes[node_id] = inbox
        return _LoopbackTransport(self, node_id, inbox)

    def release(self) -> None:
        """Deliver the held messages in an order that the seed determines, without the hook."""
        held, self._held = self._held, []
        self._random.shuffle(held)
        for message in held:
            self._arrive(message)

    def _send(self, sender: str, message: Message) -> None:
        fate = self.hook(sender, message.receiver, message)
        if fate is Deliver.DROP:
            return
        carried = decode_message(encode_message(message)) if self._codec else message
        if fate is Deliver.HOLD:
            if len(self._held) < MAX_INBOX_MESSAGES:
                self._held.append(carried)
            return
        self._arrive(carried)
        if fate is Deliver.DUPLICATE:
            self._arrive(carried)

    def _arrive(self, message: Message) -> None:
        inbox = self._inboxes.get(message.receiver)
        if inbox is not None:
            inbox.append(message)

    def _close(self, node_id: str, inbox: deque[Message]) -> None:
        if self._inboxes.get(node_id) is inbox:
            del self._inboxes[node_id]


class _LoopbackTransport:
    """The transport of one node. After close it sends and receives nothing."""

    def __init__(self, network: LoopbackNetwork, node_id: str, inbox: deque[Message]) -> None:
        self._network = network
        self._node_id = node_id
        self._inbox = inbox
        self._is_open = True

    def send(self, messages: Sequence[Message]) -> None:
        if self._is_open:
            for message in messages:
                self._network._send(self._node_id, message)

    def recv(self) -> Sequence[Message]:
        messages = list(self._inbox)
        self._inbox.clear()
        return messages

    def close(self) -> None:
        self._is_open = False
        self._network._close(self._node_id, self._inbox)
        self._inbox.clear()
