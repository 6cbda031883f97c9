"""The admin gRPC service: a thin face of `owner.admin.operations`. Runs in gRPC's pool; nothing here waits for a tick.

`new_admin_server` gives a server that answers on the leader and passes calls on elsewhere (`owner.admin.forwarding`). Calls that
wait (a move until it is decided, the checks of `create`) hold a thread of the pool, so there is a limit on them, and the
others always find one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from owner.admin import cluster_operations, operations
from owner.admin import plans as planning
from owner.admin.caller_identity import caller_of
from owner.admin.errors import AlreadyExistsError, InvalidRequestError, RefusedError, UnknownTableError
from owner.admin.forwarding import SERVICE, ForwardToLeader, abort_for_retry
from owner.admin.jobs import FollowedJob, follow
from owner.admin.ports import OwnerPort
from owner.admin.probe import OpenChannel
from owner.changefeed.store import ChangefeedRefusedError
from tablewire.errors import (
    ClosedError,
    ConfigError,
    ConflictError,
    EtcdError,
    NotLeaderError,
    OperatingError,
    UnknownCaptureError,
    UnknownChangefeedError,
)
from tablewire.runtime.grpc import open_channel, server_options
from tablewire.runtime.rates import RateLimit
from tablewire.v1 import admin_pb2 as pb
from tablewire.v1 import admin_pb2_grpc

WORKERS = 16
WAITERS_MAX = 10
FOLLOWERS_MAX = 4
CONCURRENT_CALLS_MAX = 64
CALLS_PER_S_MAX = 2_000
CALLS_BURST_MAX = 4_000
REQUEST_BYTES_MAX = 1 << 20
CHUNK_ROWS = 1_000
CHUNK_BYTES = 1 << 20
STATUS_BYTES_MAX = 7_000
"""gRPC carries the text in a header, percent-encoded, and foreign clients refuse headers beyond 8 KiB."""
DECISION_WAIT_MS_DEFAULT = 10_000

_STATUS = grpc.StatusCode
_CODES: tuple[tuple[type[OperatingError], grpc.StatusCode], ...] = (
    (InvalidRequestError, _STATUS.INVALID_ARGUMENT),
    (UnknownChangefeedError, _STATUS.NOT_FOUND),
    (UnknownCaptureError, _STATUS.NOT_FOUND),
    (UnknownTableError, _STATUS.NOT_FOUND),
    (AlreadyExistsError, _STATUS.ALREADY_EXISTS),
    (RefusedError, _STATUS.FAILED_PRECONDITION),
    (ChangefeedRefusedError, _STATUS.FAILED_PRECONDITION),
    (ConfigError, _STATUS.FAILED_PRECONDITION),
    (ConflictError, _STATUS.ABORTED),
    (EtcdError, _STATUS.UNAVAILABLE),
    (OperatingError, _STATUS.FAILED_PRECONDITION),
)


@dataclass(frozen=True, slots=True)
class AdminServer:
    """A gRPC server that is not bound yet: add its port (and what else it serves), start it, and close it."""

    server: grpc.Server
    forwarder: ForwardToLeader

    def close(self, grace_s: float = 1.0) -> None:
        """No new calls; those under way get grace_s, then they are cancelled. Returns when all have ended."""
        self.server.stop(grace_s).wait()
        self.forwarder.close()


def new_admin_server(
    owner: OwnerPort, open_channel: OpenChannel = open_channel, interceptors: Sequence[grpc.ServerInterceptor] = ()
) -> AdminServer:
    """open_channel: to another owner, with this cluster's credentials. interceptors: whom to let in at all."""
    forwarder = ForwardToLeader(owner, open_channel)
    server = grpc.server(
        ThreadPoolExecutor(WORKERS, thread_name_prefix="admin"),
        interceptors=(RateLimit(CALLS_PER_S_MAX, CALLS_BURST_MAX), *interceptors, forwarder),
        options=list({**dict(server_options()), "grpc.max_receive_message_length": REQUEST_BYTES_MAX}.items()),
        maximum_concurrent_rpcs=CONCURRENT_CALLS_MAX,
    )
    admin_pb2_grpc.add_AdminServicer_to_server(AdminServicer(owner), server)  # type: ignore[no-untyped-call]  # generated
    return AdminServer(server, forwarder)


