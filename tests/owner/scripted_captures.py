"""Captures that answer as a test wants, on real gRPC servers, and the messages that tests of the hub send to them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import numpy as np

from owner.exchange.hub import ExchangeHub
from owner.owner_config import OwnerExchangeSection
from tablewire.model.ids import CaptureInfo, ChangefeedID
from tablewire.model.messages import (
    ActiveChangefeed,
    Batch,
    DispatchTableRequest,
    Heartbeat,
    HeartbeatResponse,
    Message,
    MessageBody,
    SpanReports,
)
from tablewire.model.progress import Barrier
from tablewire.model.spans import SpanBlock
from tablewire.model.states import DispatchAction, LivenessState, TableState
from tablewire.runtime.grpc import listen, server_options
from tablewire.wire.codec import EXCHANGE_METHOD, EXCHANGE_SERVICE, decode_batch, encode_batch

OWNER = "owner-1"
REVISION = 7
ORDERS, USERS = ChangefeedID("default", "orders"), ChangefeedID("default", "users")
ACTIVE = (ActiveChangefeed(ORDERS, 1), ActiveChangefeed(USERS, 1))
DEADLINE_S = 10.0
QUICK = OwnerExchangeSection(timeout_ms=5_000, idle_ms=50, failure_pause_ms=20)


def to(capture: str, body: MessageBody, number: int, *, changefeed: ChangefeedID = ORDERS, revision: int = REVISION) -> Message:
    return Message(OWNER, capture, changefeed, revision, 1, 0, number, 0, body)


def beat(barrier_ts: int = 5) -> Heartbeat:
    return Heartbeat(Barrier(barrier_ts))


def dispatch() -> DispatchTableRequest:
    one = np.ones(1, np.uint64)
    return DispatchTableRequest(
        np.ones(1, np.uint32), SpanBlock(np.ones(1, np.int64)), np.array([DispatchAction.REMOVE], np.uint8), one, one, one
    )


def report(*states: TableState) -> SpanReports:
    rows = len(states)
    zeros = np.zeros(rows, np.uint64)
    return SpanReports(
        1,
        np.arange(1, rows + 1, dtype=np.uint32),
        SpanBlock(np.empty(0, np.int64)),
        np.array([state.code for state in states], np.uint8),
        zeros,
        zeros,
        zeros,
        zeros,
    )


def response(*states: TableState) -> HeartbeatResponse:
    return HeartbeatResponse(LivenessState.ALIVE, True, len(states), 0, report(*states))


class ScriptedCapture:
    """A real gRPC server whose answers a test writes. `hold` keeps every call waiting until it is let go."""

    def __init__(self, capture_id: str, port: int = 0) -> None:
        self.id = capture_id
        self.answer: Callable[[Batch], list[Message]] = lambda batch: []
        self.raw: bytes | None = None
        self.batches: list[Batch] = []
        self.in_flight = self.most_in_flight = 0
        self._changed = threading.Condition()
        self._go = threading.Event()
        self._go.set()
        self._server = grpc.server(ThreadPoolExecutor(8, thread_name_prefix="scripted"), options=server_options())
        handler = grpc.unary_unary_rpc_method_handler(self._exchange)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(EXCHANGE_SERVICE, {EXCHANGE_METHOD: handler}),)
        )
        self.port = listen(self._server, "127.0.0.1", port)
        self._server.start()

    @property
    def info(self) -> CaptureInfo:
        return CaptureInfo(self.id, f"127.0.0.1:{self.port}")

    def hold(self) -> None:
        self._go.clear()

    def let_go(self) -> None:
        self._go.set()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Waits until the condition holds, looked at whenever a call came or went."""
        with self._changed:
            assert self._changed.wait_for(condition, DEADLINE_S), f"{self.id}: {len(self.batches)} batches came"

    def messages(self) -> list[Message]:
        return [message for batch in self.batches for message in batch.messages]

    def stop(self) -> None:
        self.let_go()
        self._server.stop(0).wait()

    def _exchange(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        batch = decode_batch(request)
        with self._changed:
            self.batches.append(batch)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            self._changed.notify_all()
        self._go.wait(DEADLINE_S)
        with self._changed:
            self.in_flight -= 1
            self._changed.notify_all()
        if self.raw is not None:
            return self.raw
        return encode_batch(Batch(self.id, OWNER, batch.owner_revision, (), tuple(self.answer(batch))))


class Answers:
    """What on_answer received, to wait on."""

    def __init__(self) -> None:
        self.matters: list[bool] = []
        self._changed = threading.Condition()

    def __call__(self, matters: bool) -> None:
        with self._changed:
            self.matters.append(matters)
            self._changed.notify_all()

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.matters) >= count, DEADLINE_S), self.matters


def until(condition: Callable[[], bool]) -> None:
    """Poll a condition that has no notification, with a deadline."""
    never = threading.Event()
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        never.wait(0.005)


@contextmanager
def running_hub(answers: Answers) -> Iterator[ExchangeHub]:
    """A hub that must leave no thread behind."""
    hub = ExchangeHub(OWNER, config=QUICK, on_answer=answers)
    yield hub
    hub.close()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("exchange-")] == []


@contextmanager
def running_captures() -> Iterator[dict[str, ScriptedCapture]]:
    """Two captures, "a" and "b"."""
    made = {name: ScriptedCapture(name) for name in ("a", "b")}
    yield made
    for capture in made.values():
        capture.stop()


def lead(hub: ExchangeHub, *captures: ScriptedCapture) -> None:
    hub.set_term(REVISION)
    hub.set_captures({capture.id: capture.info for capture in captures})
    hub.set_active(ACTIVE)
