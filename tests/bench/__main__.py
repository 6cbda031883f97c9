"""`make bench`: every part below, one after the other. stdout is one line of JSON, all else goes to stderr.

    make bench ARGS="--only steady_tick"

A part is a module beside this file with `run() -> dict` of figures, each with its unit in its name. Exit code 1 when a part
failed: its error then replaces its figures, and the others are printed all the same. Figures are no tests: nothing
here compares them with anything.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

PARTS = {
    "steady_tick": "tests.bench.bench_tick",
    "postgres": "tests.bench.bench_postgres",
    "move_gap": "tests.bench.bench_move",
    "idle": "tests.bench.bench_idle",
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="make bench ARGS=...", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", action="append", choices=sorted(PARTS), help="this part alone; may be repeated")
    options = parser.parse_args(arguments)
    figures: dict[str, Any] = {"machine": machine()}
    failed = False
    for name in options.only or PARTS:
        # A part may print what it likes: stdout holds the line of JSON alone.
        with contextlib.redirect_stdout(sys.stderr):
            figures[name] = measure(name)
        failed = failed or "error" in figures[name]
    print(json.dumps(figures))
    return 1 if failed else 0


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "tablewire": importlib.metadata.version("tablewire"),
        "python": platform.python_version(),
        "numpy": importlib.metadata.version("numpy"),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def measure(name: str) -> Mapping[str, Any]:
    """The figures of one part, or {"error": text}; its traceback is on stderr."""
    print(f"bench: {name} ...", flush=True)
    started = time.monotonic()
    try:
        figures: Mapping[str, Any] = importlib.import_module(PARTS[name]).run()
        json.dumps(figures)
    except Exception as error:  # noqa: BLE001 - one part that fails must not hide the figures of the others
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    print(f"bench: {name}: {time.monotonic() - started:.0f} s: {json.dumps(figures)}", flush=True)
    return figures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