SERVICE_NAMES = (SERVICE,)
"""For health and reflection."""


class AdminServicer(admin_pb2_grpc.AdminServicer):
    """See admin.proto for what each call means."""

    def __init__(self, owner: OwnerPort) -> None:
        self._owner = owner
        self._waiters = threading.BoundedSemaphore(WAITERS_MAX)
        self._followers = threading.BoundedSemaphore(FOLLOWERS_MAX)

    def GetStatus(self, _request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        with _errors(context):
            return cluster_operations.cluster_status(self._owner)

    def Resign(self, _request: pb.ResignRequest, context: Any) -> pb.ResignResponse:
        with _errors(context):
            return pb.ResignResponse(owner_id=cluster_operations.resign(self._owner, caller_of(context)))

    def ListCaptures(self, _request: pb.ListCapturesRequest, context: Any) -> pb.ListCapturesResponse:
        with _errors(context):
            return pb.ListCapturesResponse(captures=cluster_operations.list_captures(self._owner))

    def DrainCapture(self, request: pb.DrainCaptureRequest, context: Any) -> pb.DrainCaptureResponse:
        verb = cluster_operations.cancel_drain if request.cancel else cluster_operations.drain
        with _errors(context):
            return verb(self._owner, request.capture, caller_of(context))

    def GetDrain(self, request: pb.GetDrainRequest, context: Any) -> pb.DrainCaptureResponse:
        with _errors(context):
            return cluster_operations.drain_progress(self._owner, request.capture)

    def CreateChangefeed(self, request: pb.CreateChangefeedRequest, context: Any) -> pb.Changefeed:
        with _errors(context), self._waiting(context):
            return operations.create_changefeed(self._owner, request, caller_of(context))

    def ListChangefeeds(self, _request: pb.ListChangefeedsRequest, context: Any) -> pb.ListChangefeedsResponse:
        with _errors(context):
            return pb.ListChangefeedsResponse(changefeeds=operations.list_changefeeds(self._owner))

    def QueryChangefeed(self, request: pb.ChangefeedRequest, context: Any) -> pb.Changefeed:
        with _errors(context):
            return operations.query_changefeed(self._owner, request.changefeed)

    def PauseChangefeed(self, request: pb.ChangefeedRequest, context: Any) -> pb.Changefeed:
        with _errors(context):
            return operations.pause_changefeed(self._owner, request.changefeed, caller_of(context))

    def ResumeChangefeed(self, request: pb.ChangefeedRequest, context: Any) -> pb.Changefeed:
        with _errors(context):
            return operations.resume_changefeed(self._owner, request.changefeed, caller_of(context))

    def UpdateChangefeed(self, request: pb.UpdateChangefeedRequest, context: Any) -> pb.Changefeed:
        with _errors(context), self._waiting(context):
            return operations.update_changefeed(self._owner, request, caller_of(context))

    def RemoveChangefeed(self, request: pb.ChangefeedRequest, context: Any) -> pb.RemoveChangefeedResponse:
        with _errors(context):
            return pb.RemoveChangefeedResponse(
                changefeed=operations.remove_changefeed(self._owner, request.changefeed, caller_of(context))
            )

    def ListTables(self, request: pb.ListTablesRequest, context: Any) -> Iterator[pb.ListTablesResponse]:
        with _errors(context), self._waiting(context):
            changefeed, rows = operations.list_tables(self._owner, request)
            chunk, size = pb.ListTablesResponse(changefeed=changefeed), 0
            for count, message in enumerate(rows):
                if request.limit and count == request.limit:
                    chunk.truncated = True
                    break
                size += message.ByteSize()
                chunk.tables.append(message)
                if len(chunk.tables) == CHUNK_ROWS or size >= CHUNK_BYTES:
                    if not context.is_active():
                        return
                    yield chunk
                    chunk, size = pb.ListTablesResponse(), 0
            yield chunk

    def MoveTable(self, request: pb.MoveTableRequest, context: Any) -> Iterator[pb.Job]:
        def ask() -> Sequence[FollowedJob]:
            return [operations.move_table(self._owner, request.changefeed, request.table, request.target, caller_of(context))]

        return self._follow(ask, request.wait_done, request.wait_ms, context)

    def Rebalance(self, request: pb.RebalanceRequest, context: Any) -> Iterator[pb.Job]:
        def ask() -> Sequence[FollowedJob]:
            return operations.rebalance(self._owner, request.changefeed, caller_of(context))

        return self._follow(ask, request.wait_done, request.wait_ms, context)

    def PlanMove(self, request: pb.PlanMoveRequest, context: Any) -> Iterator[pb.Plan]:
        with _errors(context), self._waiting(context):
            yield from _chunks(planning.plan_move(self._owner, request.changefeed, request.table, request.target))

    def PlanDrain(self, request: pb.PlanDrainRequest, context: Any) -> Iterator[pb.Plan]:
        with _errors(context), self._waiting(context):
            yield from _chunks(planning.plan_drain(self._owner, request.capture))

    def PlanRebalance(self, request: pb.PlanRebalanceRequest, context: Any) -> Iterator[pb.Plan]:
        with _errors(context), self._waiting(context):
            yield from _chunks(planning.plan_rebalance(self._owner, request.changefeed))

    def ListEvents(self, request: pb.ListEventsRequest, context: Any) -> Iterator[pb.ListEventsResponse]:
        with _errors(context), self._taking(self._followers if request.follow else self._waiters, context):
            after = request.after
            rows = cluster_operations.list_events(self._owner, after, request.limit)
            for at in range(0, max(1, len(rows)), CHUNK_ROWS):
                yield pb.ListEventsResponse(events=rows[at : at + CHUNK_ROWS])
            if request.follow:
                after = rows[-1].sequence if rows else after
                for news in cluster_operations.follow_events(self._owner, after, context.is_active):
                    yield pb.ListEventsResponse(events=news)

    def _follow(self, ask: Callable[[], Sequence[FollowedJob]], until_done: bool, wait_ms: int, context: Any) -> Iterator[pb.Job]:
        timeout_s = (wait_ms or DECISION_WAIT_MS_DEFAULT) / 1000
        # The place among the waiters first: a call that finds none must not have started anything.
        with _errors(context), self._waiting(context):
            yield from follow(ask(), until_done=until_done, timeout_s=timeout_s, is_wanted=context.is_active)

    def _waiting(self, context: Any) -> AbstractContextManager[None]:
        return self._taking(self._waiters, context)

    @contextmanager
    def _taking(self, places: threading.BoundedSemaphore, context: Any) -> Iterator[None]:
        if not places.acquire(blocking=False):
            limit, what = (FOLLOWERS_MAX, "follow events") if places is self._followers else (WAITERS_MAX, "wait")
            context.abort(_STATUS.RESOURCE_EXHAUSTED, f"{limit} calls that {what} are under way already; try again later")
        try:
            yield
        finally:
            places.release()


@contextmanager
def _errors(context: Any) -> Iterator[None]:
    """Expected trouble becomes a status with the same text; anything else is a bug and gRPC's to report."""
    try:
        yield
    except (NotLeaderError, ClosedError) as error:
        abort_for_retry(context, clip(f"this owner's leadership ended meanwhile: {error}; try again"))
    except OperatingError as error:
        _abort(context, error)


def _abort(context: Any, error: OperatingError) -> NoReturn:
    code = next(code for kind, code in _CODES if isinstance(error, kind))
    context.abort(code, clip(str(error)))
    raise AssertionError("abort returned")


def clip(text: str, bytes_max: int = STATUS_BYTES_MAX) -> str:
    """The text, cut where it would not fit a header: a byte beyond ASCII counts three times."""
    if len(text) * 12 <= bytes_max:
        return text
    size = 0
    for at, character in enumerate(text):
        encoded = character.encode(errors="replace")
        size += len(encoded) if len(encoded) == 1 and character not in "%\n\r\t" else 3 * len(encoded)
        if size > bytes_max:
            return f"{text[:at]} ... ({len(text) - at} more characters)"
    return text


def _chunks(plan: pb.Plan) -> Iterator[pb.Plan]:
    """Split a plan, since it may contain many moves."""
    chunk = pb.Plan(changefeeds=plan.changefeeds, load_before=plan.load_before, load_after=plan.load_after, note=plan.note)
    for at in range(0, max(len(plan.moves), 1), CHUNK_ROWS):
        chunk.moves.extend(plan.moves[at : at + CHUNK_ROWS])
        yield chunk
        chunk = pb.Plan()
