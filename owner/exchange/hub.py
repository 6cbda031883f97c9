"""ExchangeHub: the owner's end of every Exchange, shared by all changefeeds of the process.

A Scheduler gets a Transport per changefeed; the hub carries what they say to the captures, each on a thread of its own (see
peer.py), and puts the answers into bounded inboxes. Nothing here blocks its caller, and nothing grows with a slow peer.

How the owner's loop uses it:

    hub = ExchangeHub(owner_id, on_answer=mailbox_wake, may_send=leadership.is_held)
    hub.set_term(owner_revision)              # elected; nothing is sent yet
    hub.set_captures(alive)                   # whenever they change; channels open and close accordingly
    hub.set_active([...])                     # whenever it changes, and once per term: only now Exchanges start
    transport = hub.transport(changefeed, changefeed_epoch)     # for new_scheduler; transport.close() when it ends
    hub.stop_sending()                        # on any doubt: when it has returned, no new Exchange starts
    hub.close()
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import grpc

from owner.exchange.processor_client import ExchangeConfig, LeadershipToken, ProcessorClient, ProcessorClientView
from tablewire.errors import ClosedError
from tablewire.model.ids import CaptureID, CaptureInfo, ChangefeedID
from tablewire.model.messages import PROTOCOL_VERSION, ActiveChangefeed, Batch, DispatchTableResponse, HeartbeatResponse, Message
from tablewire.model.states import TableState
from tablewire.runtime.fair_queue import BoundedFairQueue
from tablewire.runtime.grpc import Renewed
from tablewire.wire.codec import rows_of

__all__ = ["ExchangeConfig", "ExchangeHub", "HubTransport", "ProcessorClientView"]

MAX_INBOX_MESSAGES: Final = 1_024
"""Of one capture in one changefeed's inbox; the oldest go first, and the next reports hold what they said. No less than
the chunks of one report that the core joins."""
MAX_INBOX_ROWS: Final = 2**22
CLOSE_TIMEOUT_S: Final = 5.0
"""How long close waits for each thread; a thread only ever waits for a cancelled call by then."""


def _always() -> bool:
    return True


def _nothing(_matters: bool) -> None:
    pass


class HubTransport:
    """One changefeed's Transport on the owner's side. send never blocks; recv and close belong to the scheduler's thread."""

    def __init__(self, hub: ExchangeHub, changefeed: ChangefeedID, changefeed_epoch: int) -> None:
        self.changefeed, self.changefeed_epoch = changefeed, changefeed_epoch
        self._hub = hub
        self._lock = threading.Lock()
        self._inbox: BoundedFairQueue[Message] = BoundedFairQueue(MAX_INBOX_MESSAGES, MAX_INBOX_ROWS)
        self._dropped = 0
        self._closed = False

    @property
    def dropped(self) -> int:
        """How many answers were pushed out of the inbox by newer ones of the same capture."""
        return self._dropped

    def send(self, messages: Sequence[Message]) -> None:
        """Queues the messages by receiver; those to captures that are not known are dropped and counted by the hub."""
        if self._closed:
            raise ClosedError(f"the transport of {self.changefeed} is closed")
        self._hub.queue(messages)

    def recv(self) -> Sequence[Message]:
        with self._lock:
            return self._inbox.take_all()

    def close(self) -> None:
        """Forgets what is queued in both directions. Idempotent."""
        if not self._closed:
            self._closed = True
            self._hub.forget(self)

    def put(self, message: Message) -> None:
        """From the hub, on the capture's thread."""
        with self._lock:
            self._dropped += self._inbox.put(message.sender, message, rows_of(message))


