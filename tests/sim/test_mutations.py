"""Bugs are planted into the real modules, one at a time: the simulation finds each of them.

Each bug names the seed that found it first. When the core changes, another one may be: `python -m tests.sim --bugs 100`.
"""

from __future__ import annotations

import pytest

from tests.sim.mutations import DEMANDED, HARMLESS, MORE, Bug
from tests.sim.simulation import quietly

SEEDS_MAX = 200


@pytest.mark.parametrize("bug", [*DEMANDED, *MORE], ids=lambda bug: bug.name)
def test_bug_is_found(bug: Bug) -> None:
    """By the seed that is known for it, else by another one."""
    with quietly():
        found = bug.find([bug.seed]) or bug.find(range(1, SEEDS_MAX + 1))
    assert found is not None, f"no seed up to {SEEDS_MAX} finds it: {bug.name}"


@pytest.mark.parametrize("bug", HARMLESS, ids=lambda bug: bug.name)
def test_harmless_bug_can_be_planted(bug: Bug) -> None:
    """What other rules make up for is still there to be looked at."""
    with quietly(), bug.plant():
        pass
