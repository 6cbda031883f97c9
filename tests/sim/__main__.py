"""`python -m tests.sim --seeds N [--first SEED] [--seconds S]`: runs that many seeds, or that long; prints one JSON object."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections import Counter

import structlog

from tests.sim.nodes import TICK_S
from tests.sim.simulation import Simulation


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.sim")
    parser.add_argument("--seeds", type=int, default=0, help="how many seeds (0: as many as fit)")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--seconds", type=float, default=0.0, help="how long at the most (0: no limit)")
    given = parser.parse_args()
    # Executors fail on purpose here, thousands of times.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    seeds = given.seeds or (10**9 if given.seconds else 20)
    deadline = time.monotonic() + given.seconds if given.seconds else float("inf")
    faults: Counter[str] = Counter()
    ran = ticks = slowest = 0
    violations: list[str] = []
    for seed in range(given.first, given.first + seeds):
        if time.monotonic() > deadline or len(violations) >= 10:
            break
        result = Simulation(seed).run()
        ran, ticks = ran + 1, ticks + result.ticks
        faults += result.faults
        slowest = max(slowest, result.settle_ticks)
        if result.violations:
            violations += result.violations[:1]
            print(f"seed {seed}: {result.violations[0]}", file=sys.stderr)
    print(
        json.dumps(
            {
                "seeds": ran,
                "simulated_seconds": round(ticks * TICK_S),
                "faults": dict(sorted(faults.items())),
                "slowest_settle_ticks": slowest,
                "violations": violations,
            }
        )
    )
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
