"""`python -m tests.sim`: many seeds, or as many as fit into a time, and one JSON object about them.

--seeds N [--first SEED] [--seconds S]    so many seeds, or so long; what fails replays with --first SEED --seeds 1
--bugs N                                  plants each bug of mutations.py and says which of N seeds finds it first
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter

from tests.sim.mutations import DEMANDED, MORE
from tests.sim.nodes import TICK_S
from tests.sim.simulation import Simulation, quietly

VIOLATIONS_MAX = 10


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.sim")
    parser.add_argument("--seeds", type=int, default=0, help="how many seeds (0: as many as fit)")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--seconds", type=float, default=0.0, help="how long at the most (0: no limit)")
    parser.add_argument("--bugs", type=int, default=0, metavar="N", help="find the planted bugs with N seeds each")
    given = parser.parse_args()
    with quietly():
        return find_bugs(given.bugs) if given.bugs else simulate(given.seeds, given.first, given.seconds)


def simulate(seeds: int, first: int, seconds: float) -> int:
    seeds = seeds or (10**9 if seconds else 20)
    started = time.monotonic()
    faults: Counter[str] = Counter()
    ran = ticks = slowest = 0
    violations: list[str] = []
    for seed in range(first, first + seeds):
        if (seconds and time.monotonic() - started > seconds) or len(violations) >= VIOLATIONS_MAX:
            break
        result = Simulation(seed).run()
        ran, ticks = ran + 1, ticks + result.ticks
        faults += result.faults
        slowest = max(slowest, result.settle_ticks)
        if result.violations:
            violations += result.violations[:1]
            print(result.violations[0], file=sys.stderr)
    took = time.monotonic() - started
    print(
        json.dumps(
            {
                "seeds": ran,
                "simulated_seconds": round(ticks * TICK_S),
                "simulated_seconds_per_second": round(ticks * TICK_S / took, 1),
                "faults": dict(sorted(faults.items())),
                "slowest_settle_ticks": slowest,
                "violations": violations,
            }
        )
    )
    return 1 if violations else 0


def find_bugs(seeds: int) -> int:
    missed = 0
    for bug in (*DEMANDED, *MORE):
        found = bug.find(range(1, seeds + 1))
        missed += found is None
        print(f"{bug.name:70} {found or 'not found'}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
