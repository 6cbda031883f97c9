"""owner table list | move, owner rebalance"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import click

from owner.cli import shapes
from owner.cli.options import Session, remote
from owner.cli.output import duration, to_json
from tablewire.v1 import admin_pb2 as pb

LIST_TIMEOUT_S = 300.0
DECISION_TIMEOUT_S = 15.0
DONE_TIMEOUT_S = 600.0
ANSWER_MARGIN_S = 5.0
"""How much longer than the owner the client waits, so that it is the owner that tells how the job stands."""
ROWS_FOR_PEOPLE = 1_000


@click.group("table")
def table_group() -> None:
    """Tables, and who replicates them."""


def changefeed_option(command: Any) -> Any:
    return click.option("--changefeed", default="", metavar="ID", help="May be left out while there is exactly one.")(command)


def wait_option(command: Any) -> Any:
    return click.option(
        "--wait", is_flag=True, help="Until it is done (and not only accepted); --timeout-s says how long, 600 if not given."
    )(command)


@table_group.command("list")
@remote
@changefeed_option
@click.option("--capture", default="", metavar="ID", help="Only what this capture holds.")
@click.option("--stalled", is_flag=True, help="Only what is not steady.")
@click.option("--table", default="", metavar="TABLE", help="Only this table (schema.table or its id).")
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
        rows += [to_json(shapes.TABLE.of(row)) for row in chunk.tables]
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
                *((_keys(row),) if split else ()),
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


def _keys(row: pb.TableRow) -> str:
    return f"[{row.start_key.hex() or '-'}, {row.end_key.hex() or '-'})"


@table_group.command("move")
@remote
@click.argument("table", metavar="TABLE")
@click.option("--to", "target", required=True, metavar="CAPTURE", help="The capture that shall write it.")
@changefeed_option
@wait_option
def move(session: Session, table: str, target: str, changefeed: str, wait: bool) -> None:
    """Move TABLE (schema.table or its id) to a capture, without a gap.

    Returns once the owner has accepted or refused it, with --wait once it is done. It is not taken back when the time is over.
    """
    request = pb.MoveTableRequest(
        changefeed=changefeed, table=table, target=target, wait_done=wait, wait_ms=_wait_ms(session, wait)
    )
    _follow(session, "MoveTable", request, wait)


@click.command("rebalance")
@remote
@changefeed_option
@wait_option
def rebalance(session: Session, changefeed: str, wait: bool) -> None:
    """Spread the tables evenly over the captures, by the fewest moves."""
    request = pb.RebalanceRequest(changefeed=changefeed, wait_done=wait, wait_ms=_wait_ms(session, wait))
    _follow(session, "Rebalance", request, wait)


def _job_timeout_s(session: Session, wait: bool) -> float:
    return session.timeout_s(DONE_TIMEOUT_S if wait else DECISION_TIMEOUT_S)


def _wait_ms(session: Session, wait: bool) -> int:
    return max(1, round(_job_timeout_s(session, wait) * 1000))


def _follow(session: Session, method: str, request: Any, wait: bool) -> None:
    """Shows each change on stderr, the end on stdout; anything but accepted (with --wait: done) is a failure."""
    timeout_s = _job_timeout_s(session, wait)
    jobs: Iterable[pb.Job] = session.client.stream(method, request, timeout_s + ANSWER_MARGIN_S)
    last = pb.Job()
    for job in jobs:
        if (wait and last.state and job.state not in ("done", "refused", "cancelled")) or (wait and not last.state):
            session.output.note(_text(job))
        last = job
    goals = ("done",) if wait else ("accepted", "done")
    text, answer = _text(last), shapes.JOB.of(last)
    if last.state not in goals:
        if last.state in ("pending", "accepted"):
            text = f"{text}: not {goals[0]} within {timeout_s:g} s; the owner goes on with it"
        raise session.failure(text, last.state or "unknown", job=answer)
    if session.output.is_json:
        session.output.json(answer)
    else:
        session.output.line(text)


def _text(job: pb.Job) -> str:
    where = f" to {job.capture}" if job.capture else ""
    return f"{job.kind} of {job.target}{where}: {job.state}{f': {job.reason}' if job.reason else ''}"
