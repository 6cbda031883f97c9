"""The hub of all Exchanges of an owner process: a client for each processor, a Transport for each changefeed.

How the owner uses it:

    hub = ExchangeHub(owner_id, on_answer=answered, may_send=leads)
    hub.set_term(owner_revision)              # elected; nothing is sent yet
    hub.set_captures(captures)                # whenever they change; clients are made and closed accordingly
    hub.set_active([...])                     # whenever it changes, and once for each term: from here on calls start
    transport = hub.transport(changefeed, changefeed_epoch)     # for new_scheduler; transport.close() when it ends
    hub.stop_sending()                        # on any doubt: once it has returned, no new call starts
    hub.close()
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import grpc

from owner.exchange.processor_client import LeadershipToken, ProcessorClient, ProcessorClientView
from owner.owner_config import OwnerExchangeSection
from tablewire.errors import ClosedError
from tablewire.model.ids import CaptureID, CaptureInfo, ChangefeedID
from tablewire.model.messages import PROTOCOL_VERSION, ActiveChangefeed, Batch, DispatchTableResponse, HeartbeatResponse, Message
from tablewire.model.states import TableState
from tablewire.runtime.grpc import CredentialsProvider
from tablewire.runtime.message_queues import ChangefeedTransport, ChangefeedTransports

__all__ = ["ExchangeHub", "ProcessorClientView"]

CLOSE_TIMEOUT_S: Final = 5.0
"""How long close waits for each thread, which by then waits only for a cancelled call."""


class ExchangeHub:
    """All methods: any thread; only close blocks (and must not be called from on_answer).

    owner_id: the sender of every batch, the Schedulers' `owner_id`. on_answer(matters): called on a client's thread after an
    answer was put into the inboxes. matters: the answer holds a DispatchTableResponse, or the report of a span that is not
    Replicating, so the owner should tick now. may_send: asked under a lock right before each call; must be quick. clock: seconds,
    monotone.
    """

    def __init__(
        self,
        owner_id: CaptureID,
        *,
        config: OwnerExchangeSection | None = None,
        on_answer: Callable[[bool], None] = lambda _matters: None,
        may_send: Callable[[], bool] = lambda: True,
        credentials: grpc.ChannelCredentials | CredentialsProvider | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._owner_id = owner_id
        self._config = config or OwnerExchangeSection()
        self._on_answer, self._may_send, self._credentials, self._clock = on_answer, may_send, credentials, clock
        self._lock = threading.Lock()
        """Guards all below, and makes "may this be sent" and "it is sent" one step."""
        self.owner_revision = 0
        """Of the last term."""
        self.token: LeadershipToken | None = None
        """Under which calls may be made; None: nothing may be sent."""
        self._sending = False
        self._clients: dict[CaptureID, ProcessorClient] = {}  # replaced, never changed: read without the lock
        self._closing: list[ProcessorClient] = []
        self._transports = ChangefeedTransports(self._send, self._forget)
        self.unknown_receivers = 0
        """How many messages were dropped because their capture is not known."""
        self.strays = 0
        """How many answers were dropped because their changefeed has no Transport."""
        self._closed = False

    def set_term(self, owner_revision: int) -> None:
        """Begin a term: what was queued in the former one is dropped. Nothing is sent before `set_active`."""
        with self._lock:
            self._require_open()
            self.owner_revision, self._sending, self.token = owner_revision, True, None
            clients = self._clients
        for client in clients.values():
            client.reset()

    def stop_sending(self) -> None:
        """End the term: no new call starts before the next `set_term`, and the answers of calls under way are dropped."""
        with self._lock:
            self._sending, self.token = False, None
            clients = self._clients
        for client in clients.values():
            client.reset()

    def set_active(self, active: Sequence[ActiveChangefeed]) -> None:
        """Set the whole set of changefeeds that this owner schedules.

        It goes with every batch, and when it has changed to every processor at once. Processors close the agents of all other
        changefeeds, so nothing is sent before it is known.
        """
        ordered = tuple(sorted(active))
        with self._lock:
            self._require_open()
            if not self._sending or (self.token is not None and self.token.active == ordered):
                return
            self.token = LeadershipToken(self.owner_revision, ordered)
            clients = self._clients
        for client in clients.values():
            client.wake()

    def set_captures(self, captures: Mapping[CaptureID, CaptureInfo], versions: Mapping[CaptureID, int] | None = None) -> None:
        """Set the whole set of processors to call; the clients of all others are closed and their queues dropped.

        versions: of the wire, for those that do not use PROTOCOL_VERSION.
        """
        versions = versions or {}
        with self._lock:
            self._require_open()
            self._closing = [client for client in self._closing if client.thread.is_alive()]
            clients = {}
            for capture_id, capture in sorted(captures.items()):
                version, client = versions.get(capture_id, PROTOCOL_VERSION), self._clients.get(capture_id)
                if client is None or (client.capture.address, client.version) != (capture.address, version):
                    client = ProcessorClient(capture, version, self._owner_id, self, self._config, self._credentials, self._clock)
                clients[capture_id] = client
            for capture_id, client in self._clients.items():
                if clients.get(capture_id) is not client:
                    client.close()
                    self._closing.append(client)
            self._clients = clients

    def transport(self, changefeed: ChangefeedID, changefeed_epoch: int) -> ChangefeedTransport:
        """Return a new Transport with an empty inbox; an older one of the same run is closed."""
        self._require_open()
        return self._transports.open(changefeed, changefeed_epoch)

    def client_views(self) -> Sequence[ProcessorClientView]:
        """Return the state of every client, by capture id."""
        return [client.view() for client in self._clients.values()]

    def close(self) -> None:
        """End the term and all threads, and wait for them. Idempotent."""
        with self._lock:
            self._closed, self._sending, self.token = True, False, None
            clients = [*self._clients.values(), *self._closing]
            self._clients, self._closing = {}, []
        for client in clients:
            client.close()
        for client in clients:
            client.thread.join(CLOSE_TIMEOUT_S)

    # For the transports ----------------------------------------------------------------------------------------------

    def _send(self, messages: Sequence[Message]) -> None:
        """Put the messages into the outboxes of their receivers."""
        by_receiver: dict[CaptureID, list[Message]] = {}
        for message in messages:
            by_receiver.setdefault(message.receiver, []).append(message)
        for receiver, queued in by_receiver.items():
            client = self._clients.get(receiver)
            if client is not None:
                client.send(queued)
            else:
                with self._lock:
                    self.unknown_receivers += len(queued)

    def _forget(self, changefeed: ChangefeedID, changefeed_epoch: int) -> None:
        for client in self._clients.values():
            client.forget(changefeed, changefeed_epoch)

    # For the clients, on their threads -------------------------------------------------------------------------------

    def start_call(self, token: LeadershipToken, start: Callable[[], grpc.Future]) -> grpc.Future | None:
        with self._lock:
            if self.token is None or self.token.owner_revision != token.owner_revision or not self._may_send():
                return None
            return start()

    def deliver(self, answer: Batch) -> None:
        """Put the messages of an answer into the inboxes of their changefeeds, unless the term of the call is over."""
        with self._lock:
            if self.token is None or self.token.owner_revision != answer.owner_revision:
                return
            delivered = self._transports.deliver(answer.messages)
            self.strays += len(answer.messages) - len(delivered)
        if delivered:
            self._on_answer(any(map(_matters, delivered)))

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError("the exchange hub is closed")


def _matters(message: Message) -> bool:
    match message.body:
        case DispatchTableResponse():
            return True
        case HeartbeatResponse(reports=reports):
            return bool((reports.states != TableState.REPLICATING.code).any())
        case _:
            return False
