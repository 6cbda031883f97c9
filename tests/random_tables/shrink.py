"""Replays a seed and makes a failing case smaller: steps, then single statements, are left out as long as it still fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.random_tables.case import Case, Result, Step
from tests.random_tables.generator import Scope, generate
from tests.random_tables.world import run_here, start_worker

TRIES = 2
"""How often a smaller case is run before it counts as one that passes: failures may depend on timing."""


def replay(folder: Path, seed: int, runs: int, scope: Scope) -> int:
    """Run the case of the seed, print its trace, and shrink it if it fails; return the exit code."""
    start_worker(folder)
    case = generate(seed, scope)
    result = run_here(case)
    print("\n".join(result.trace), file=sys.stderr)
    found = {"cases": 1, "seed": seed, "kind": result.kind, "failures": [result.violation] if result.kind else []}
    print(json.dumps({**found, "tables": result.tables, "errors": result.errors, "seconds": round(result.seconds, 2)}))
    if not result.kind:
        return 0
    small, last = shrink(case, result, runs)
    print(f"\nsmallest case found ({last.violation[:1500]}):", file=sys.stderr)
    print("\n".join(map(str, small.steps)), file=sys.stderr)
    print("\nits trace:", file=sys.stderr)
    print("\n".join(last.trace), file=sys.stderr)
    print(json.dumps({**found, "smallest": [str(step) for step in small.steps]}))
    return 1


def shrink(case: Case, result: Result, runs: int) -> tuple[Case, Result]:
    """Return the smallest failing case that this number of runs finds, and its result."""
    left = runs
    last = result

    def fails(steps: Sequence[Step]) -> bool:
        nonlocal left, last
        for _ in range(TRIES):
            if left <= 0:
                return False
            left -= 1
            found = run_here(replace(case, steps=tuple(steps)))
            if found.kind == result.kind:
                last = found
                return True
        return False

    steps = list(case.steps)
    if fails(result.kept):
        steps = list(result.kept)
    size = max(1, len(steps) // 2)
    while size >= 1 and left > 0:
        at = 1
        while at < len(steps) and left > 0:
            fewer = without_steps(steps, at, size)
            if fails(fewer):
                steps = fewer
            else:
                at += size
        size //= 2
    for at in range(1, len(steps)):
        number = 0
        while number < len(steps[at].statements) and len(steps[at].statements) > 1 and left > 0:
            fewer = without_statement(steps, at, number)
            if fails(fewer):
                steps = fewer
            else:
                number += 1
    return replace(case, steps=tuple(steps)), last


def without_steps(steps: list[Step], at: int, size: int) -> list[Step]:
    return steps[:at] + steps[at + size :]


def without_statement(steps: list[Step], at: int, number: int) -> list[Step]:
    texts = steps[at].statements
    return [*steps[:at], replace(steps[at], statements=texts[:number] + texts[number + 1 :]), *steps[at + 1 :]]
