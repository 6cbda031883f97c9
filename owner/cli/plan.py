"""What --dry-run prints: the moves, and the load of each capture before and after them."""

from __future__ import annotations

from typing import Any

from owner.cli.json_objects import to_object
from owner.cli.options import Session
from owner.cli.output import keys
from tablewire.v1 import admin_pb2 as pb

PLAN_TIMEOUT_S = 60.0
MOVES_FOR_PEOPLE = 1_000


def show_plan(session: Session, method: str, request: Any) -> None:
    """Asks for a plan and prints it."""
    plan = pb.Plan()
    for chunk in session.client.stream(method, request, session.timeout_s(PLAN_TIMEOUT_S), reads=True):
        plan.MergeFrom(chunk)
    if session.output.is_json:
        session.output.json(to_object(plan))
        return
    if plan.moves:
        _print_moves(session, plan)
        session.output.line("")
    before, after = dict(plan.load_before), dict(plan.load_after)
    session.output.table(
        ("CAPTURE", "#LOAD", "#AFTER"),
        ((name, f"{before.get(name, 0.0):.1f}", f"{after.get(name, 0.0):.1f}") for name in sorted({*before, *after})),
    )
    if len(plan.moves) > MOVES_FOR_PEOPLE:
        session.output.note(f"only the first {MOVES_FOR_PEOPLE} of {len(plan.moves)} moves are shown; -o json shows all")
    text = "nothing would move" if not plan.moves else f"{len(plan.moves)} would move"
    session.output.note(f"{text}{f': {plan.note}' if plan.note else ''}; nothing was changed")


def _print_moves(session: Session, plan: pb.Plan) -> None:
    moves = plan.moves[:MOVES_FOR_PEOPLE]
    split = any(move.start_key or move.end_key for move in moves)
    several = len(plan.changefeeds) > 1
    session.output.table(
        (*(("CHANGEFEED",) if several else ()), "TABLE", "#ID", *(("SPAN",) if split else ()), "FROM", "TO", "#WEIGHT", "WHY"),
        (
            (
                *((move.changefeed,) if several else ()),
                move.table,
                move.table_id,
                *((keys(move),) if split else ()),
                move.source,
                move.target,
                f"{move.weight:.1f}",
                move.reason,
            )
            for move in moves
        ),
    )
