"""A scheduler and eight agents on the wire's bytes, for the benchmarks of the core.

`Scheduler.tick` is measured with its receive and decode, on reports that went through the wire's bytes; not the agents that made
them. `python -m tests.bench.bench_tick [SPANS]` prints the steady tick as one JSON object; tests/bench/core.py measures the rest.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence

import numpy as np

from owner.core.scheduler_config import SchedulerConfig
from owner.scheduling.scheduler import new_scheduler
from processor.agent.agent import new_agent
from tablewire.model.ids import TS_MAX, CaptureInfo, ChangefeedID
from tablewire.model.liveness import Liveness
from tablewire.model.messages import Message
from tablewire.model.progress import Barrier, BarrierWithMinTs, Watermark
from tablewire.testing import FakeTableExecutor
from tablewire.wire.codec import decode_message, encode_message

CAPTURES = 8
TICKS = 30
TICK_S = 0.1
START_TS = 2**40
CHANGEFEED = ChangefeedID("default", "bench")
NO_BARRIER = BarrierWithMinTs(Barrier(TS_MAX), TS_MAX)


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


class Bench:
    """`spans` spans, brought up on 8 captures. bring_up_ticks, bring_up_cpu_s (owner and agents together): what it took."""

    def __init__(self, spans: int) -> None:
        self.spans = spans
        self.wire = Wire()
        self.now = 0.0
        self.ts = START_TS
        self.scheduler = new_scheduler(
            owner_id="owner",
            changefeed_id=CHANGEFEED,
            owner_revision=1,
            changefeed_epoch=1,
            transport=self.wire.transport("owner"),
            config=SchedulerConfig(),
            clock=lambda: self.now,
        )
        self.names = [f"capture{index}" for index in range(CAPTURES)]
        self.executors = {name: FakeTableExecutor(changefeed_epoch=1, record_calls=False) for name in self.names}
        self.agents = [
            new_agent(
                capture_id=name,
                changefeed_id=CHANGEFEED,
                changefeed_epoch=1,
                transport=self.wire.transport(name),
                executor=self.executors[name],
                liveness=Liveness(),
                clock=lambda: self.now,
            )
            for name in self.names
        ]
        self._alive = {name: CaptureInfo(name, f"{name}:1") for name in self.names}
        self._tables = np.arange(1, spans + 1, dtype=np.int64)
        self._tables.flags.writeable = False
        started = time.process_time()
        self.bring_up_ticks = self._bring_up()
        self.bring_up_cpu_s = time.process_time() - started

    def _bring_up(self) -> int:
        for ticks in range(1, 1_000):
            self.tick()
            roles = self.scheduler.snapshot().roles
            if len(roles.rows) == self.spans and bool(roles.steady.all()):
                return ticks
            self.answer()
        raise RuntimeError(f"{self.spans} spans were not up after {ticks} ticks")

    def tick(self) -> Watermark:
        self.now += TICK_S
        return self.scheduler.tick(START_TS, self._tables, self._alive, NO_BARRIER)

    def answer(self) -> None:
        for agent in self.agents:
            agent.tick()

    def move(self, share: float, random: np.random.Generator) -> None:
        """A share of all spans, drawn at random, has a new checkpoint."""
        self.ts += 1000
        for executor in self.executors.values():
            if share >= 1:
                executor.advance(self.ts)
                continue
            held = executor.spans()
            for position in random.choice(len(held), round(len(held) * share), replace=False).tolist():
                executor.advance(self.ts, held[position])

    def steady_ticks(self, share: float = 1.0, ticks: int = TICKS) -> dict[str, float]:
        """Times ticks in each of which this share of the spans has moved; and counts the bytes that the owner received."""
        random = np.random.default_rng(7)
        self.answer()
        self.tick()
        times, received = [], self.wire.bytes_to["owner"]
        for _ in range(ticks):
            self.move(share, random)
            self.answer()
            started = time.perf_counter()
            watermark = self.tick()
            times.append(1000 * (time.perf_counter() - started))
            if share >= 1 and watermark.checkpoint_ts != self.ts:
                raise RuntimeError(f"the watermark is {watermark.checkpoint_ts}, not {self.ts}")
        changed = max(1, round(self.spans * share)) * ticks
        return {
            "tick_ms_p50": round(statistics.median(times), 2),
            "tick_ms_max": round(max(times), 2),
            "wire_bytes_per_changed_span": round((self.wire.bytes_to["owner"] - received) / changed, 2),
        }


def run(spans: int = 131_072, moved: float = 1.0, ticks: int = TICKS) -> dict[str, object]:
    """The steady tick at this size, as a part of `make bench`."""
    bench = Bench(spans)
    return {
        "spans": spans,
        "captures": CAPTURES,
        "moved": moved,
        **bench.steady_ticks(moved, ticks),
        "bring_up_ticks": bench.bring_up_ticks,
        "bring_up_cpu_s": round(bench.bring_up_cpu_s, 2),
    }


if __name__ == "__main__":
    print(json.dumps({"steady_tick": run(int(sys.argv[1]) if len(sys.argv) > 1 else 131_072)}))
