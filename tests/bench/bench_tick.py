"""The steady tick of the scheduler: every span's checkpoint has moved since the last one. Prints one JSON object.

Measured: `Scheduler.tick` with its receive and decode, on reports that went through the wire's bytes; not the agents that made
them. `python -m tests.bench.bench_tick [SPANS]`
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence

import numpy as np

from owner.scheduler import SchedulerConfig, new_scheduler
from processor.agent import new_agent
from tablewire.codec import decode_message, encode_message
from tablewire.liveness import Liveness
from tablewire.testing import FakeTableExecutor
from tablewire.types import TS_MAX, Barrier, BarrierWithMinTs, CaptureInfo, ChangefeedID, Message

CAPTURES = 8
TICKS = 30
CHANGEFEED = ChangefeedID("default", "bench")


class Wire:
    """Bytes between one scheduler and its agents; the receiver decodes, so that decoding counts where it happens."""

    def __init__(self) -> None:
        self.inboxes: dict[str, list[bytes]] = {}
        self.bytes_to: dict[str, int] = {}

    def transport(self, node_id: str) -> _End:
        self.inboxes[node_id] = []
        self.bytes_to[node_id] = 0
        return _End(self, node_id)


class _End:
    def __init__(self, wire: Wire, node_id: str) -> None:
        self._wire, self._node_id = wire, node_id

    def send(self, messages: Sequence[Message]) -> None:
        for message in messages:
            data = encode_message(message)
            self._wire.bytes_to[message.receiver] += len(data)
            self._wire.inboxes[message.receiver].append(data)

    def recv(self) -> Sequence[Message]:
        inbox = self._wire.inboxes[self._node_id]
        self._wire.inboxes[self._node_id] = []
        return [decode_message(data) for data in inbox]

    def close(self) -> None:
        return None


def run(spans: int = 131_072, moved: float = 1.0, ticks: int = TICKS) -> dict[str, object]:
    """Brings up `spans` spans on 8 captures, then times ticks in each of which a share `moved` of them has a new checkpoint."""
    wire, now = Wire(), [0.0]
    scheduler = new_scheduler(
        owner_id="owner",
        changefeed_id=CHANGEFEED,
        owner_revision=1,
        changefeed_epoch=1,
        transport=wire.transport("owner"),
        config=SchedulerConfig(),
        clock=lambda: now[0],
    )
    names = [f"capture{index}" for index in range(CAPTURES)]
    executors = {name: FakeTableExecutor(changefeed_epoch=1, record_calls=False) for name in names}
    agents = [
        new_agent(
            capture_id=name,
            changefeed_id=CHANGEFEED,
            changefeed_epoch=1,
            transport=wire.transport(name),
            executor=executors[name],
            liveness=Liveness(),
            clock=lambda: now[0],
        )
        for name in names
    ]
    alive = {name: CaptureInfo(name, f"{name}:1") for name in names}
    tables = np.arange(1, spans + 1, dtype=np.int64)
    barrier = BarrierWithMinTs(Barrier(TS_MAX), TS_MAX)
    checkpoint_ts, bring_up_ticks = 2**40, 0
    cpu_started = time.process_time()
    while True:
        scheduler.tick(checkpoint_ts, tables, alive, barrier)
        snapshot = scheduler.snapshot()
        if bring_up_ticks and len(snapshot.roles.rows) == spans and bool(snapshot.roles.steady.all()):
            break
        bring_up_ticks += 1
        for agent in agents:
            agent.tick()
        now[0] += 0.1
        if bring_up_ticks > 1_000:
            raise RuntimeError(f"{spans} spans were not up after {bring_up_ticks} ticks")
    bring_up_cpu_s = time.process_time() - cpu_started
    now[0] += 0.1
    scheduler.tick(checkpoint_ts, tables, alive, barrier)
    times = []
    owner_bytes = wire.bytes_to["owner"]
    for turn in range(ticks):
        ts = checkpoint_ts + 1000 * (turn + 1)
        for executor in executors.values():
            if moved >= 1:
                executor.advance(ts)
            else:
                held = executor.spans()
                for span in held[: int(len(held) * moved)]:
                    executor.advance(ts, span)
        for agent in agents:
            agent.tick()
        now[0] += 0.1
        started = time.perf_counter()
        watermark = scheduler.tick(checkpoint_ts, tables, alive, barrier)
        times.append(1000 * (time.perf_counter() - started))
        if moved >= 1 and turn and watermark.checkpoint_ts != ts:
            raise RuntimeError(f"the watermark is {watermark.checkpoint_ts}, not {ts}")
    changed = max(1, round(spans * moved)) * ticks
    return {
        "spans": spans,
        "captures": CAPTURES,
        "moved": moved,
        "tick_ms_p50": round(statistics.median(times), 2),
        "tick_ms_max": round(max(times), 2),
        "wire_bytes_per_changed_span": round((wire.bytes_to["owner"] - owner_bytes) / changed, 1),
        "bring_up_ticks": bring_up_ticks,
        "bring_up_cpu_s": round(bring_up_cpu_s, 2),
    }


if __name__ == "__main__":
    print(json.dumps({"steady_tick": run(int(sys.argv[1]) if len(sys.argv) > 1 else 131_072)}))
