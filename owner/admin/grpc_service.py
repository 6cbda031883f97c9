"""The admin gRPC service, which serves the operations in gRPC's thread pool and waits for no tick.

`new_admin_server` makes a server that answers on the leader and forwards calls elsewhere
(`owner.admin.forwarding`). A call that waits (for the decision on a move, for the checks of
`create`) holds a thread of the pool; their number is limited so that other calls always find one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import grpc

from owner.admin import cluster_operations, operations, plans
from owner.admin.caller_identity import caller_of
from owner.admin.errors import AlreadyExistsError, InvalidRequestError, UnknownTableError
from owner.admin.forwarding import ForwardToLeader, abort_for_retry
from owner.admin.jobs import FollowedJob, follow
from owner.admin.ports import OwnerPort
from owner.admin.probe import SERVICE, OpenChannel
from tablewire.errors import (
    ClosedError,
    ConflictError,
    EtcdError,
    NotLeaderError,
    OperatingError,
    UnknownCaptureError,
    UnknownChangefeedError,
)
from tablewire.model.ids import CaptureID
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
"""gRPC carries the text in a header, percent-encoded, and some clients refuse headers beyond 8 KiB."""
DECISION_WAIT_MS_DEFAULT = 10_000
SERVICE_NAMES = (SERVICE,)
"""For health and reflection."""

_STATUS = grpc.StatusCode
_CODES: dict[type[OperatingError], grpc.StatusCode] = {
    InvalidRequestError: _STATUS.INVALID_ARGUMENT,
    UnknownChangefeedError: _STATUS.NOT_FOUND,
    UnknownCaptureError: _STATUS.NOT_FOUND,
    UnknownTableError: _STATUS.NOT_FOUND,
    AlreadyExistsError: _STATUS.ALREADY_EXISTS,
    ConflictError: _STATUS.ABORTED,
    EtcdError: _STATUS.UNAVAILABLE,
    OperatingError: _STATUS.FAILED_PRECONDITION,  # RefusedError, ChangefeedRefusedError, ConfigError ...
}
"""The first class that fits determines the status."""


@dataclass(frozen=True, slots=True)
class AdminServer:
    """A gRPC server that is not bound yet: add its port (and other services), start it, and close it."""

    server: grpc.Server
    forwarder: ForwardToLeader

    def close(self, grace_s: float = 1.0) -> None:
        """Refuse new calls, cancel those that have not ended after grace_s, and return when all have ended."""
        self.server.stop(grace_s).wait()
        self.forwarder.close()


def new_admin_server(
    owner: OwnerPort, open_channel: OpenChannel = open_channel, interceptors: Sequence[grpc.ServerInterceptor] = ()
) -> AdminServer:
    """Return a server of the admin API. open_channel: to other owners. interceptors: which clients may call."""
    forwarder = ForwardToLeader(owner, open_channel)
    server = grpc.server(
        ThreadPoolExecutor(WORKERS, thread_name_prefix="admin"),
        interceptors=(RateLimit(CALLS_PER_S_MAX, CALLS_BURST_MAX), *interceptors, forwarder),
        options=list({**dict(server_options()), "grpc.max_receive_message_length": REQUEST_BYTES_MAX}.items()),
        maximum_concurrent_rpcs=CONCURRENT_CALLS_MAX,
    )
    admin_pb2_grpc.add_AdminServicer_to_server(AdminServicer(owner), server)  # type: ignore[no-untyped-call]  # generated
    return AdminServer(server, forwarder)


def _unary(operation: Callable[[OwnerPort, Any, str], Any], waits: bool = False) -> Callable[..., Any]:
    """Serve an operation on the owner, the request and the name of the caller. waits: it may take long."""

    def serve(self: AdminServicer, request: Any, context: Any) -> Any:
        with _errors(context), self._place(self._waiters, context) if waits else nullcontext():
            return operation(self._owner, request, caller_of(context))

    return serve


def _stream(operation: Callable[[OwnerPort, Any, Any], Iterator[Any]]) -> Callable[..., Any]:
    """Serve an operation on the owner, the request and the context of the call, which may take long."""

    def serve(self: AdminServicer, request: Any, context: Any) -> Iterator[Any]:
        # The place comes first: a call that finds none must not have started anything.
        with _errors(context), self._place(self._waiters, context):
            yield from operation(self._owner, request, context)

    return serve


def _drain(request: pb.DrainCaptureRequest) -> Callable[[OwnerPort, CaptureID, str], pb.DrainCaptureResponse]:
    return cluster_operations.cancel_drain if request.cancel else cluster_operations.drain


def _list_tables(owner: OwnerPort, request: pb.ListTablesRequest, context: Any) -> Iterator[pb.ListTablesResponse]:
    changefeed, rows = operations.list_tables(owner, request)
    chunk, size = pb.ListTablesResponse(changefeed=changefeed), 0
    for count, row in enumerate(rows):
        if request.limit and count == request.limit:
            chunk.truncated = True
            break
        size += row.ByteSize()
        chunk.tables.append(row)
        if len(chunk.tables) == CHUNK_ROWS or size >= CHUNK_BYTES:
            if not context.is_active():
                return
            yield chunk
            chunk, size = pb.ListTablesResponse(), 0
    yield chunk


def _move_table(owner: OwnerPort, request: pb.MoveTableRequest, context: Any) -> Iterator[pb.Job]:
    job = operations.move_table(owner, request.changefeed, request.table, request.target, caller_of(context))
    return _follow([job], request, context)


def _rebalance(owner: OwnerPort, request: pb.RebalanceRequest, context: Any) -> Iterator[pb.Job]:
    return _follow(operations.rebalance(owner, request.changefeed, caller_of(context)), request, context)


def _follow(jobs: Sequence[FollowedJob], request: pb.MoveTableRequest | pb.RebalanceRequest, context: Any) -> Iterator[pb.Job]:
    timeout_s = (request.wait_ms or DECISION_WAIT_MS_DEFAULT) / 1000
    return follow(jobs, until_done=request.wait_done, timeout_s=timeout_s, is_wanted=context.is_active)


def _chunks(plan: pb.Plan) -> Iterator[pb.Plan]:
    """Split a plan, since it may contain many moves."""
    chunk = pb.Plan(changefeeds=plan.changefeeds, load_before=plan.load_before, load_after=plan.load_after, note=plan.note)
    for at in range(0, max(len(plan.moves), 1), CHUNK_ROWS):
        chunk.moves.extend(plan.moves[at : at + CHUNK_ROWS])
        yield chunk
        chunk = pb.Plan()


class AdminServicer(admin_pb2_grpc.AdminServicer):
    """The calls, which admin.proto describes."""

    def __init__(self, owner: OwnerPort) -> None:
        self._owner = owner
        self._waiters = threading.BoundedSemaphore(WAITERS_MAX)
        self._followers = threading.BoundedSemaphore(FOLLOWERS_MAX)

    GetStatus = _unary(lambda owner, _request, _by: cluster_operations.cluster_status(owner))
    Resign = _unary(lambda owner, _request, by: pb.ResignResponse(owner_id=cluster_operations.resign(owner, by)))

    ListCaptures = _unary(lambda owner, _request, _by: pb.ListCapturesResponse(captures=cluster_operations.list_captures(owner)))
    DrainCapture = _unary(lambda owner, request, by: _drain(request)(owner, request.capture, by))
    GetDrain = _unary(lambda owner, request, _by: cluster_operations.drain_progress(owner, request.capture))

    CreateChangefeed = _unary(operations.create_changefeed, waits=True)
    ListChangefeeds = _unary(
        lambda owner, _request, _by: pb.ListChangefeedsResponse(changefeeds=operations.list_changefeeds(owner))
    )
    QueryChangefeed = _unary(lambda owner, request, _by: operations.query_changefeed(owner, request.changefeed))
    PauseChangefeed = _unary(lambda owner, request, by: operations.pause_changefeed(owner, request.changefeed, by))
    ResumeChangefeed = _unary(lambda owner, request, by: operations.resume_changefeed(owner, request.changefeed, by), waits=True)
    ResyncChangefeed = _unary(lambda owner, request, by: operations.resync_changefeed(owner, request.changefeed, by))
    UpdateChangefeed = _unary(operations.update_changefeed, waits=True)
    RemoveChangefeed = _unary(
        lambda owner, request, by: pb.RemoveChangefeedResponse(
            changefeed=operations.remove_changefeed(owner, request.changefeed, by)
        )
    )

    ListTables = _stream(_list_tables)
    MoveTable = _stream(_move_table)
    Rebalance = _stream(_rebalance)

    PlanMove = _stream(
        lambda owner, request, _context: _chunks(plans.plan_move(owner, request.changefeed, request.table, request.target))
    )
    PlanDrain = _stream(lambda owner, request, _context: _chunks(plans.plan_drain(owner, request.capture)))
    PlanRebalance = _stream(lambda owner, request, _context: _chunks(plans.plan_rebalance(owner, request.changefeed)))

    def ListEvents(self, request: pb.ListEventsRequest, context: Any) -> Iterator[pb.ListEventsResponse]:
        with _errors(context), self._place(self._followers if request.follow else self._waiters, context):
            rows = cluster_operations.list_events(self._owner, request.after, request.limit)
            for at in range(0, max(1, len(rows)), CHUNK_ROWS):
                yield pb.ListEventsResponse(events=rows[at : at + CHUNK_ROWS])
            if request.follow:
                after = rows[-1].sequence if rows else request.after
                for events in cluster_operations.follow_events(self._owner, after, context.is_active):
                    yield pb.ListEventsResponse(events=events)

    @contextmanager
    def _place(self, places: threading.BoundedSemaphore, context: Any) -> Iterator[None]:
        if not places.acquire(blocking=False):
            limit, what = (FOLLOWERS_MAX, "follow events") if places is self._followers else (WAITERS_MAX, "wait")
            context.abort(_STATUS.RESOURCE_EXHAUSTED, f"there are already {limit} calls that {what}; try again later")
        try:
            yield
        finally:
            places.release()


@contextmanager
def _errors(context: Any) -> Iterator[None]:
    """End the call with the status and text of an OperatingError. Other errors are bugs, which gRPC reports."""
    try:
        yield
    except (NotLeaderError, ClosedError) as error:
        abort_for_retry(context, clip(f"this owner stopped leading during the call: {error}; try again"))
    except OperatingError as error:
        code = next(code for kind, code in _CODES.items() if isinstance(error, kind))
        context.abort(code, clip(str(error)))


def clip(text: str, bytes_max: int = STATUS_BYTES_MAX) -> str:
    """Return the text, cut to the length of a header, where a byte beyond ASCII takes three."""
    if len(text) * 12 <= bytes_max:
        return text
    size = 0
    for at, character in enumerate(text):
        encoded = character.encode(errors="replace")
        size += len(encoded) if len(encoded) == 1 and character not in "%\n\r\t" else 3 * len(encoded)
        if size > bytes_max:
            return f"{text[:at]} ... ({len(text) - at} more characters)"
    return text
