"""Run random cases of replicated tables, and print one JSON object about them: `python -m tests.random_tables`.

--cases N          how many cases (default 100), or as many as fit into --seconds S
--seed N           the first seed (default 1)
--replay SEED      run one case, make it smaller if it fails, and print its steps
--scope SCOPE      what changes besides rows: rows (nothing), sink, shapes, all (default)
--workers N        processes, each with a PostgreSQL server of its own (default 2)
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from tests.random_tables.case import Result
from tests.random_tables.generator import Scope
from tests.random_tables.shrink import replay
from tests.random_tables.world import run_seed, start_worker

FAILURES_MAX = 50


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.random_tables")
    parser.add_argument("--cases", type=int, default=100, help="how many cases")
    parser.add_argument("--seconds", type=float, default=0.0, help="begin no case after this time (0: no limit)")
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--replay", type=int, metavar="SEED", help="run this case alone, and make it smaller if it fails")
    parser.add_argument("--runs", type=int, default=60, help="how many smaller cases --replay may run")
    parser.add_argument("--workers", type=int, default=2, help="how many processes")
    parser.add_argument("--scope", type=Scope, default=Scope.ALL, help="rows, sink, shapes or all: what changes besides rows")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tablewire-random-") as folder:
        if given.replay is not None:
            return replay(Path(folder), given.replay, given.runs, given.scope)
        return run_many(results(Path(folder), given))


def run_many(found: Iterator[Result]) -> int:
    started = time.monotonic()
    ends: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    failures: list[dict[str, object]] = []
    ran = 0
    for result in found:
        ran += 1
        ends.update(result.tables.values())
        errors.update(result.errors)
        if result.kind:
            failures.append({"seed": result.seed, "kind": result.kind, "text": result.violation[:500]})
            print(f"seed {result.seed}: {result.violation[:1000]}", file=sys.stderr, flush=True)
        if len(failures) >= FAILURES_MAX:
            break
    for text, count in errors.most_common(20):
        print(f"error of {count} tables: {text[:300]}", file=sys.stderr)
    total = max(1, ends.total())
    print(
        json.dumps(
            {
                "cases": ran,
                "tables": ends.total(),
                "equal": ends["equal"],
                "equal_after_way_out": ends["equal after its way out"],
                "errors": ends["error"],
                "pending": ends["pending"],
                "equal_share": round(ends["equal"] / total, 3),
                "seconds": round(time.monotonic() - started, 1),
                "failures": failures,
            }
        )
    )
    return 1 if failures else 0


def results(folder: Path, given: argparse.Namespace) -> Iterator[Result]:
    """Yield the results in the order of the seeds."""
    deadline = time.monotonic() + given.seconds if given.seconds else None
    start = {"initializer": start_worker, "initargs": (folder,)}
    with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn"), **start) as pool:
        running: deque[Future[Result]] = deque()
        for seed in range(given.seed, given.seed + given.cases):
            while len(running) >= 2 * given.workers:
                yield running.popleft().result()
            if deadline is not None and time.monotonic() > deadline:
                break
            running.append(pool.submit(run_seed, seed, given.scope))
        while running:
            yield running.popleft().result()


if __name__ == "__main__":
    sys.exit(main())
