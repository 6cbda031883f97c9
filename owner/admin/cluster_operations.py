"""The operations on the cluster and its processors. `owner.admin.operations` says what holds for all operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from owner.admin import tables_view
from owner.admin.errors import RefusedError
from owner.admin.ports import OwnerPort
from owner.admin.resolve import check_capture, current_state, leading_term, scheduler_of, schedulers_of
from tablewire.errors import EtcdError, NotLeaderError, UnknownCaptureError
from tablewire.etcd.records import ChangefeedInfo, EventRecord, LeaderRecord
from tablewire.model.ids import CaptureID
from tablewire.model.states import CaptureState, StallReason
from tablewire.runtime.version import software_version
from tablewire.v1 import admin_pb2 as pb
from tablewire.wire.versions import INCOMPATIBLE_LABEL

if TYPE_CHECKING:
    from owner.scheduling.scheduler import SchedulerAndInfo

NO_OTHER = "no other processor is ready to take them: start a processor, or cancel the drain"
FOLLOW_POLL_S = 0.25
UNKNOWN_STATE = "unknown"
IDLE_STATE = "idle"

_WORST_FIRST = (CaptureState.SILENT, CaptureState.STOPPING, CaptureState.UNINITIALIZED, CaptureState.READY)


def cluster_status(owner: OwnerPort) -> pb.GetStatusResponse:
    """Return the status of the cluster.

    An owner that does not lead, or cannot reach etcd, answers too: it counts the processors that it
    knows as "unknown".
    """
    election, term, problem = owner.election, owner.term, owner.election.error
    leads = term is not None and term.leads
    leader = election.leader() if leads or not problem else None
    stored: Sequence[ChangefeedInfo] = ()
    if not problem:
        try:
            stored = owner.changefeeds.list()
        except EtcdError as error:
            problem = str(error)
    captures = Counter[str]()
    if leads and not problem:
        captures.update(row.state for row in _capture_rows(owner, stored))
    elif term is not None and term.captures:
        captures[UNKNOWN_STATE] = len(term.captures)
    return pb.GetStatusResponse(
        cluster=owner.cluster,
        answered_by=owner.owner_id,
        version=software_version(),
        leader=None if leader is None else _owner_row(leader, leader),
        leader_revision=term.revision if term is not None and leads else 0,
        owners=[_owner_row(record, leader) for record in election.candidates()],
        captures_by_state=captures,
        changefeeds_by_state=Counter(current_state(owner, info) for info in stored),
        braked=[str(info.changefeed) for info, scheduler in schedulers_of(owner, stored) if scheduler.snapshot().guard_active],
        problem=problem,
    )


def resign(owner: OwnerPort, by: str = "") -> str:
    """Make the leader give up leadership and campaign again as the last candidate; return its id."""
    term = owner.term
    if term is None or not term.leads:
        raise RefusedError(f"owner {owner.owner_id} does not lead, so it cannot resign")
    if len(owner.election.candidates()) < 2:
        raise RefusedError(f"owner {owner.owner_id} is the only owner: no other owner could lead")
    term.stop("it was asked to resign", by)
    return owner.owner_id


def _owner_row(record: LeaderRecord, leader: LeaderRecord | None) -> pb.Owner:
    leading = leader is not None and record.id == leader.id
    return pb.Owner(id=record.id, address=record.address, version=record.version, leading=leading)


# ---------------------------------------------------------------------------------------------------------------------
# Processors


def list_captures(owner: OwnerPort) -> Sequence[pb.Capture]:
    """Return all registered processors by id."""
    return _capture_rows(owner, owner.changefeeds.list())


def _capture_rows(owner: OwnerPort, stored: Sequence[ChangefeedInfo]) -> Sequence[pb.Capture]:
    term = leading_term(owner)
    states: dict[CaptureID, set[CaptureState]] = {}
    spans: dict[CaptureID, dict[str, int]] = {}
    for info, scheduler in schedulers_of(owner, stored):
        for capture in scheduler.snapshot().captures:
            states.setdefault(capture.id, set()).add(capture.state)
            spans.setdefault(capture.id, {})[str(info.changefeed)] = capture.spans
    rows = []
    for registered in sorted(term.captures.values(), key=lambda registered: registered.id):
        state = next((state for state in _WORST_FIRST if state in states.get(registered.id, ())), IDLE_STATE)
        row = pb.Capture(
            id=registered.id,
            address=registered.address,
            version=registered.version,
            state=INCOMPATIBLE_LABEL if INCOMPATIBLE_LABEL in registered.labels else state,
            spans=sum(spans.get(registered.id, {}).values()),
            labels=registered.labels,
            spans_by_changefeed=spans.get(registered.id, {}),
        )
        if registered.id in term.drains:
            progress = _drain_progress(owner, registered.id, stored)
            row.draining, row.remaining = True, progress.remaining
            row.reasons.update(progress.reasons)
        rows.append(row)
    return rows


def drain(owner: OwnerPort, capture: CaptureID, by: str = "") -> pb.DrainCaptureResponse:
    """Start to drain a processor (idempotent), and return the progress."""
    check_capture(owner, capture)
    leading_term(owner).drain(capture, by)
    return drain_progress(owner, capture)


def cancel_drain(owner: OwnerPort, capture: CaptureID, by: str = "") -> pb.DrainCaptureResponse:
    """Cancel a drain; what has moved stays where it is."""
    term = leading_term(owner)
    if capture not in term.drains:
        raise RefusedError(f"processor {capture} is not being drained, so there is nothing to cancel")
    term.cancel_drain(capture, by)
    return drain_progress(owner, capture)


def drain_progress(owner: OwnerPort, capture: CaptureID) -> pb.DrainCaptureResponse:
    """Return the progress of a drain. It is no error if the processor has left: a client waits for that."""
    return _drain_progress(owner, capture, owner.changefeeds.list())


def _drain_progress(owner: OwnerPort, capture: CaptureID, stored: Sequence[ChangefeedInfo]) -> pb.DrainCaptureResponse:
    term = leading_term(owner)
    draining = capture in term.drains
    if capture not in term.captures:
        return pb.DrainCaptureResponse(capture=capture, draining=draining, gone=True)
    remaining, reasons, notes = 0, Counter[str](), []
    for info in stored:
        scheduler = scheduler_of(owner, info.changefeed)
        if scheduler is not None:
            count, why = _remaining(scheduler, capture, draining)
            remaining += count
            reasons.update(why)
            if StallReason.NO_CAPTURE in why:
                notes.append(NO_OTHER)
        elif draining and info.state.runs and info.start_ts:
            # The processors replicate it, but this owner does not know yet which tables are where.
            remaining += 1
            reasons[StallReason.BOOTSTRAP] += 1
            notes.append(f"changefeed {info.changefeed} is not scheduled yet, so its tables on the processor are unknown")
    note = "; ".join(dict.fromkeys(notes))
    return pb.DrainCaptureResponse(capture=capture, draining=draining, remaining=remaining, reasons=reasons, note=note)


def _remaining(scheduler: SchedulerAndInfo, capture: CaptureID, draining: bool) -> tuple[int, dict[str, int]]:
    """Count the spans of a changefeed in which the processor has a role, also by stall reason.

    During a drain, moves to the processor and undetermined spans count too, and the number is at
    least 1 until a tick has seen the drain.
    """
    snapshot = scheduler.snapshot()
    reasons = Counter(tables_view.reasons_at(snapshot, capture))
    if not draining:
        return reasons.total(), reasons
    try:
        remaining = scheduler.drain_capture(capture)
    except UnknownCaptureError:
        remaining = 1  # it has registered since the last tick
    if not remaining:
        return 0, {}
    if not any(seen.id == capture and seen.draining for seen in snapshot.captures):
        return remaining, {tables_view.WAITING: remaining}
    if steady := reasons.pop(tables_view.WAITING, 0):
        others = any(snapshot.capture_ids[index] != capture for index in snapshot.ready)
        silent = snapshot.may_hold_any_span or any(snapshot.capture_ids[index] == capture for index in snapshot.silent)
        why = StallReason.NO_CAPTURE if not others else StallReason.SILENT_CAPTURE if silent else StallReason.CONCURRENCY
        reasons[why] += steady
    if (undetermined := remaining - reasons.total()) > 0:
        reasons[StallReason.UNDETERMINED] += undetermined
    return remaining, reasons


# ---------------------------------------------------------------------------------------------------------------------
# Events


def list_events(owner: OwnerPort, after: int, limit: int) -> Sequence[pb.Event]:
    """Return the newest `limit` events (0: all) with a higher sequence than `after`, oldest first."""
    found = leading_term(owner).history.events_after(after)
    if found is None:
        raise EtcdError("the events have not been read from etcd yet: try again")
    rows = [_event_row(event.sequence, event.record) for event in found if event.record is not None]
    return rows[-limit:] if limit else rows


def follow_events(owner: OwnerPort, after: int, is_wanted: Callable[[], bool]) -> Iterator[Sequence[pb.Event]]:
    """Yield new events in groups while is_wanted; raise NotLeaderError when this owner's term ends."""
    term = leading_term(owner)
    history = term.history
    while is_wanted():
        if history.wait_after(after, FOLLOW_POLL_S):
            events = history.events_after(after) or ()
            after = events[-1].sequence if events else after
            yield [_event_row(event.sequence, event.record) for event in events if event.record is not None]
        elif owner.term is not term or not term.leads:
            raise NotLeaderError(f"owner {owner.owner_id} no longer leads")


def _event_row(sequence: int, record: EventRecord) -> pb.Event:
    return pb.Event(
        sequence=sequence,
        at=record.at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        kind=record.kind,
        owner=record.owner,
        owner_revision=record.owner_revision,
        changefeed=record.changefeed,
        subject=record.subject,
        text=record.text,
        why=record.why,
        by=record.by,
        job=record.job,
    )
