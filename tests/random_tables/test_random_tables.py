"""Random tables, changes of rows and shapes, restarts and moves: source = sink, or the table shows why not."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from tests.random_tables.case import Act, Result, Step
from tests.random_tables.generator import Scope, generate
from tests.random_tables.shrink import without_statement, without_steps
from tests.random_tables.world import World

CASES = 10
EQUAL_SHARE_MIN = 0.85


@pytest.mark.integration
@pytest.mark.parametrize("scope", [Scope.ROWS, Scope.SINK])
def test_random_changes_arrive(world: World, scope: Scope) -> None:
    """Rows and tables change, executors restart, crash, move and pause: each table is equal at its checkpoint."""
    _require_equal([world.run(generate(seed, scope)) for seed in range(1, CASES + 1)])


def _require_equal(results: list[Result]) -> None:
    """Require that no case failed, and that errors are the exception. A seed is replayed by `--replay SEED`."""
    failures = [f"seed {result.seed}: {result.violation}" for result in results if result.kind]
    assert not failures, "\n".join(failures)
    ends = Counter(itertools.chain.from_iterable(result.tables.values() for result in results))
    assert ends["equal"] >= EQUAL_SHARE_MIN * ends.total(), ends


def test_same_seed_gives_the_same_case() -> None:
    """A failure is replayed by its seed."""
    assert all(generate(seed) == generate(seed) for seed in range(50))


def test_smaller_cases_leave_out_steps_and_statements() -> None:
    """Shrinking keeps the first step, which makes the types, and never empties a step of statements."""
    steps = [Step(Act.BOTH, ("a",)), Step(Act.SOURCE, ("b", "c")), Step(Act.CHECK)]
    assert without_steps(steps, 1, 1) == [steps[0], steps[2]]
    assert without_statement(steps, 1, 0)[1].statements == ("c",)


def test_generated_cases_have_all_kinds_of_steps() -> None:
    """No kind of step is left out because of a mistake in the generator."""
    rng = random.Random(1)
    found = {step.act for _ in range(200) for step in generate(rng.randrange(10**6)).steps}
    assert found == set(Act) - {Act.LOSE_SLOT}
