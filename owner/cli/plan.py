"""What --dry-run prints: the moves, and the load of each processor before and after them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from owner.cli.json_objects import to_object
from owner.cli.options import Session
from owner.cli.output import keys
from tablewire.runtime.text import plural

if TYPE_CHECKING:
    from tablewire.v1 import admin_pb2 as pb

PLAN_TIMEOUT_S = 60.0
MOVES_SHOWN_MAX = 1_000


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
    if len(plan.moves) > MOVES_SHOWN_MAX:
        session.output.note(f"only the first {MOVES_SHOWN_MAX} of {len(plan.moves)} moves are shown; -o json shows all")
    text = f"{plural(len(plan.moves), 'move')} planned" if plan.moves else "nothing would move"
    session.output.note(f"{text}{f': {plan.note}' if plan.note else ''}; nothing was changed")


def _print_moves(session: Session, plan: pb.Plan) -> None:
    moves = plan.moves[:MOVES_SHOWN_MAX]
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
