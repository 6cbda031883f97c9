"""What the etcd fault tests do to three real members, and what they watch meanwhile: the watermark, and who wrote which key."""

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
from tests.plugins.counter_world import WAIT_S, CounterWorld, now_ms

SAMPLE_INTERVAL_S = 0.05
PULSE_MS = 400
"""Of a slow disk: below etcd's election timeout of 1 s, above its heartbeat of 0.1 s."""


def gateway(member: EtcdServer, path: str, body: dict[str, Any], *, token: str = "") -> dict[str, Any]:
    """etcd's own JSON gateway; OSError when the member does not answer. token: of who asks."""
    host, port = member.endpoint.rsplit(":", 1)
    connection = http.client.HTTPConnection(host, int(port), timeout=5)
    with closing(connection):
        connection.request("POST", path, json.dumps(body), {"Authorization": token} if token else {})
        answer: dict[str, Any] = json.loads(connection.getresponse().read())
    return answer


def member_id(member: EtcdServer) -> str:
    return str(gateway(member, "/v3/maintenance/status", {})["header"]["member_id"])


def raft_leader(world: CounterWorld) -> EtcdServer:
    """The member that leads etcd itself, as soon as those that run agree on one."""
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
    """Forgets all history of etcd; the revision that is left."""
    member = world.cluster.etcd.members[0]
    key = base64.b64encode(b"/test/compact").decode()
    revision = int(gateway(member, "/v3/kv/put", {"key": key, "value": ""})["header"]["revision"])
    gateway(member, "/v3/kv/compaction", {"revision": str(revision), "physical": True})
    return revision


def key_revisions(world: CounterWorld) -> dict[str, int]:
    """Every key of etcd with the revision at which it was last written."""
    everything = base64.b64encode(b"\0").decode()
    answer = gateway(world.cluster.etcd.members[0], "/v3/kv/range", {"key": everything, "range_end": everything})
    return {base64.b64decode(pair["key"]).decode(): int(pair["mod_revision"]) for pair in answer.get("kvs", [])}


class Watched:
    """A cluster that must not notice what happens to etcd: within the block no table moves or gets
    a new writer, no writer has a long gap, the checkpoint never goes back and has moved on, and
    (unless allowed) neither leadership nor a registration is lost.

    gap_ms: the longest pause between two writes of a table."""

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
        """Of all tables, since the block began."""
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
    """Stops the member's process and lets it go on, again and again, while the tables are written all the time."""
    for _ in range(times):
        member.pause()
        try:
            world.wait_written(*tables, after_ms=now_ms() + pulse_ms)
        finally:
            member.resume()
        world.wait_written(*tables, after_ms=now_ms() + pulse_ms // 4)


def until_healthy(world: CounterWorld) -> Callable[[], bool]:
    return lambda: all(member.healthy() for member in world.cluster.etcd.members)
