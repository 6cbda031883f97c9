"""`make bench-core`: the figures of the scheduler core, and how its cost grows with the spans. Prints one JSON object.

Less than five minutes. Everything is measured in this process on real messages as bytes; nothing is a timed test.
"""

from __future__ import annotations

import gc
import json
import resource
import statistics
import sys
import threading
import time
import types

from tests.bench.bench_tick import Bench, Wire

LARGE = 2**20
BRING_UP = 2**17
SCALING = [2**10, 2**12, 2**14, 2**16, 2**17, 2**18]
READ_TICKS = 60


def main() -> int:
    figures: dict[str, object] = {}
    scaling = []
    for spans in SCALING:
        say(f"{spans} spans")
        bench = Bench(spans)
        if spans == BRING_UP:
            figures["bring_up_131072"] = {"ticks": bench.bring_up_ticks, "cpu_s": round(bench.bring_up_cpu_s, 2)}
        scaling.append(scaling_row(bench, bench.steady_ticks(ticks=10)))
        del bench
        gc.collect()
    say(f"{LARGE} spans")
    bench = Bench(LARGE)
    everything = bench.steady_ticks(ticks=15)
    scaling.append(scaling_row(bench, everything))
    figures |= {
        "steady_tick_1048576_all_moved_ms_p50": everything["tick_ms_p50"],
        "steady_tick_1048576_1_percent_moved_ms_p50": bench.steady_ticks(0.01, ticks=15)["tick_ms_p50"],
        "owner_bytes_per_span": round(owner_bytes(bench) / LARGE, 1),
        "wire_bytes_per_changed_span": everything["wire_bytes_per_changed_span"],
        "wire_bytes_per_unchanged_span": unchanged_bytes(bench),
        "admin_read_during_ticks_ms": reads_during_ticks(bench),
        "scaling": scaling,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(json.dumps(figures))
    return 0


def scaling_row(bench: Bench, steady: dict[str, float]) -> dict[str, float]:
    return {
        "spans": bench.spans,
        "bring_up_ticks": bench.bring_up_ticks,
        "bring_up_cpu_us_per_span": round(1e6 * bench.bring_up_cpu_s / bench.spans, 2),
        "tick_ms_p50": steady["tick_ms_p50"],
        "tick_ns_per_span": round(1e6 * steady["tick_ms_p50"] / bench.spans, 1),
    }


def unchanged_bytes(bench: Bench) -> float:
    """Bytes that a heartbeat's answers cost when nothing has changed, by span."""
    bench.answer()
    bench.tick()
    before = bench.wire.bytes_to["owner"]
    bench.answer()
    return round((bench.wire.bytes_to["owner"] - before) / bench.spans, 6)


def owner_bytes(bench: Bench) -> int:
    """All that is reachable from the scheduler and only owned by it: columns, indexes, the published snapshot, every object."""
    ignored = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.CodeType, Wire)
    seen, total = {id(bench)}, 0
    waiting: list[object] = [bench.scheduler]
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, ignored):
            continue
        seen.add(id(found))
        total += sys.getsizeof(found)
        waiting.extend(gc.get_referents(found))
    return total


def reads_during_ticks(bench: Bench) -> dict[str, float]:
    """How long readers of the snapshot wait while the owner ticks without a pause: status, one span, the stalls."""
    times: list[float] = []
    ended = threading.Event()

    def read() -> None:
        position = 0
        while not ended.wait(0.002):
            started = time.perf_counter()
            snapshot = bench.scheduler.snapshot()
            position = (position + 7919) % bench.spans
            view = snapshot.spans[position]
            if view.primary is None or not snapshot.captures:
                raise RuntimeError(f"{view} is not replicating")
            times.append(1000 * (time.perf_counter() - started))

    reader = threading.Thread(target=read, name="reader")
    reader.start()
    for _ in range(READ_TICKS):
        bench.move(1.0, None)  # type: ignore[arg-type]
        bench.answer()
        bench.tick()
    ended.set()
    reader.join()
    times.sort()
    return {
        "reads": len(times),
        "p50": round(statistics.median(times), 3),
        "p99": round(times[int(0.99 * len(times))], 3),
        "max": round(times[-1], 3),
    }


def say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
