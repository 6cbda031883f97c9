"""owner status | resign | version, owner capture list | drain"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

import click

from owner.cli.json_objects import to_object
from owner.cli.options import Session, local, remote
from owner.cli.output import CommandError, Output, ProgressBar, counts
from owner.cli.parameters import complete_captures, dry_run_option, exclude_each_other
from owner.cli.settings import Settings
from owner.cli.table import show_plan
from tablewire.runtime.text import plural

if TYPE_CHECKING:
    from tablewire.v1 import admin_pb2 as pb

DRAIN_TIMEOUT_S = 600.0
RESIGN_TIMEOUT_S = 30.0
BRAKE_TEXT = "many processors vanished at once, so their tables are not placed on others for a while"


@click.command("version")
@local
def version(output: Output, _settings: Settings) -> None:
    """Show the version of this program (`status` shows the versions of the owners)."""
    from tablewire.runtime.version import software_version

    found = {"version": software_version(), "python": platform.python_version()}
    output.result(found, f"tablewire {found['version']} (Python {found['python']})")


@click.command("status")
@remote
def status(session: Session) -> None:
    """Show the leader, the owners, and the states of processors and changefeeds."""
    answer = session.ask("GetStatus")
    if session.output.is_json:
        session.output.json({"endpoint": session.client.endpoint, **to_object(answer)})
        return
    leader, none = answer.leader, "unknown" if answer.problem else "none: an election is under way"
    pairs: list[tuple[str, object]] = [
        ("cluster", answer.cluster),
        ("leader", f"{leader.id} at {leader.address}" if answer.HasField("leader") else none),
        ("revision", answer.leader_revision or None),
        ("owners", len(answer.owners)),
        ("processors", counts(answer.captures_by_state) or "none"),
        ("changefeeds", counts(answer.changefeeds_by_state) or ("unknown" if answer.problem else "none")),
        ("asked", f"{session.client.endpoint}, answered by {answer.answered_by} (tablewire {answer.version})"),
    ]
    if answer.braked:
        pairs.insert(-1, ("brake", f"on for {', '.join(answer.braked)}: {BRAKE_TEXT}"))
    if answer.problem:
        pairs.insert(-1, ("problem", answer.problem))
    session.output.pairs(pairs)
    session.output.line("")
    session.output.table(
        (("OWNER", "id"), ("ADDRESS", "address"), ("VERSION", "version"), ("LEADS", lambda row: "yes" if row.leading else "")),
        answer.owners,
    )


@click.command("resign")
@remote
def resign(session: Session) -> None:
    """Make the leader give up leadership, and wait until another owner leads."""
    former = session.ask("Resign").owner_id
    for left_s in session.polls(RESIGN_TIMEOUT_S):
        answer = session.ask("GetStatus", timeout_s=left_s)
        if answer.HasField("leader") and answer.leader.id != former and answer.leader_revision:
            found = {"former": former, "leader": to_object(answer.leader)}
            session.output.result(found, f"{former} has resigned, {answer.leader.id} leads")
            return
    timeout_s = session.timeout_s(RESIGN_TIMEOUT_S)
    raise CommandError("deadline_exceeded", f"{former} has resigned, and no other owner leads after {timeout_s:g} s")


@click.group("capture")
def capture_group() -> None:
    """List and drain processors."""


@capture_group.command("list")
@remote
def list_(session: Session) -> None:
    """List all processors."""
    answer = session.ask("ListCaptures")
    if session.output.is_json:
        session.output.json(to_object(answer))
        return
    session.output.table(
        (
            ("PROCESSOR", "id"),
            ("ADDRESS", "address"),
            ("STATE", "state"),
            ("#TABLES", "spans"),
            ("DRAINING", _draining),
            ("VERSION", "version"),
            ("LABELS", lambda row: " ".join(f"{name}={value}" for name, value in sorted(row.labels.items()))),
        ),
        answer.captures,
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
@click.option("--wait", is_flag=True, help="Wait until nothing is left on it (safe to stop), or it has left.")
@click.option("--cancel", is_flag=True, help="Cancel the drain; what has moved stays where it is.")
@dry_run_option
def drain(session: Session, capture: str, wait: bool, cancel: bool, dry_run: bool) -> None:
    """Move all tables away from a processor, and place none on it.

    The drain ends when the processor leaves or the drain is cancelled. A drain outlives the owner
    that started it. Repeating the command shows the progress. While no other processor is ready,
    nothing moves: the drain stays in effect, and the command says so.
    """
    exclude_each_other(wait=wait, cancel=cancel, dry_run=dry_run)
    if dry_run:
        show_plan(session, "PlanDrain", capture=capture)
        return
    answer = session.ask("DrainCapture", capture=capture, cancel=cancel)
    session.pending = "" if cancel else f"the drain of {capture} continues; --cancel cancels it"
    if wait:
        answer = _wait_until_empty(session, answer)
    session.output.result(to_object(answer), _text(answer))


def _wait_until_empty(session: Session, answer: pb.DrainCaptureResponse) -> pb.DrainCaptureResponse:
    with ProgressBar(session.output) as bar:
        for _ in session.polls(DRAIN_TIMEOUT_S):
            answer = session.ask("GetDrain", capture=answer.capture)
            if answer.gone or not answer.remaining:
                return answer
            if not answer.draining:
                text = f"the drain of {answer.capture} was cancelled with {plural(answer.remaining, 'table')} left"
                raise CommandError("cancelled", text, drain=to_object(answer))
            bar.show(_text(answer), left=answer.remaining)
    text = f"{_text(answer)} after {session.timeout_s(DRAIN_TIMEOUT_S):g} s; the drain continues"
    raise CommandError("deadline_exceeded", text, drain=to_object(answer))


def _text(answer: pb.DrainCaptureResponse) -> str:
    left = f"{plural(answer.remaining, 'table')} left"
    if answer.gone:
        return f"processor {answer.capture} has left"
    if not answer.draining:
        return f"processor {answer.capture} is not being drained; it has {plural(answer.remaining, 'table')}"
    if not answer.remaining:
        return f"processor {answer.capture} is drained: safe to stop"
    why = f" ({counts(answer.reasons)})" if answer.reasons else ""
    return f"processor {answer.capture} is being drained; {left}{why}{f': {answer.note}' if answer.note else ''}"