class ExchangeHub:
    """All methods: any thread, none blocks but close (which must not be called from on_answer).

    owner_id: this process as a sender; the Schedulers' `owner_id` must be the same. on_answer(matters) is called on a capture's
    thread when an answer has been put into the inboxes; matters: it holds a DispatchTableResponse, or the report of a span that
    is not Replicating, so that the owner should tick now. may_send is asked right before each call, under a lock: it must be
    quick; while it says no, nothing is sent. clock: seconds, monotone.
    """

    def __init__(
        self,
        owner_id: CaptureID,
        *,
        config: ExchangeConfig | None = None,
        on_answer: Callable[[bool], None] = _nothing,
        may_send: Callable[[], bool] = _always,
        credentials: grpc.ChannelCredentials | Renewed | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._owner_id = owner_id
        self._config = config if config is not None else ExchangeConfig()
        self._on_answer, self._may_send, self._credentials, self._clock = on_answer, may_send, credentials, clock
        # Guards all that follows, and makes "may this be sent" and "it is sent" one step. Peers never hold their own lock
        # when they take it.
        self._lock = threading.Lock()
        self._token = LeadershipToken()
        self._peers: dict[CaptureID, ProcessorClient] = {}
        self._retired: list[ProcessorClient] = []
        self._transports: dict[tuple[ChangefeedID, int], HubTransport] = {}
        self._unknown_receivers = 0
        self._strays = 0
        self._closed = False

    @property
    def token(self) -> LeadershipToken:
        return self._token

    @property
    def owner_revision(self) -> int:
        return self._token.owner_revision

    @property
    def unknown_receivers(self) -> int:
        """Messages to captures that are not known, dropped."""
        return self._unknown_receivers

    @property
    def strays(self) -> int:
        """Answers for changefeeds that have no transport (any more), dropped."""
        return self._strays

    def set_term(self, owner_revision: int) -> None:
        """A new term: what was queued in the former one is forgotten. Nothing is sent before `set_active`."""
        with self._lock:
            self._require_open()
            self._token = LeadershipToken(owner_revision=owner_revision, sending=True, generation=self._token.generation + 1)
            peers = list(self._peers.values())
        for peer in peers:
            peer.forget_all()

    def stop_sending(self) -> None:
        """Ends the term. After this has returned no new Exchange starts before the next `set_term`; calls under way are
        given up, and their answers are not delivered."""
        with self._lock:
            self._token = replace(self._token, sending=False)
            peers = list(self._peers.values())
        for peer in peers:
            peer.forget_all()

    def set_active(self, active: Sequence[ActiveChangefeed]) -> None:
        """The whole set of changefeeds that this owner schedules; goes with every batch, and to every capture at once when
        it has changed."""
        ordered = tuple(sorted(active))
        with self._lock:
            self._require_open()
            if self._token.active == ordered:
                return
            self._token = replace(self._token, active=ordered, generation=self._token.generation + 1)
            peers = list(self._peers.values())
        for peer in peers:
            peer.wake()

    def set_captures(self, captures: Mapping[CaptureID, CaptureInfo], versions: Mapping[CaptureID, int] | None = None) -> None:
        """The whole set of captures to speak with; the channels of others are closed, their queues forgotten.
        versions: of the wire, of those with whom it is not PROTOCOL_VERSION."""
        versions = versions or {}
        with self._lock:
            self._require_open()
            self._retired = [peer for peer in self._retired if peer.thread.is_alive()]
            for capture_id, peer in list(self._peers.items()):
                wanted = captures.get(capture_id)
                version = versions.get(capture_id, PROTOCOL_VERSION)
                if wanted is None or wanted.address != peer.capture.address or version != peer.version:
                    self._retired.append(self._peers.pop(capture_id))
                    peer.close()
            for capture_id in sorted(captures.keys() - self._peers.keys()):
                self._peers[capture_id] = ProcessorClient(
                    captures[capture_id],
                    self._owner_id,
                    self,
                    self._config,
                    self._credentials,
                    self._clock,
                    versions.get(capture_id, PROTOCOL_VERSION),
                )

    def transport(self, changefeed: ChangefeedID, changefeed_epoch: int) -> HubTransport:
        """A new transport with an empty inbox; an older one of the same run is closed."""
        with self._lock:
            self._require_open()
            older = self._transports.get((changefeed, changefeed_epoch))
        if older is not None:
            older.close()
        opened = HubTransport(self, changefeed, changefeed_epoch)
        with self._lock:
            self._transports[changefeed, changefeed_epoch] = opened
        return opened

    def client_views(self) -> Sequence[ProcessorClientView]:
        """Every capture, by id: calls, failures and what the last one was."""
        with self._lock:
            peers = [self._peers[capture_id] for capture_id in sorted(self._peers)]
        return [peer.view() for peer in peers]

    def close(self) -> None:
        """Ends the term and all threads, and waits for them. Idempotent."""
        with self._lock:
            self._closed = True
            self._token = replace(self._token, sending=False)
            peers = [*self._peers.values(), *self._retired]
            self._peers.clear()
            self._retired.clear()
            self._transports.clear()
        for peer in peers:
            peer.close()
        for peer in peers:
            peer.thread.join(CLOSE_TIMEOUT_S)

    # For the transports ----------------------------------------------------------------------------------------------

    def queue(self, messages: Sequence[Message]) -> None:
        by_receiver: dict[CaptureID, list[Message]] = {}
        for message in messages:
            by_receiver.setdefault(message.receiver, []).append(message)
        with self._lock:
            routes = [(self._peers.get(receiver), queued) for receiver, queued in by_receiver.items()]
            self._unknown_receivers += sum(len(queued) for peer, queued in routes if peer is None)
        for peer, queued in routes:
            if peer is not None:
                peer.put(queued)

    def forget(self, transport: HubTransport) -> None:
        run = (transport.changefeed, transport.changefeed_epoch)
        with self._lock:
            if self._transports.get(run) is transport:
                del self._transports[run]
            peers = list(self._peers.values())
        for peer in peers:
            peer.forget(*run)

    # For the peers, on their threads ---------------------------------------------------------------------------------

    def start_call(self, token: LeadershipToken, start: Callable[[], grpc.Future]) -> grpc.Future | None:
        with self._lock:
            now = self._token
            if not now.sending or now.owner_revision != token.owner_revision or not self._may_send():
                return None
            return start()

    def deliver(self, answer: Batch) -> None:
        with self._lock:
            if not self._token.sending or self._token.owner_revision != answer.owner_revision:
                return
            routes = [(self._transports.get((m.changefeed, m.changefeed_epoch)), m) for m in answer.messages]
            self._strays += sum(transport is None for transport, _ in routes)
        delivered = [message for transport, message in routes if transport is not None]
        for transport, message in routes:
            if transport is not None:
                transport.put(message)
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
