"""Observe a running cluster from outside: the leader, the processor of each table, the checkpoint,
and what changes.

A thread reads the admin API and the source's WAL position several times per second. Each reading is
a frozen `View`; changes since the last one become events (`on_event`, called on that thread).
Standstill and lag are measured from the readings, so their resolution is the interval.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from statistics import median

import psycopg

from deploy.local.admin import Admin, AdminError, Json
from deploy.local.workload import end_of_wal

INTERVAL_S = 0.25
TIMEOUT_S = 1.0
"""A reading that takes longer counts as without a leader."""
SLOW_EVERY = 4
"""The captures are read with every fourth reading, and when the leader has changed."""
SAMPLES_MAX = 200_000


@dataclass(frozen=True, slots=True)
class View:
    """One reading. at: time.monotonic(). answered False: no leader was reachable, and values are old."""

    at: float
    answered: bool = False
    leader: str | None = None
    leader_revision: int = 0
    captures: Mapping[str, str] = field(default_factory=dict)  # capture id -> node
    capture_states: Mapping[str, str] = field(default_factory=dict)
    tables: tuple[Json, ...] = ()
    changefeed: Json | None = None
    source_ts: int = 0

    def node_of(self, capture: str | None) -> str:
        """Return the name of a processor, or its capture id if the name is not known."""
        return "-" if capture is None else self.captures.get(capture, capture)


@dataclass(slots=True)
class Measures:
    """The measurements between `measure(True)` and `measure(False)`, in seconds and bytes of WAL."""

    longest_standstill_s: float = 0.0
    lag_s_max: float = 0.0
    lag_bytes_max: int = 0
    lags_s: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES_MAX))
    readings: int = 0
    went_back: int = 0
    """How often the checkpoint was below an earlier reading, which must never happen."""

    @property
    def lag_s_median(self) -> float:
        return median(self.lags_s) if self.lags_s else 0.0


class Observer:
    """An observer: `start` it, read `view` at any time, `stop` it."""

    def __init__(
        self,
        admin_endpoints: list[str],
        source_uri: str,
        names: Mapping[str, str],
        on_event: Callable[[str], None],
    ) -> None:
        """Prepare the observer. names: address of an owner -> its node."""
        self._endpoints = admin_endpoints
        self._source_uri = source_uri
        self._names = dict(names)
        self._on_event = on_event
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)
        self.view = View(time.monotonic())
        self.measures = Measures()
        self.events = 0
        self.error = ""
        """Why it has stopped by itself: the source is unreachable."""
        self._writers: dict[int, str] = {}
        self._measuring = False
        self._moved_at = 0.0
        self._checkpoint = 0
        self._ahead: deque[tuple[int, float]] = deque(maxlen=SAMPLES_MAX)
        """Positions of the source beyond the checkpoint: (source_ts, when it was first read)."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and wait for its end. Idempotent."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(30)

    def measure(self, on: bool) -> None:
        """Begin or end the measurement of standstill and lag."""
        self._moved_at = time.monotonic()
        self._measuring = on

    def _run(self) -> None:
        admin = Admin(self._endpoints, timeout_s=TIMEOUT_S)
        number = 0
        try:
            with psycopg.connect(self._source_uri, autocommit=True, connect_timeout=5) as source:
                while not self._stopping.wait(INTERVAL_S):
                    before = self.view
                    self.view = self._read(admin, source, before, fully=number % SLOW_EVERY == 0)
                    number += 1
                    self._measure(self.view)
                    for event in changes(before, self.view, self._writers):
                        self.events += 1
                        self._on_event(event)
        except psycopg.Error as error:
            self.error = f"the source is unreachable: {error}"
        finally:
            admin.close()

    def _read(self, admin: Admin, source: psycopg.Connection[tuple[int]], before: View, *, fully: bool) -> View:
        source_ts = end_of_wal(source)
        try:
            status = admin.status()
            leader = status["leader"]
            if leader is None:
                raise AdminError("there is no leader")
            revision = status["leader_revision"] or 0
            changefeeds = admin.changefeeds()
            names, states = dict(before.captures), before.capture_states
            if fully or not before.answered or revision != before.leader_revision:
                captures = admin.captures()
                states = {row["id"]: row["state"] for row in captures}
                names |= {row["id"]: row["labels"].get("node", row["id"]) for row in captures}
            tables = admin.tables(changefeeds[0]["changefeed"]) if changefeeds and changefeeds[0]["running"] else []
        except AdminError:
            return replace(before, at=time.monotonic(), answered=False, leader=None, source_ts=source_ts)
        return View(
            at=time.monotonic(),
            answered=True,
            leader=self._names.get(leader["address"], leader["id"]),
            leader_revision=revision,
            captures=names,
            capture_states=states,
            tables=tuple(tables),
            changefeed=changefeeds[0] if changefeeds else None,
            source_ts=source_ts,
        )

    def _measure(self, view: View) -> None:
        if not self._ahead or view.source_ts > self._ahead[-1][0]:
            self._ahead.append((view.source_ts, view.at))
        if view.changefeed is None or not view.answered:
            return
        measures, checkpoint = self.measures, int(view.changefeed["checkpoint_ts"])
        while self._ahead and self._ahead[0][0] <= checkpoint:
            self._ahead.popleft()
        if not self._measuring:
            return
        measures.readings += 1
        measures.longest_standstill_s = max(measures.longest_standstill_s, view.at - self._moved_at)
        measures.went_back += 0 < checkpoint < self._checkpoint
        if checkpoint > self._checkpoint:
            self._moved_at, self._checkpoint = view.at, checkpoint
        lag_s = view.at - self._ahead[0][1] if self._ahead else 0.0
        measures.lags_s.append(lag_s)
        measures.lag_s_max = max(measures.lag_s_max, lag_s)
        measures.lag_bytes_max = max(measures.lag_bytes_max, view.source_ts - checkpoint if checkpoint else 0)


