"""owner status | resign | version, owner capture list | drain"""

from __future__ import annotations

import platform
import time

import click

from owner.admin.resolve import software_version
from owner.cli.json_objects import to_object
from owner.cli.names import complete_captures
from owner.cli.options import Session, Settings, local, remote
from owner.cli.output import Output, counts
from owner.cli.plan import show_plan
from owner.cli.progress import Progress
from tablewire.v1 import admin_pb2 as pb

POLL_INTERVAL_S = 0.25
DRAIN_TIMEOUT_S = 600.0
RESIGN_TIMEOUT_S = 30.0
BRAKE_TEXT = "many captures vanished at once, so their tables wait for a while before they are placed anew"


@click.command("version")
@local
def version(output: Output, _settings: Settings) -> None:
    """The version of this program (`status` shows that of the owners)."""
    if output.is_json:
        output.json({"version": software_version(), "python": platform.python_version()})
    else:
        output.line(f"tablewire {software_version()} (Python {platform.python_version()})")


@click.command("status")
@remote
def status(session: Session) -> None:
    """Who leads, which owners and captures there are, how the changefeeds are."""
    answer = session.ask("GetStatus", pb.GetStatusRequest(), reads=True)
    if session.output.is_json:
        session.output.json({"endpoint": session.client.endpoint, **to_object(answer)})
        return
    leader, none = answer.leader, "not known" if answer.problem else "none: an election is under way"
    session.output.pairs(
        (
            ("cluster", answer.cluster),
            ("leader", f"{leader.id} at {leader.address}" if answer.HasField("leader") else none),
            ("revision", answer.leader_revision or None),
            ("owners", len(answer.owners)),
            ("captures", counts(answer.captures_by_state) or "none"),
            ("changefeeds", counts(answer.changefeeds_by_state) or ("not known" if answer.problem else "none")),
            *((("brake", f"on for {', '.join(answer.braked)}: {BRAKE_TEXT}"),) if answer.braked else ()),
            *((("problem", answer.problem),) if answer.problem else ()),
            ("asked", f"{session.client.endpoint}, answered by {answer.answered_by} (tablewire {answer.version})"),
        )
    )
    session.output.line("")
    session.output.table(
        ("OWNER", "ADDRESS", "VERSION", "LEADS"),
        ((row.id, row.address, row.version, "yes" if row.leading else "") for row in answer.owners),
    )


@click.command("resign")
@remote
def resign(session: Session) -> None:
    """The leader gives its leadership up; returns when another owner leads."""
    former = session.ask("Resign", pb.ResignRequest()).owner_id
    timeout_s = session.timeout_s(RESIGN_TIMEOUT_S)
    deadline = time.monotonic() + timeout_s
    while True:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise session.failure(f"{former} has resigned, and no other owner leads after {timeout_s:g} s", "deadline_exceeded")
        answer = session.ask("GetStatus", pb.GetStatusRequest(), reads=True, timeout_s=left_s)
        if answer.HasField("leader") and answer.leader.id != former and answer.leader_revision:
            break
        time.sleep(POLL_INTERVAL_S)
    if session.output.is_json:
        session.output.json({"former": former, "leader": to_object(answer.leader)})
    else:
        session.output.line(f"{former} has resigned, {answer.leader.id} leads")


@click.group("capture")
def capture_group() -> None:
    """Processors, as registered."""


@capture_group.command("list")
@remote
def list_(session: Session) -> None:
    """All captures."""
    answer = session.ask("ListCaptures", pb.ListCapturesRequest(), reads=True)
    if session.output.is_json:
        session.output.json(to_object(answer))
        return
    session.output.table(
        ("CAPTURE", "ADDRESS", "STATE", "#SPANS", "DRAINING", "VERSION", "LABELS"),
        (
            (
                row.id,
                row.address,
                row.state,
                row.spans,
                _draining(row),
                row.version,
                " ".join(f"{name}={value}" for name, value in sorted(row.labels.items())),
            )
            for row in answer.captures
        ),
    )


def _draining(row: pb.Capture) -> str:
    if not row.draining:
        return ""
    if not row.HasField("remaining"):
        return "yes"
    return f"{row.remaining} left ({counts(row.reasons)})" if row.remaining else "safe to stop"


@capture_group.command("drain")
@remote
@click.argument("capture", metavar="ID", shell_complete=complete_captures)
@click.option("--wait", is_flag=True, help="Until nothing is left on it (safe to stop), or it has left.")
@click.option("--cancel", is_flag=True, help="Take the drain back; what has moved stays where it is.")
@click.option("--dry-run", is_flag=True, help="Show what would move, and the loads before and after; change nothing.")
def drain(session: Session, capture: str, wait: bool, cancel: bool, dry_run: bool) -> None:
    """Move everything away from a capture, and give it nothing new, until it has left or the drain is cancelled.

    A drain outlives the owner that was asked. Asking again tells how it stands. While no other capture is ready,
    nothing moves: the drain stands all the same, and says so.
    """
    if wait + cancel + dry_run > 1:
        raise click.UsageError("--wait, --cancel and --dry-run exclude each other")
    if dry_run:
        show_plan(session, "PlanDrain", pb.PlanDrainRequest(capture=capture))
        return
    answer = session.ask("DrainCapture", pb.DrainCaptureRequest(capture=capture, cancel=cancel))
    session.asked = "" if cancel else f"the drain of {capture} goes on; --cancel takes it back"
    if wait:
        answer = _wait_until_empty(session, answer)
    if session.output.is_json:
        session.output.json(to_object(answer))
    else:
        session.output.line(_text(answer))


def _wait_until_empty(session: Session, answer: pb.DrainCaptureResponse) -> pb.DrainCaptureResponse:
    timeout_s = session.timeout_s(DRAIN_TIMEOUT_S)
    deadline = time.monotonic() + timeout_s
    with Progress(session.output) as progress:
        while not answer.gone and answer.remaining:
            if not answer.draining:
                text = f"the drain of {answer.capture} was cancelled; spans that are still there: {answer.remaining}"
                raise session.failure(text, "cancelled", drain=to_object(answer))
            text = _text(answer)
            progress.show(text, left=answer.remaining)
            if time.monotonic() >= deadline:
                text = f"{text} after {timeout_s:g} s; the drain goes on"
                raise session.failure(text, "deadline_exceeded", drain=to_object(answer))
            time.sleep(POLL_INTERVAL_S)
            answer = session.ask("GetDrain", pb.GetDrainRequest(capture=answer.capture), reads=True)
    return answer


def _text(answer: pb.DrainCaptureResponse) -> str:
    if answer.gone:
        return f"capture {answer.capture} has left"
    if not answer.draining:
        return f"capture {answer.capture} is not being drained; spans there: {answer.remaining}"
    if not answer.remaining:
        return f"capture {answer.capture} is drained: safe to stop"
    why = f" ({counts(answer.reasons)})" if answer.reasons else ""
    note = f": {answer.note}" if answer.note else ""
    return f"capture {answer.capture} is being drained; spans left: {answer.remaining}{why}{note}"
