"""owner table list | move, owner rebalance"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from typing import Any

import click

from owner.cli.json_objects import to_object, to_objects
from owner.cli.names import complete_captures, complete_changefeeds, complete_tables
from owner.cli.options import Session, remote
from owner.cli.output import duration, keys, to_json
from owner.cli.plan import show_plan
from owner.cli.progress import Progress
from tablewire.v1 import admin_pb2 as pb

LIST_TIMEOUT_S = 300.0
DECISION_TIMEOUT_S = 15.0
DONE_TIMEOUT_S = 600.0
ANSWER_MARGIN_S = 5.0
"""How much longer than the owner the client waits, so that it is the owner that tells how the job stands."""
ROWS_FOR_PEOPLE = 1_000
ENDED = ("done", "refused", "cancelled")
FURTHEST_FIRST = ("refused", "cancelled", "pending", "accepted", "done")


@click.group("table")
def table_group() -> None:
    """Tables, and who replicates them."""


def changefeed_option(command: Any) -> Any:
    return click.option(
        "--changefeed",
        default="",
        metavar="ID",
        shell_complete=complete_changefeeds,
        help="May be left out while there is exactly one.",
    )(command)


def dry_run_option(command: Any) -> Any:
    return click.option("--dry-run", is_flag=True, help="Show what would move, and the loads before and after; change nothing.")(
        command
    )


def wait_option(command: Any) -> Any:
    return click.option(
        "--wait", is_flag=True, help="Until it is done (and not only accepted); --timeout-s says how long, 600 if not given."
    )(command)


@table_group.command("list")
@remote
@changefeed_option
@click.option("--capture", default="", metavar="ID", shell_complete=complete_captures, help="Only what this capture holds.")
@click.option("--stalled", is_flag=True, help="Only what is not steady.")
@click.option(
    "--table",
    default="",
    metavar="TABLE",
    shell_complete=complete_tables,
    help="Only this table (schema.table or its id).",
)
@click.option(
    "--limit",
    type=click.IntRange(min=0, max=2**32 - 1),
    default=None,
    metavar="ROWS",
    help=f"At most so many rows, 0 for all.  [default: {ROWS_FOR_PEOPLE}; all with -o json]",
)
def list_(session: Session, changefeed: str, capture: str, stalled: bool, table: str, limit: int | None) -> None:
    """Every span: where it is, how far, and why it waits if it does."""
    if limit is None:
        limit = 0 if session.output.is_json else ROWS_FOR_PEOPLE
    request = pb.ListTablesRequest(changefeed=changefeed, capture=capture, stalled=stalled, table=table, limit=limit)
    chunks = session.client.stream("ListTables", request, session.timeout_s(LIST_TIMEOUT_S), reads=True)
    if session.output.is_json:
        _print_json(session, chunks)
    else:
        _print_table(session, chunks)


def _print_json(session: Session, chunks: Iterator[pb.ListTablesResponse]) -> None:
    """One object. It is printed only when all rows are there, as text: a million rows are not kept as objects."""
    changefeed, truncated, rows = "", False, []
    for chunk in chunks:
        changefeed = changefeed or chunk.changefeed
        truncated = truncated or chunk.truncated
        rows += [to_json(to_object(row)) for row in chunk.tables]
    head = to_json({"changefeed": changefeed, "truncated": truncated})
    session.output.raw(f'{head[:-1]},"tables":[{",".join(rows)}]}}\n')


def _print_table(session: Session, chunks: Iterator[pb.ListTablesResponse]) -> None:
    answers = list(chunks)
    rows = list(chain.from_iterable(chunk.tables for chunk in answers))
    split = any(row.start_key or row.end_key for row in rows)
    headings = (
        "TABLE",
        "#ID",
        *(("SPAN",) if split else ()),
        "STATE",
        "PRIMARY",
        "SECONDARY",
        "#CHECKPOINT",
        "#AGE",
        "STALL",
        "ERROR",
    )
    session.output.table(
        headings,
        (
            (
                row.table,
                row.table_id,
                *((keys(row),) if split else ()),
                row.state,
                row.primary,
                row.secondary,
                row.checkpoint_ts or None,
                duration(row.state_age_ms),
                row.stall_reason,
                row.error,
            )
            for row in rows
        ),
    )
    if any(chunk.truncated for chunk in answers):
        session.output.note(f"only the first {len(rows)} rows are shown; --limit 0 shows all")


@table_group.command("move")
@remote
@click.argument("table", metavar="TABLE", shell_complete=complete_tables)
@click.option(
    "--to",
    "target",
    required=True,
    metavar="CAPTURE",
    shell_complete=complete_captures,
    help="The capture that shall write it.",
)
@changefeed_option
@wait_option
@dry_run_option
def move(session: Session, table: str, target: str, changefeed: str, wait: bool, dry_run: bool) -> None:
    """Move TABLE (schema.table or its id) to a capture, without a gap.

    Returns once the owner has accepted or refused it, with --wait once it is done. It is not taken back when the time is over.
    """
    if dry_run:
        _refuse_wait(wait)
        show_plan(session, "PlanMove", pb.PlanMoveRequest(changefeed=changefeed, table=table, target=target))
        return
    request = pb.MoveTableRequest(
        changefeed=changefeed, table=table, target=target, wait_done=wait, wait_ms=_wait_ms(session, wait)
    )
    (job,) = _follow(session, "MoveTable", request, wait)
    if session.output.is_json:
        session.output.json(to_object(job))


@click.command("rebalance")
@remote
@click.option(
    "--changefeed",
    default="",
    metavar="ID",
    shell_complete=complete_changefeeds,
    help="Move tables of this one alone; else of all that run.",
)
@wait_option
@dry_run_option
def rebalance(session: Session, changefeed: str, wait: bool, dry_run: bool) -> None:
    """Even out the load of the captures, by the fewest moves.

    The load is the weight of all tables of all changefeeds: 1 a table, and more for one with many rows/s or bytes/s. Tables that
    were moved by hand may move again.
    """
    if dry_run:
        _refuse_wait(wait)
        show_plan(session, "PlanRebalance", pb.PlanRebalanceRequest(changefeed=changefeed))
        return
    request = pb.RebalanceRequest(changefeed=changefeed, wait_done=wait, wait_ms=_wait_ms(session, wait))
    jobs = _follow(session, "Rebalance", request, wait)
    if session.output.is_json:
        session.output.json({"state": _least(jobs), "jobs": to_objects(jobs)})


def _refuse_wait(wait: bool) -> None:
    if wait:
        raise click.UsageError("--dry-run and --wait exclude each other")


def _job_timeout_s(session: Session, wait: bool) -> float:
    return session.timeout_s(DONE_TIMEOUT_S if wait else DECISION_TIMEOUT_S)


def _wait_ms(session: Session, wait: bool) -> int:
    return max(1, round(_job_timeout_s(session, wait) * 1000))


def _follow(session: Session, method: str, request: Any, wait: bool) -> list[pb.Job]:
    """Shows each change on stderr and the end on stdout (as text), and returns how the jobs stand, one a changefeed; anything
    but accepted (with --wait: done) is a failure."""
    timeout_s = _job_timeout_s(session, wait)
    jobs: dict[str, pb.Job] = {}
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(session.output)) if wait else None
        for job in session.client.stream(method, request, timeout_s + ANSWER_MARGIN_S):
            jobs[job.changefeed] = job
            session.asked = f"the owner goes on with {', '.join(job.id for job in jobs.values() if job.state not in ENDED)}"
            if progress is not None and job.state not in ENDED:
                counted = [row for row in jobs.values() if row.HasField("moves_left")]
                done, left = sum(row.moves_done for row in counted), sum(row.moves_left for row in counted)
                progress.show(_text(job), *((done, left) if counted else ()))
    goals = ("done",) if wait else ("accepted", "done")
    failed = [job for job in jobs.values() if job.state not in goals]
    if failed or not jobs:
        text = "; ".join(_failure(job, goals[0], timeout_s) for job in failed) or "the owner said nothing"
        shown = to_objects(jobs.values())
        details = {"job": shown[0]} if method == "MoveTable" and shown else {"jobs": shown}
        raise session.failure(text, _least(failed) or "unknown", **details)
    if not session.output.is_json:
        for job in jobs.values():
            session.output.line(f"{_text(job)}{f' (job {job.id})' if job.id else ''}")
    return list(jobs.values())


def _least(jobs: Iterable[pb.Job]) -> str:
    """The state of the job that is furthest from done."""
    states = {job.state for job in jobs}
    return next((state for state in (*FURTHEST_FIRST, *sorted(states)) if state in states), "")


def _failure(job: pb.Job, goal: str, timeout_s: float) -> str:
    late = f": not {goal} within {timeout_s:g} s; the owner goes on with it" if job.state not in ENDED else ""
    return f"{_text(job)}{late}"


def _text(job: pb.Job) -> str:
    where = f" to {job.capture}" if job.capture else ""
    return f"{job.kind} of {job.target}{where}: {job.state}{_moves(job)}{f': {job.reason}' if job.reason else ''}"


def _moves(job: pb.Job) -> str:
    """How far a rebalance is."""
    if not job.HasField("moves_done"):
        return ""
    return f", {job.moves_done} moved" + (f", {job.moves_left} left" if job.moves_left else "")
