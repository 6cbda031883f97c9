"""docs/transitions.md, drawn from the rules: `python -m owner.diagram` prints it, `--write FILE` writes it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from owner.core.transitions import (
    RULES,
    Cell,
    Condition,
    Dispatch,
    Note,
    Outcome,
    Role,
    RoleChange,
    Rule,
    cells,
    impossible,
    rule_for,
)
from tablewire.types import ReplicationState

HEAD = """# The rules of replication

<!-- Written by `python -m owner.diagram --write docs/transitions.md` from the rules; change those, not this page. -->

For each span the owner keeps a **replication state** and who has a role in it: at most one **Primary** (P: it writes), at most
one **Secondary** (X: it gets ready to write), and any number of **Undetermined** captures (U: they may still hold the span). A
capture reports a **table state** of each span that it holds. What a report does depends on these and on nothing else: the first
rule below that fits decides, and a report that no rule fits changes nothing. The engine, this page and the tests are made from
one table, `RULES` in `owner/core/transitions.py`.

Every rule says the truth again rather than remembering that something was sent: a lost, doubled, late or reordered message needs
no rule of its own. A capture that is gone counts as one that reported Stopped for everything that it held. Of the reporter's own
kind only the *other* Undetermined captures count for U.

## The states

"""

LEGEND = """
Numbers are those of the rules below. What has no number is done by the policies and not by a report: placement, planned moves
(an operator's, a drain's, balance), the deadline of a prepare, and the removal of tables that are gone.

## The rules

*Sent* is a dispatch to the reporter unless another one is named; *grant* makes the Secondary the Primary under a new assignment
epoch and tells it to write. *Checkpoint*: the reported checkpoint counts.