def changes(before: View, after: View, writers: dict[int, str]) -> list[str]:
    """Return what happened between two readings, one sentence each.

    writers: table -> the capture that was last seen replicating it. It is updated here, so that a
    new owner, which learns the writers again, is not reported as a change of all of them.
    """
    events: list[str] = []
    if before.answered and not after.answered:
        events.append("there is no leader")
    if after.answered and after.leader_revision != before.leader_revision:
        events.append(f"{after.leader} leads (election {after.leader_revision})")
    for capture, state in after.capture_states.items():
        if capture not in before.capture_states:
            events.append(f"{after.node_of(capture)} joined as {capture}")
        elif state == "silent" and before.capture_states[capture] != "silent":
            events.append(f"{after.node_of(capture)} is silent")
    events += [f"{after.node_of(capture)} is gone" for capture in before.capture_states if capture not in after.capture_states]
    if after.changefeed is not None:
        state, error = after.changefeed["state"], after.changefeed["error"]
        if before.changefeed is None or before.changefeed["state"] != state:
            events.append(f"changefeed {after.changefeed['changefeed']} is {state}{f': {error}' if error else ''}")
    return events + _table_changes(before, after, writers)


def _table_changes(before: View, after: View, writers: dict[int, str]) -> list[str]:
    errors = {row["table_id"]: row["error"] for row in before.tables}
    events = [
        f"{row['table']}: {row['error']}" for row in after.tables if row["error"] and errors.get(row["table_id"]) != row["error"]
    ]
    started: dict[str, list[str]] = {}
    for row in after.tables:
        writer = row["primary"]
        if writer is not None and row["state"] == "replicating" and writers.get(row["table_id"]) != writer:
            writers[row["table_id"]] = writer
            started.setdefault(after.node_of(writer), []).append(str(row["table"] or row["table_id"]))
    return events + [f"{node} replicates {', '.join(sorted(names))}" for node, names in sorted(started.items())]
