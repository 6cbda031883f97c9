"""The simulation finds each bug that is planted into the real modules.

Each bug names a seed that finds it. When the core changes, another seed may be needed: `python -m
tests.sim --bugs 100`.
"""

from __future__ import annotations

import pytest

from tests.sim.mutations import DEMANDED, HARMLESS, MORE, Bug
from tests.sim.simulation import quietly

SEEDS_MAX = 200


@pytest.mark.parametrize("bug", [*DEMANDED, *MORE], ids=lambda bug: bug.name)
def test_bug_is_found(bug: Bug) -> None:
    """The known seed finds it, or another one does."""
    with quietly():
        found = bug.find([bug.seed]) or bug.find(range(1, SEEDS_MAX + 1))
    assert found is not None, f"no seed up to {SEEDS_MAX} finds it: {bug.name}"


@pytest.mark.parametrize("bug", HARMLESS, ids=lambda bug: bug.name)
def test_harmless_bug_can_be_planted(bug: Bug) -> None:
    """A bug whose effect other rules hide can still be planted, to be looked at."""
    with quietly(), bug.plant():
        pass
