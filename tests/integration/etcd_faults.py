"""Helpers of the etcd fault tests: faults of three real members, and checks of the watermark and of
the written keys.
"""

from __future__ import annotations

import base64
import http.client
import itertools
import json
import threading
from collections.abc import Callable
from contextlib import closing
from types import TracebackType
from typing import Any

from deploy.local.admin import Admin, AdminError
from deploy.local.etcd import EtcdServer
from deploy.local.process import wait_until
from tablewire.runtime.addresses import parse_address
from tests.plugins.counter_world import WAIT_S, CounterWorld, now_ms

SAMPLE_INTERVAL_S = 0.05
PULSE_MS = 400
"""Of a slow disk: below etcd's election timeout of 1 s, above its heartbeat of 0.1 s."""


def gateway(member: EtcdServer, path: str, body: dict[str, Any], *, token: str = "") -> dict[str, Any]:
    """Call etcd's JSON gateway; raise OSError if the member does not answer.

    token: of the calling user.
    """
    connection = http.client.HTTPConnection(*parse_address(member.endpoint), timeout=5)
    with closing(connection):
        connection.request("POST", path, json.dumps(body), {"Authorization": token} if token else {})
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
    return answer


def member_id(member: EtcdServer) -> str:
    return str(gateway(member, "/v3/maintenance/status", {})["header"]["member_id"])


def raft_leader(world: CounterWorld) -> EtcdServer:
    """Return the member that leads etcd, as soon as all running members agree."""
    found: list[EtcdServer] = []

    def agreed() -> bool:
        running = [member for member in world.cluster.etcd.members if member.running]
        try:
            leaders = {gateway(member, "/v3/maintenance/status", {}).get("leader", "0") for member in running}
            found[:] = [member for member in running if {member_id(member)} == leaders]
        except (OSError, http.client.HTTPException, ValueError, KeyError):
            return False
        return bool(found)

    wait_until("the members of etcd agree on their leader", agreed, WAIT_S)
    return found[0]


def compact(world: CounterWorld) -> int:
    """Compact the whole history of etcd; return the remaining revision."""
    member = world.cluster.etcd.members[0]
    key = base64.b64encode(b"/test/compact").decode()
    revision = int(gateway(member, "/v3/kv/put", {"key": key, "value": ""})["header"]["revision"])
    gateway(member, "/v3/kv/compaction", {"revision": str(revision), "physical": True})
    return revision


def key_revisions(world: CounterWorld) -> dict[str, int]:
    """Return every key of etcd with its mod revision."""
    everything = base64.b64encode(b"\0").decode()
    answer = gateway(world.cluster.etcd.members[0], "/v3/kv/range", {"key": everything, "range_end": everything})
    return {base64.b64decode(pair["key"]).decode(): int(pair["mod_revision"]) for pair in answer.get("kvs", [])}


class Watched:
    """A block in which faults of etcd must have no effect on the cluster.

    No table moves or gets a new writer, no writer pauses for longer than gap_ms, the checkpoint
    grows and never moves backwards, and (unless allowed) neither leadership nor a registration is
    lost.
    """

    def __init__(self, world: CounterWorld, tables: tuple[int, ...], *, gap_ms: int, same_leader: bool = True) -> None:
        self._world, self._tables, self._gap_ms, self._same_leader = world, tables, gap_ms, same_leader
        self._stop = threading.Event()
        self._seen: list[int] = []
        self._thread = threading.Thread(target=self._sample, name="watermark", daemon=True)

    def __enter__(self) -> Watched:
        world = self._world
        self._leader = world.cluster.wait_for_leader()
        self._revision = world.cluster.admin.status()["leader_revision"]
        self._primaries = world.primaries()
        self._fences = {table: world.writes(table)[-1].fence for table in self._tables}
        self._since = now_ms()
        self._thread.start()
        wait_until("the watermark is seen", lambda: bool(self._seen), WAIT_S)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        world = self._world
        if kind is None:
            world.wait_written(*self._tables)
            world.wait_steady(len(self._tables))
            reached = self._seen[-1]
            wait_until("the checkpoint moves on", lambda: self._seen[-1] > max(reached, self._since), WAIT_S)
        self._stop.set()
        self._thread.join(WAIT_S)
        if kind is not None:
            return
        assert self._seen == sorted(self._seen), "the watermark went back"
        assert world.primaries() == self._primaries
        assert {table: world.writes(table)[-1].fence for table in self._tables} == self._fences
        assert self.longest_gap_ms() < self._gap_ms
        if self._same_leader:
            assert world.cluster.leader() == self._leader
            assert world.cluster.admin.status()["leader_revision"] == self._revision
        for node in world.cluster.processors:
            assert "registration_lost" not in world.log(node)
        world.audit(*self._tables)

    def longest_gap_ms(self) -> int:
        """Return the longest gap of all tables since the block began."""
        longest = 0
        for table in self._tables:
            at = [self._since, *(write.at_ms for write in self._world.writes(table) if write.at_ms >= self._since)]
            longest = max([longest, *(after - before for before, after in itertools.pairwise(at))])
        return longest

    def _sample(self) -> None:
        cluster = self._world.cluster
        with closing(Admin([cluster.nodes[name].address for name in cluster.owners])) as admin:
            while not self._stop.wait(SAMPLE_INTERVAL_S):
                try:
                    checkpoint_ts = admin.changefeed("one")["checkpoint_ts"]
                except AdminError:
                    continue
                self._seen.append(checkpoint_ts)


def pulse(world: CounterWorld, member: EtcdServer, times: int, tables: tuple[int, ...], pulse_ms: int = PULSE_MS) -> None:
    """Pause and resume the member's process repeatedly, while the tables are written all the time."""
    for _ in range(times):
        member.pause()
        try:
            world.wait_written(*tables, after_ms=now_ms() + pulse_ms)
        finally:
            member.resume()
        world.wait_written(*tables, after_ms=now_ms() + pulse_ms // 4)


def until_healthy(world: CounterWorld) -> Callable[[], bool]:
    return lambda: all(member.healthy() for member in world.cluster.etcd.members)
