"""A flood of calls costs its callers a refusal, the ticks and the tables nothing; a message too large is one clear error."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import grpc
import pytest

from deploy.local.node import ROOT, service_environment
from tablewire.wire.codec import EXCHANGE_METHOD, EXCHANGE_SERVICE
from tablewire.wire.limits import MAX_MESSAGE_BYTES
from tests.integration.test_health import ask
from tests.plugins.counter_world import WAIT_S, CounterWorld, install_plugin, now_ms

pytestmark = pytest.mark.integration

TABLES = (1, 2, 3, 4)
FLOOD_S = 8.0
TICKS_PER_S_MIN = 2.5
"""Ten without a flood; the machine is shared with the flooder."""
GAP_MS_MAX = 3_000
FLOODER = Path(__file__).with_name("flood_process.py")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CounterWorld]:
    """One owner, two processors that replicate four tables."""
    plugin = install_plugin(tmp_path_factory.mktemp("plugin"))
    world = CounterWorld(tmp_path_factory.mktemp("limits") / "world", plugin, processors=2)
    world.set_tables(*(f"public.t{number}" for number in TABLES))
    world.cluster.start()
    world.create()
    world.wait_steady(len(TABLES))
    world.wait_written(*TABLES)
    yield world
    world.close()


def ticks(world: CounterWorld) -> tuple[int, float]:
    """How many rounds of ticks there were, and the seconds that they took."""
    text = world.cluster.node("owner0").metrics()
    found = dict(re.findall(r"^tablewire_owner_tick_seconds_(count|sum) ([0-9.e+-]+)$", text, re.M))
    return int(float(found["count"])), float(found["sum"])


def flood(address: str, method: str, *kind: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(FLOODER), address, method, str(FLOOD_S), *kind]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=service_environment({}))


@pytest.mark.parametrize(
    ("target", "method", "kind"),
    [
        ("owner0", "/tablewire.v1.Admin/GetStatus", ()),
        ("owner0", "/tablewire.v1.Admin/ListTables", ("stream",)),
        ("processor0", f"/{EXCHANGE_SERVICE}/{EXCHANGE_METHOD}", ()),
    ],
    ids=["reads", "streams", "exchanges"],
)
def test_a_flood_delays_neither_ticks_nor_tables(world: CounterWorld, target: str, method: str, kind: tuple[str, ...]) -> None:
    """Thousands of calls a second: those beyond the limits are refused at once, the ticks and the tables go on, and when it is
    over everybody is answered again."""
    since = now_ms()
    count, took_s = ticks(world)
    process = flood(world.cluster.node(target).address, method, *kind)
    answers = json.loads(process.communicate(timeout=FLOOD_S + 60)[0])
    count_after, took_after_s = ticks(world)
    seconds, rounds = (now_ms() - since) / 1000, count_after - count
    print(f"{answers}; {rounds / seconds:.1f} ticks/s, {(took_after_s - took_s) / rounds * 1000:.1f} ms each")
    assert sum(answers.values()) > 1_000, answers
    assert answers.get("RESOURCE_EXHAUSTED", 0) > 0, answers
    assert answers.keys() <= {"OK", "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "CANCELLED", "DEADLINE_EXCEEDED"}, answers
    assert rounds / seconds > TICKS_PER_S_MIN
    world.wait_written(*TABLES)
    for table in TABLES:
        at = [since, *(write.at_ms for write in world.writes(table) if write.at_ms >= since)]
        assert max(after - before for before, after in itertools.pairwise(at)) < GAP_MS_MAX
    assert ask(world.cluster.node(target).http_address, "/healthz") == (200, "ok")
    world.wait_steady(len(TABLES))
    assert world.cluster.owner_json("status")["captures_by_state"] == {"ready": 2}
    world.audit(*TABLES)


@pytest.mark.parametrize(
    ("target", "method", "limit"),
    [
        ("owner0", "/tablewire.v1.Admin/CreateChangefeed", 1 << 20),
        ("processor0", f"/{EXCHANGE_SERVICE}/{EXCHANGE_METHOD}", MAX_MESSAGE_BYTES),
    ],
)
def test_a_message_too_large_is_one_clear_error(world: CounterWorld, target: str, method: str, limit: int) -> None:
    """Its code, its size and the limit; the next caller is answered, and nothing was taken in."""
    address = world.cluster.node(target).address
    before = world.cluster.admin.changefeeds()[0]["epoch"]
    with closing(grpc.insecure_channel(address, options=[("grpc.max_send_message_length", -1)])) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(method)(bytes(limit + 1), timeout=WAIT_S)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert re.search(rf"larger than max \({limit + 1} vs\. {limit}\)", caught.value.details())
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(method)(b"\xff", timeout=WAIT_S)
        assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL)
    assert [row["epoch"] for row in world.cluster.admin.changefeeds()] == [before]