"""

POLICIES = (
    ("[*]", "Absent", "a new table"),
    ("Absent", "Prepare", "a capture is chosen"),
    ("Replicating", "Prepare", "a planned move"),
    ("Prepare", "Replicating", "undone, the Primary goes on"),
    ("Prepare", "Absent", "undone, nobody writes"),
    ("Absent", "Removing", "the table is gone"),
    ("Prepare", "Removing", "the table is gone"),
    ("Commit", "Removing", "the table is gone"),
    ("Replicating", "Removing", "the table is gone"),
    ("Removing", "[*]", "nobody holds it any more"),
)
"""What `owner.core.policies` do to a state."""

_DISPATCHES = {
    Dispatch.NOTHING: "",
    Dispatch.PREPARE_REPORTER: "prepare",
    Dispatch.WRITE_REPORTER: "write",
    Dispatch.REMOVE_REPORTER: "remove",
    Dispatch.REMOVE_PRIMARY: "remove, to the Primary",
    Dispatch.GRANT: "grant",
}
_ROLE_CHANGES = {
    RoleChange.KEEP: "",
    RoleChange.CLEAR: "the reporter has no role any more",
    RoleChange.TO_PRIMARY: "the reporter is the Primary",
    RoleChange.TO_SECONDARY: "the reporter is the Secondary",
    RoleChange.TO_UNDETERMINED: "the reporter is Undetermined",
}
_NOTES = {
    Note.NOTHING: "",
    Note.ORPHAN: "counted as an orphan",
    Note.TWO_WRITERS: "the newer permission stays, the other one is told to remove and is Undetermined; counted",
    Note.REFUSED: "the move failed",
}


def render() -> str:
    """The whole page."""
    return "".join((HEAD, _diagram(), LEGEND, _rules(), _numbers()))


def edges() -> dict[tuple[ReplicationState, ReplicationState, Role], list[int]]:
    """(from, to, who reports) -> the numbers of the rules, from 1, that lead there from a cell that can occur."""
    leaving = {
        (id(rule), cell.state)
        for cell in cells()
        if not impossible(cell) and (rule := rule_for(cell)) is not None and _leaves(rule, cell)
    }
    found: dict[tuple[ReplicationState, ReplicationState, Role], list[int]] = {}
    for number, rule in enumerate(RULES, 1):
        target = ReplicationState.REPLICATING if rule.then.note is Note.TWO_WRITERS else rule.then.state
        for state in rule.states:
            if target is not None and target is not state and (id(rule), state) in leaving:
                found.setdefault((state, target, rule.role), []).append(number)
    return found


def _leaves(rule: Rule, cell: Cell) -> bool:
    """Whether the state may change. Where two writers are met one of them stays; that ends a task that has no Secondary then."""
    if rule.then.note is not Note.TWO_WRITERS:
        return True
    under_way = cell.state in (ReplicationState.PREPARE, ReplicationState.COMMIT)
    return under_way and (cell.role is Role.SECONDARY or not cell.secondary)


def _diagram() -> str:
    lines = ["```mermaid", "stateDiagram-v2"]
    for source, target, why in POLICIES:
        lines.append(f"    {source} --> {target} : {why}")
    for (state, to, role), numbers in sorted(edges().items(), key=lambda edge: edge[1]):
        reports = _listed(dict.fromkeys(_word(report) for number in numbers for report in RULES[number - 1].reports))
        lines.append(f"    {_word(state)} --> {_word(to)} : {_reporter(role)} reports {reports} ({_ranges(numbers)})")
    return "\n".join([*lines, "```", ""])


def _rules() -> str:
    lines = ["| # | state | reporter | reports | if | then | sent | why |", "|---|---|---|---|---|---|---|---|"]
    for number, rule in enumerate(RULES, 1):
        states = "any" if len(rule.states) == len(ReplicationState) else _listed(map(_word, rule.states))
        lines.append(
            f"| {number} | {states} | {_reporter(rule.role)} | {_listed(map(_word, rule.reports))} | {_condition(rule.when)} "
            f"| {_then(rule.then)} | {_DISPATCHES[rule.then.dispatch]} | {rule.why} |"
        )
    return "\n".join([*lines, ""])


def _numbers() -> str:
    """How many cells there are, and why some cannot occur."""
    every: list[Cell] = list(cells())
    barred = Counter(reason for cell in every if (reason := impossible(cell)))
    possible = [cell for cell in every if not impossible(cell)]
    waiting = sum(1 for cell in possible if rule_for(cell) is None)
    lines = [
        "\n## The cells\n",
        f"State, reporter, report, P, X and U make {len(every)} cells. {len(possible)} can occur, and a test reaches each of",
        f"them: a rule decides {len(possible) - waiting}, and {waiting} wait. The other {sum(barred.values())} cannot occur:\n",
        "| cells | because |",
        "|---|---|",
        *(f"| {count} | {reason} |" for reason, count in sorted(barred.items(), key=lambda item: (-item[1], item[0]))),
        "",
    ]
    return "\n".join(lines)


def _then(outcome: Outcome) -> str:
    parts = [
        f"-> {_word(outcome.state)}" if outcome.state is not None else "",
        _ROLE_CHANGES[outcome.reporter],
        "checkpoint" if outcome.checkpoint else "",
        _NOTES[outcome.note],
    ]
    return "; ".join(part for part in parts if part) or "stays"


def _condition(when: Condition) -> str:
    named = (("P", when.primary), ("X", when.secondary), ("U", when.undetermined))
    return ", ".join(letter if wanted else f"no {letter}" for letter, wanted in named if wanted is not None)


def _reporter(role: Role) -> str:
    return "no role" if role is Role.NONE else _word(role.name)


def _word(name: str) -> str:
    return str(name).lower().capitalize()


def _listed(words: Iterable[str]) -> str:
    return ", ".join(words)


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 7 -> `1-3, 7`."""
    parts: list[tuple[int, int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1] = (parts[-1][0], number)
        else:
            parts.append((number, number))
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in parts)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--write"] and len(arguments) == 2:
        Path(arguments[1]).write_text(render(), encoding="utf-8")
    elif not arguments:
        sys.stdout.write(render())
    else:
        sys.exit("usage: python -m owner.diagram [--write FILE]")


if __name__ == "__main__":
    main(sys.argv[1:])
