"""Random cases find each bug that is planted into the executor.

Each bug names a seed that finds it; when generator or executor change, another seed may be needed.
"""

from __future__ import annotations

import pytest

from tests.random_tables.generator import generate
from tests.random_tables.planted import BUGS, Bug
from tests.random_tables.world import World

SEEDS_MAX = 15

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_bug_is_found(bug: Bug, world: World) -> None:
    """The known seed finds it, or another one does; without the bug the same case passes."""
    found = bug.find(world, [bug.seed, *range(1, SEEDS_MAX + 1)])
    assert found is not None, f"no seed up to {SEEDS_MAX} finds it: {bug.name}"
    without = world.run(generate(found.seed, focus=bug.focus))
    assert not without.kind, without.violation
