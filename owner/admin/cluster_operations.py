"""The operations on the cluster and its captures. Any thread; reads take the snapshot of the last tick."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from owner.admin import tables_view
from owner.admin.errors import RefusedError
from owner.admin.ports import OwnerPort
from owner.admin.resolve import check_capture, current_state, leading_term, leads, scheduler_of, schedulers_of
from tablewire.errors import EtcdError, NotLeaderError, UnknownCaptureError
from tablewire.etcd.records import EventRecord, LeaderRecord
from tablewire.model.ids import CaptureID
from tablewire.model.states import CaptureState, StallReason
from tablewire.runtime.version import software_version
from tablewire.v1 import admin_pb2 as pb

if TYPE_CHECKING:
    from owner.scheduling.scheduler import SchedulerAndInfo
    from tablewire.etcd.records import ChangefeedInfo
from tablewire.wire.versions import INCOMPATIBLE_LABEL

NO_OTHER = "no other capture is ready to take them: start a processor, or cancel the drain"
FOLLOW_POLL_S = 0.25
UNKNOWN_STATE = "unknown"
IDLE_STATE = "idle"

_WORST_FIRST = (CaptureState.SILENT, CaptureState.STOPPING, CaptureState.UNINITIALIZED, CaptureState.READY)


def cluster_status(owner: OwnerPort) -> pb.GetStatusResponse:
    """Also answered by an owner that does not lead (captures are then counted as "unknown"), and by one without etcd."""
    election, term, problem = owner.election, owner.term, owner.election.error
    leader = election.leader() if leads(owner) or not problem else None
    owners = [_owner_row(record, leader) for record in election.candidates()]
    stored: Sequence[ChangefeedInfo] = ()
    if not problem:
        try:
            stored = owner.changefeeds.list()
        except EtcdError as error:
            problem = str(error)
    if term is None or not term.leads or problem:
        captures = Counter({UNKNOWN_STATE: len(term.captures)} if term is not None and term.captures else {})
    else:
        captures = Counter(row.state for row in _capture_rows(owner, stored))
    return pb.GetStatusResponse(
        cluster=owner.cluster,
        answered_by=owner.owner_id,
        version=software_version(),
        leader=None if leader is None else _owner_row(leader, leader),
        leader_revision=term.revision if term is not None and term.leads else 0,
        owners=owners,
        captures_by_state=dict(captures),
        changefeeds_by_state=dict(Counter(current_state(owner, info) for info in stored)),
        braked=[str(changefeed) for changefeed, scheduler in schedulers_of(owner, stored) if scheduler.snapshot().brake],
        problem=problem,
    )


def resign(owner: OwnerPort, by: str = "") -> str:
    """The leader steps down and campaigns again as the last in line; its id."""
    term = owner.term
    if term is None or not term.leads:
        raise RefusedError(f"owner {owner.owner_id} does not lead, so it cannot resign")
    if len(owner.election.candidates()) < 2:
        raise RefusedError(f"owner {owner.owner_id} is the only owner: nobody could take over")
    term.stop("it was asked to resign", by)
    return owner.owner_id


def _owner_row(record: LeaderRecord, leader: LeaderRecord | None) -> pb.Owner:
    return pb.Owner(
        id=record.id,
        address=record.address,
        version=record.version,
        leading=leader is not None and record.id == leader.id,
    )


def list_captures(owner: OwnerPort) -> Sequence[pb.Capture]:
    """Every registered capture, by id."""
    return _capture_rows(owner, owner.changefeeds.list())


def _capture_rows(owner: OwnerPort, stored: Sequence[ChangefeedInfo]) -> Sequence[pb.Capture]:
    states: dict[CaptureID, set[CaptureState]] = {}
    spans: dict[CaptureID, dict[str, int]] = {}
    term = leading_term(owner)
    draining = set(term.drains)
    for changefeed, scheduler in schedulers_of(owner, stored):
        for capture in scheduler.snapshot().captures:
            states.setdefault(capture.id, set()).add(capture.state)
            spans.setdefault(capture.id, {})[str(changefeed)] = capture.spans
    rows = []
    for info in sorted(term.captures.values(), key=lambda info: info.id):
        seen = states.get(info.id, set())
        state = next((state.value for state in _WORST_FIRST if state in seen), IDLE_STATE)
        if INCOMPATIBLE_LABEL in info.labels:
            state = INCOMPATIBLE_LABEL
        held = spans.get(info.id, {})
        progress = drain_progress(owner, info.id) if info.id in draining else None
        rows.append(
            pb.Capture(
                id=info.id,
                address=info.address,
                version=info.version,
                state=state,
                spans=sum(held.values()),
                draining=info.id in draining,
                labels=dict(info.labels),
                spans_by_changefeed=held,
                remaining=None if progress is None else progress.remaining,
                reasons={} if progress is None else progress.reasons,
            )
        )
    return rows


def drain(owner: OwnerPort, capture: CaptureID, by: str = "") -> pb.DrainCaptureResponse:
    """Asks for the capture to be emptied (idempotent), and tells how that stands."""
    check_capture(owner, capture)
    leading_term(owner).drain(capture, by)
    return drain_progress(owner, capture)


def cancel_drain(owner: OwnerPort, capture: CaptureID, by: str = "") -> pb.DrainCaptureResponse:
    term = leading_term(owner)
    if capture not in term.drains:
        raise RefusedError(f"capture {capture} is not being drained, so there is nothing to cancel")
    term.cancel_drain(capture, by)
    return drain_progress(owner, capture)


def drain_progress(owner: OwnerPort, capture: CaptureID) -> pb.DrainCaptureResponse:
    """Starts nothing. A capture that has left is an answer here (gone), so that who waits for a drain sees its end."""
    term = leading_term(owner)
    draining = capture in term.drains
    if capture not in term.captures:
        return pb.DrainCaptureResponse(capture=capture, draining=draining, gone=True)
    remaining, reasons, notes = 0, Counter[str](), []
    for info in owner.changefeeds.list():
        scheduler = scheduler_of(owner, info.changefeed)
        if scheduler is not None:
            left, why = _left(scheduler, capture, draining)
            remaining += left
            reasons.update(why)
            if StallReason.NO_CAPTURE in why:
                notes.append(NO_OTHER)
        elif draining and info.state.runs and info.start_ts:
            # It runs on the captures all the same, and nobody knows yet what is where.
            remaining += 1
            reasons[StallReason.BOOTSTRAP.value] += 1
            notes.append(f"changefeed {info.changefeed} is not scheduled yet, so nobody can tell what it has there")
    return pb.DrainCaptureResponse(
        capture=capture, draining=draining, remaining=remaining, reasons=reasons, note="; ".join(dict.fromkeys(notes))
    )


def list_events(owner: OwnerPort, after: int, limit: int) -> Sequence[pb.Event]:
    """What happened, oldest first: the newest `limit` (0 = all) with a higher sequence than `after`."""
    found = leading_term(owner).history.events_after(after)
    if found is None:
        raise EtcdError("the events have not been read from etcd yet: try again")
    rows = [_event_row(event.sequence, event.record) for event in found if event.record is not None]
    return rows[-limit:] if limit else rows


def follow_events(owner: OwnerPort, after: int, is_wanted: Callable[[], bool]) -> Iterator[Sequence[pb.Event]]:
    """What happens from now on, several at a time, until nobody wants to know. NotLeaderError when this owner's term ends."""
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


