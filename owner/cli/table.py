"""owner table list | move, owner rebalance"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from owner.cli.json_objects import to_object, to_objects
from owner.cli.options import Session, remote
from owner.cli.output import CommandError, ProgressBar, duration, keys, to_json
from owner.cli.parameters import (
    LIST_TIMEOUT_S,
    ROWS_SHOWN_MAX,
    changefeed_option,
    complete_captures,
    complete_changefeeds,
    complete_tables,
    dry_run_option,
    exclude_each_other,
    limit_option,
)
from tablewire.runtime.text import plural

if TYPE_CHECKING:
    from tablewire.v1 import admin_pb2 as pb

DECISION_TIMEOUT_S = 15.0
PLAN_TIMEOUT_S = 60.0
DONE_TIMEOUT_S = 600.0
ANSWER_MARGIN_S = 5.0
"""How much longer than the owner the client waits, so that the owner reports the state of the job."""
ENDED = ("done", "refused", "cancelled")
FURTHEST_FIRST = ("refused", "cancelled", "pending", "accepted", "done")
"""The states of a job, the one furthest from done first."""

_wait_option = click.option(
    "--wait", is_flag=True, help="Wait until it is done, not only accepted; --timeout-s limits the wait (default: 600)."
)


@click.group("table")
def table_group() -> None:
    """List tables and move them between processors."""


@table_group.command("list")
@remote
@changefeed_option
@click.option("--capture", default="", metavar="ID", shell_complete=complete_captures, help="Only tables on this processor.")
@click.option("--stalled", is_flag=True, help="Only tables that are not steady.")
@click.option(
    "--table", default="", metavar="TABLE", shell_complete=complete_tables, help="Only this table (schema.table or its id)."
)
@limit_option("rows")
def list_(session: Session, limit: int | None, **fields: Any) -> None:
    """Show where each table is, its progress, and why it waits. A split table has one row for each span."""
    if limit is None:
        limit = 0 if session.output.is_json else ROWS_SHOWN_MAX
    chunks = session.client.stream("ListTables", session.timeout_s(LIST_TIMEOUT_S), limit=limit, **fields)
    if session.output.is_json:
        _print_json(session, chunks)
    else:
        _print_table(session, list(chunks))


def _print_json(session: Session, chunks: Iterator[pb.ListTablesResponse]) -> None:
    """Print one object once all rows have arrived; keep them as text, which takes less memory."""
    changefeed, truncated, rows = "", False, []
    for chunk in chunks:
        changefeed = changefeed or chunk.changefeed
        truncated = truncated or chunk.truncated
        rows += [to_json(to_object(row)) for row in chunk.tables]
    head = to_json({"changefeed": changefeed, "truncated": truncated})
    session.output.raw(f'{head[:-1]},"tables":[{",".join(rows)}]}}\n')


def _print_table(session: Session, chunks: list[pb.ListTablesResponse]) -> None:
    rows = [row for chunk in chunks for row in chunk.tables]
    split = any(row.start_key or row.end_key for row in rows)
    session.output.table(
        (
            ("TABLE", "table"),
            ("#ID", "table_id"),
            *((("SPAN", keys),) if split else ()),
            ("STATE", "state"),
            ("PRIMARY", "primary"),
            ("SECONDARY", "secondary"),
            ("#CHECKPOINT", lambda row: row.checkpoint_ts or None),
            ("#AGE", lambda row: duration(row.state_age_ms)),
            ("STALL", "stall_reason"),
            ("ERROR", "error"),
        ),
        rows,
    )
    if any(chunk.truncated for chunk in chunks):
        session.output.note(f"only the first {len(rows)} rows are shown; --limit 0 shows all")


@table_group.command("move")
@remote
@click.argument("table", metavar="TABLE", shell_complete=complete_tables)
@click.option(
    "--to", "target", required=True, metavar="CAPTURE", shell_complete=complete_captures, help="The processor to move it to."
)
@changefeed_option
@_wait_option
@dry_run_option
def move(session: Session, table: str, target: str, changefeed: str, wait: bool, dry_run: bool) -> None:
    """Move TABLE (schema.table or its id) to another processor, without downtime.

    Returns once the owner has accepted or refused the move, with --wait once it is done. A move
    that is not done in time is not cancelled.
    """
    exclude_each_other(dry_run=dry_run, wait=wait)
    if dry_run:
        show_plan(session, "PlanMove", changefeed=changefeed, table=table, target=target)
        return
    (job,) = _follow(session, "MoveTable", wait, changefeed=changefeed, table=table, target=target)
    if session.output.is_json:
        session.output.json(to_object(job))


@click.command("rebalance")
@remote
@click.option(
    "--changefeed", default="", metavar="ID", shell_complete=complete_changefeeds, help="Move only tables of this changefeed."
)
@_wait_option
@dry_run_option
def rebalance(session: Session, changefeed: str, wait: bool, dry_run: bool) -> None:
    """Even out the load of the processors with as few moves as possible.

    The load is the weight of all tables of all changefeeds: 1 for each table, and more for tables
    with many rows/s or bytes/s. Tables that were moved by hand may move again.
    """
    exclude_each_other(dry_run=dry_run, wait=wait)
    if dry_run:
        show_plan(session, "PlanRebalance", changefeed=changefeed)
        return
    jobs = _follow(session, "Rebalance", wait, changefeed=changefeed)
    if session.output.is_json:
        session.output.json({"state": _furthest_state(jobs), "jobs": to_objects(jobs)})


def _follow(session: Session, method: str, wait: bool, **fields: Any) -> list[pb.Job]:
    """Start jobs, one for each changefeed, and return them once they are accepted or done.

    Each change is shown on stderr, the end on stdout (as text). Raise CommandError if a job is not
    accepted (with --wait: not done) in time.
    """
    timeout_s = session.timeout_s(DONE_TIMEOUT_S if wait else DECISION_TIMEOUT_S)
    fields |= {"wait_done": wait, "wait_ms": max(1, round(timeout_s * 1000))}
    jobs: dict[str, pb.Job] = {}
    with ProgressBar(session.output) if wait else nullcontext() as bar:
        for job in session.client.stream(method, timeout_s + ANSWER_MARGIN_S, **fields):
            jobs[job.changefeed] = job
            session.pending = f"the owner continues {', '.join(job.id for job in jobs.values() if job.state not in ENDED)}"
            if bar is not None and job.state not in ENDED:
                counted = [row for row in jobs.values() if row.HasField("moves_left")]
                done, left = sum(row.moves_done for row in counted), sum(row.moves_left for row in counted)
                bar.show(_text(job), *((done, left) if counted else ()))
    goals = ("done",) if wait else ("accepted", "done")
    failed = [job for job in jobs.values() if job.state not in goals]
    if failed or not jobs:
        text = "; ".join(_failure(job, goals[0], timeout_s) for job in failed) or "the owner reported no job"
        shown = to_objects(jobs.values())
        details = {"job": shown[0]} if method == "MoveTable" and shown else {"jobs": shown}
        raise CommandError(_furthest_state(failed) or "unknown", text, **details)
    if not session.output.is_json:
        for job in jobs.values():
            session.output.line(f"{_text(job)}{f' (job {job.id})' if job.id else ''}")
    return list(jobs.values())


def _furthest_state(jobs: Iterable[pb.Job]) -> str:
    """Return the state of the job that is furthest from done."""
    states = {job.state for job in jobs}
    return next((state for state in (*FURTHEST_FIRST, *sorted(states)) if state in states), "")


def _failure(job: pb.Job, goal: str, timeout_s: float) -> str:
    late = f": not {goal} within {timeout_s:g} s; the owner continues it" if job.state not in ENDED else ""
    return f"{_text(job)}{late}"


def _text(job: pb.Job) -> str:
    where = f" to {job.capture}" if job.capture else ""
    moves = f", {job.moves_done} moved" if job.HasField("moves_done") else ""
    moves += f", {job.moves_left} left" if moves and job.moves_left else ""
    return f"{job.kind} of {job.target}{where}: {job.state}{moves}{f': {job.reason}' if job.reason else ''}"


# ---------------------------------------------------------------------------------------------------------------------
# Dry runs


def show_plan(session: Session, method: str, **fields: Any) -> None:
    """Ask for a plan and print it."""
    chunks = session.client.stream(method, session.timeout_s(PLAN_TIMEOUT_S), **fields)
    plan: pb.Plan = next(chunks)
    for chunk in chunks:
        plan.MergeFrom(chunk)
    if session.output.is_json:
        session.output.json(to_object(plan))
        return
    if plan.moves:
        _print_moves(session, plan)
        session.output.line("")
    before, after = plan.load_before, plan.load_after
    session.output.table(
        (
            ("PROCESSOR", str),
            ("#LOAD", lambda name: f"{before.get(name, 0.0):.1f}"),
            ("#AFTER", lambda name: f"{after.get(name, 0.0):.1f}"),
        ),
        sorted({*before, *after}),
    )
    if len(plan.moves) > ROWS_SHOWN_MAX:
        session.output.note(f"only the first {ROWS_SHOWN_MAX} of {len(plan.moves)} moves are shown; -o json shows all")
    text = f"{plural(len(plan.moves), 'move')} planned" if plan.moves else "nothing would move"
    session.output.note(f"{text}{f': {plan.note}' if plan.note else ''}; nothing was changed")


def _print_moves(session: Session, plan: pb.Plan) -> None:
    moves = plan.moves[:ROWS_SHOWN_MAX]
    split = any(move.start_key or move.end_key for move in moves)
    session.output.table(
        (
            *((("CHANGEFEED", "changefeed"),) if len(plan.changefeeds) > 1 else ()),
            ("TABLE", "table"),
            ("#ID", "table_id"),
            *((("SPAN", keys),) if split else ()),
            ("FROM", "source"),
            ("TO", "target"),
            ("#WEIGHT", lambda move: f"{move.weight:.1f}"),
            ("WHY", "reason"),
        ),
        moves,
    )
