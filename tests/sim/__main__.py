"""Run many seeds of the simulation, and print one JSON object about them: `python -m tests.sim`.

--seeds N [--first SEED] [--seconds S]    run N seeds, or as many as fit into S seconds;
                                          replay a failure with --first SEED --seeds 1
--jobs N                                  use N processes (default: one for each core)
--bugs N                                  plant each bug of mutations.py, and print which of
                                          N seeds finds it first
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context

from tests.sim.mutations import DEMANDED, MORE
from tests.sim.nodes import TICK_S
from tests.sim.simulation import Result, quietly, run_seed

VIOLATIONS_MAX = 10


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.sim")
    parser.add_argument("--seeds", type=int, default=0, help="how many seeds (0: as many as fit)")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--seconds", type=float, default=0.0, help="how long at the most (0: no limit)")
    parser.add_argument("--bugs", type=int, default=0, metavar="N", help="find the planted bugs with N seeds each")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="how many processes")
    given = parser.parse_args()
    if given.bugs:
        with quietly():
            return find_bugs(given.bugs)
    return simulate(given.seeds, given.first, given.seconds, given.jobs)


def simulate(seeds: int, first: int, seconds: float, jobs: int) -> int:
    seeds = seeds or (10**9 if seconds else 20)
    started = time.monotonic()
    faults: Counter[str] = Counter()
    ran = ticks = slowest = 0
    violations: list[str] = []
    for result in run_seeds(range(first, first + seeds), jobs, started + seconds if seconds else None):
        ran, ticks = ran + 1, ticks + result.ticks
        faults += result.faults
        slowest = max(slowest, result.settle_ticks)
        if result.violations:
            violations += result.violations[:1]
            print(result.violations[0], file=sys.stderr)
        if len(violations) >= VIOLATIONS_MAX:
            break
    took = time.monotonic() - started
    print(
        json.dumps(
            {
                "seeds": ran,
                "simulated_hours": round(ticks * TICK_S / 3600, 2),
                "simulated_seconds": round(ticks * TICK_S),
                "simulated_seconds_per_second": round(ticks * TICK_S / took, 1),
                "faults_in_all": faults.total(),
                "faults": dict(sorted(faults.items())),
                "slowest_settle_ticks": slowest,
                "violations": violations,
            }
        )
    )
    return 1 if violations else 0


def run_seeds(seeds: range, jobs: int, deadline: float | None) -> Iterator[Result]:
    """Yield the results in the order of the seeds. None is started after the deadline, a
    time.monotonic()."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running: deque[tuple[int, Future[Result]]] = deque()
        try:
            for seed in seeds:
                while len(running) >= 2 * jobs:
                    yield result_of(*running.popleft())
                if deadline is not None and time.monotonic() > deadline:
                    break
                running.append((seed, pool.submit(run_seed, seed)))
            while running:
                yield result_of(*running.popleft())
        finally:
            for _, future in running:
                future.cancel()


def result_of(seed: int, future: Future[Result]) -> Result:
    error = future.exception()
    if error is not None:
        error.add_note(f"while seed {seed} ran")
    return future.result()


def find_bugs(seeds: int) -> int:
    missed = 0
    for bug in (*DEMANDED, *MORE):
        found = bug.find(range(1, seeds + 1))
        missed += found is None
        print(f"{bug.name:70} {found or 'not found'}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
