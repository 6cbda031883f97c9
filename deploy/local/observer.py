"""Watches a cluster from outside while it runs: who leads, who writes what, how far it is, and what changed.

A thread of its own reads the admin API and the source's WAL position a few times a second. Each reading is a frozen `View`;
what changed since the last one is told as events (`on_event`, called on that thread). Standstill and lag are measured from the
readings, so they are no finer than the interval.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import psycopg

from deploy.local.admin import Admin, AdminError, Json

INTERVAL_S = 0.25
SLOW_EVERY = 4
"""Captures and tables are read at every fourth reading at least, and whenever the leader has changed."""
SAMPLES_MAX = 200_000


@dataclass(frozen=True, slots=True)
class View:
    """One reading. at: seconds of time.monotonic(). Nodes by name where known, else by id. answered False: nobody did."""

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
        return "-" if capture is None else self.captures.get(capture, capture)


@dataclass(slots=True)
class Measures:
    """What was measured while `measuring` was on. Seconds; bytes of WAL."""

    longest_standstill_s: float = 0.0
    lag_s_max: float = 0.0
    lag_bytes_max: int = 0
    lags_s: list[float] = field(default_factory=list)
    readings: int = 0
    went_back: int = 0
    """How often the checkpoint was below an earlier reading. It must never be."""

    @property
    def lag_s_median(self) -> float:
        return sorted(self.lags_s)[len(self.lags_s) // 2] if self.lags_s else 0.0


class Observer:
    """start, read `view` at any time, stop. names: address of an owner -> its node."""

    def __init__(
        self,
        admin_endpoints: list[str],
        source_uri: str,
        names: Mapping[str, str],
        on_event: Callable[[str], None],
    ) -> None:
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
        """Why it has stopped by itself: the source does not answer."""
        self._writers: dict[int, str] = {}
        self._measuring_since = 0.0
        self._moved_at = 0.0
        self._checkpoint = 0
        self._positions: tuple[list[int], list[float]] = ([], [])  # source_ts ascending, when it was first read

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Idempotent; returns when the thread has ended."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(30)

    def measure(self, on: bool) -> None:
        """Standstill and lag are measured from now on, or not any more."""
        now = time.monotonic()
        if on:
            self._moved_at = now
            self._measuring_since = now
        else:
            self._note_standstill(now)
            self._measuring_since = 0.0

    def _run(self) -> None:
        admin = Admin(self._endpoints)
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
            self.error = f"the source does not answer: {error}"
        finally:
            admin.close()

    def _read(self, admin: Admin, source: psycopg.Connection[tuple[int]], before: View, *, fully: bool) -> View:
        row = source.execute("SELECT (pg_current_wal_lsn() - '0/0')::bigint").fetchone()
        source_ts = int(row[0]) if row is not None else 0
        try:
            status = admin.status()
            leader = status["leader"]
            if leader is None:
                raise AdminError("nobody leads")
            revision = status["leader_revision"] or 0
            changefeeds = admin.changefeeds()
            fully = fully or not before.answered or revision != before.leader_revision
            captures = admin.captures() if fully else []
            tables = admin.tables(changefeeds[0]["changefeed"]) if changefeeds and changefeeds[0]["running"] else []
        except AdminError:
            return View(
                time.monotonic(), False, None, before.leader_revision, before.captures, before.capture_states, before.tables,
                before.changefeed, source_ts,
            )  # fmt: skip
        names, states = dict(before.captures), before.capture_states
        if fully:
            states = {row["id"]: row["state"] for row in captures}
            names |= {row["id"]: row["labels"].get("node", row["id"]) for row in captures}
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
        self._remember(view)
        if not self._measuring_since or view.changefeed is None or not view.answered:
            return
        measures = self.measures
        checkpoint = int(view.changefeed["checkpoint_ts"])
        measures.readings += 1
        if checkpoint > self._checkpoint:
            self._note_standstill(view.at)
            self._moved_at = view.at
            self._checkpoint = checkpoint
        elif 0 < checkpoint < self._checkpoint:
            measures.went_back += 1
        measures.lag_bytes_max = max(measures.lag_bytes_max, view.source_ts - checkpoint if checkpoint else 0)
        lag_s = self._lag_s(checkpoint, view.at)
        measures.lag_s_max = max(measures.lag_s_max, lag_s)
        if len(measures.lags_s) < SAMPLES_MAX:
            measures.lags_s.append(lag_s)

    def _note_standstill(self, now: float) -> None:
        if self._measuring_since:
            self.measures.longest_standstill_s = max(self.measures.longest_standstill_s, now - self._moved_at)

    def _remember(self, view: View) -> None:
        positions, times = self._positions
        if (not positions or view.source_ts > positions[-1]) and len(positions) < SAMPLES_MAX:
            positions.append(view.source_ts)
            times.append(view.at)

    def _lag_s(self, checkpoint: int, now: float) -> float:
        """How long ago the source was where the checkpoint is now: the age of the first position beyond it."""
        positions, times = self._positions
        index = bisect_right(positions, checkpoint)
        return now - times[index] if index < len(times) else 0.0


def changes(before: View, after: View, writers: dict[int, str]) -> list[str]:
    """What happened between two readings, a sentence each. writers: table -> who was last told to write it; kept up to date
    here, so that a new owner, which learns all writers anew, is no news."""
    events: list[str] = []
    if before.answered and not after.answered:
        events.append("no owner leads")
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