def _left(scheduler: SchedulerAndInfo, capture: CaptureID, draining: bool) -> tuple[int, dict[str, int]]:
    """How many spans of one changefeed still touch the capture, and why. While it is drained inbound moves and Undetermined count
    too, and it is at least 1 until a tick has taken the drain in."""
    snapshot = scheduler.snapshot()
    reasons = dict(tables_view.reasons_at(snapshot, capture))
    if not draining:
        return sum(reasons.values()), reasons
    try:
        left = scheduler.drain_capture(capture)
    except UnknownCaptureError:
        left = 1  # registered since the last tick: the next one takes it in
    if not left:
        return 0, {}
    if not any(seen.id == capture and seen.draining for seen in snapshot.captures):
        return left, {tables_view.WAITING: left}
    steady = reasons.pop(tables_view.WAITING, 0)
    if steady:
        others = any(snapshot.capture_ids[index] != capture for index in snapshot.ready)
        silent = snapshot.may_hold_any_span or any(snapshot.capture_ids[index] == capture for index in snapshot.silent)
        why = StallReason.NO_CAPTURE if not others else StallReason.SILENT_CAPTURE if silent else StallReason.CONCURRENCY
        reasons[why] = reasons.get(why, 0) + steady
    unseen = left - sum(reasons.values())
    if unseen > 0:  # it may still hold spans in which it has no role any more
        reasons[StallReason.UNDETERMINED] = reasons.get(StallReason.UNDETERMINED, 0) + unseen
    return left, reasons
