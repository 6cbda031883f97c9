"""The acts of the demo on a running cluster: a planned move, the leader killed, a processor killed. Each says what it saw.

An act that does not come out as announced raises StoryError; nothing here believes an answer without looking again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from deploy.local.admin import Json
from deploy.local.cluster import CliError, Cluster
from deploy.local.observer import Observer

TAKEOVER_TIMEOUT_S = 60.0
MOVE_TIMEOUT_S = 30.0
SIGKILLED = -9


class StoryError(Exception):
    """Something that was announced did not happen."""


@dataclass(frozen=True, slots=True)
class Move:
    table: str
    origin: str
    target: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Kill:
    """seconds: until the successor had scheduled, or all tables were replicating on others."""

    node: str
    role: str
    seconds: float
    by: list[str]
    tables: list[str] = field(default_factory=list)
    signal: str = "SIGKILL"


@dataclass(slots=True)
class Story:
    """What happened so far."""

    moves: list[Move] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {"moves": [asdict(move) for move in self.moves], "kills": [asdict(kill) for kill in self.kills]}


class Acts:
    """Runs the acts one after the other, from one thread."""

    def __init__(self, cluster: Cluster, observer: Observer, say: Callable[[str], None], tables: int) -> None:
        self._cluster = cluster
        self._observer = observer
        self._say = say
        self._tables = tables
        self.story = Story()

    def move_a_table(self) -> None:
        """From the processor with most tables to the one with fewest, by the CLI."""
        rows = self._replicating()
        captures = self._cluster.captures()
        held = {node: [row for row in rows if row["primary"] == capture] for node, capture in captures.items()}
        if len(held) < 2:
            raise StoryError(f"a move needs two processors, there is {', '.join(held) or 'none'}")
        origin = max(held, key=lambda node: (len(held[node]), node))
        target = min((node for node in held if node != origin), key=lambda node: (len(held[node]), node))
        if not held[origin]:
            raise StoryError("no processor replicates anything")
        row = held[origin][0]
        self._say(f"moving {row['table']} from {origin} to {target}: owner table move {row['table']} --to {captures[target]}")
        begin = time.monotonic()
        try:
            job = self._cluster.owner_json("table", "move", row["table"], "--to", captures[target], "--wait")
        except CliError as error:
            raise StoryError(f"the move of {row['table']} was not done: {error}") from None
        seconds = time.monotonic() - begin
        self._cluster.wait(
            f"{row['table']} is replicated by {target}",
            lambda: self._row(row["table_id"])["primary"] == captures[target],
            MOVE_TIMEOUT_S,
        )
        self.story.moves.append(Move(row["table"], origin, target, round(seconds, 3)))
        self._say(f"moved {row['table']} to {target}: {job['state']} in {seconds:.2f} s, the CLI's start included")

    def kill_the_leader(self) -> None:
        """SIGKILL; the other owner must lead under a newer election and have all tables scheduled."""
        leader = self._cluster.wait_for_leader()
        revision = self._cluster.admin.status()["leader_revision"]
        self._say(f"killing the leading owner, {leader}, with SIGKILL")
        begin = time.monotonic()
        self._kill(leader)
        successor = self._cluster.wait_for_leader(other_than=leader, timeout_s=TAKEOVER_TIMEOUT_S)
        self._cluster.wait(
            f"{successor} has scheduled everything",
            lambda: self._cluster.admin.changefeed()["initialized"] and len(self._replicating()) >= self._tables,
            TAKEOVER_TIMEOUT_S,
        )
        seconds = time.monotonic() - begin
        if self._cluster.admin.status()["leader_revision"] <= revision:
            raise StoryError(f"{successor} leads without a newer election")
        self.story.kills.append(Kill(leader, "leading owner", round(seconds, 3), [successor]))
        self._say(f"{successor} has taken over after {seconds:.2f} s")

    def kill_a_processor(self) -> None:
        """SIGKILL of the processor with most tables; they must go on elsewhere."""
        captures = self._cluster.captures()
        rows = self._replicating()
        held = {node: [row for row in rows if row["primary"] == capture] for node, capture in captures.items()}
        victim = max(held, key=lambda node: (len(held[node]), node), default="")
        if not victim or not held[victim]:
            raise StoryError("no processor replicates anything")
        names = sorted(row["table"] for row in held[victim])
        ids = {row["table_id"] for row in held[victim]}
        self._say(f"killing {victim}, which replicates {', '.join(names)}, with SIGKILL")
        begin = time.monotonic()
        self._kill(victim)

        def elsewhere() -> bool:
            now = self._replicating()
            return len(now) >= self._tables and all(row["primary"] != captures[victim] for row in now)

        self._cluster.wait(f"the tables of {victim} are replicated elsewhere", elsewhere, TAKEOVER_TIMEOUT_S)
        seconds = time.monotonic() - begin
        nodes = {capture: node for node, capture in captures.items()}
        takers = sorted({str(nodes.get(row["primary"])) for row in self._replicating() if row["table_id"] in ids})
        self.story.kills.append(Kill(victim, "processor", round(seconds, 3), takers, names))
        self._say(f"its {len(names)} tables go on at {', '.join(takers)} after {seconds:.2f} s")

    def _kill(self, node: str) -> None:
        process = self._cluster.node(node).process
        if not process.running:
            raise StoryError(f"{node} had ended by itself (exit code {process.exit_code}) before it was killed")
        process.kill()
        if process.exit_code != SIGKILLED:
            raise StoryError(f"{node} ended with exit code {process.exit_code}, not by SIGKILL")

    def _replicating(self) -> list[Json]:
        return [row for row in self._cluster.admin.tables() if row["state"] == "replicating" and row["primary"]]

    def _row(self, table_id: int) -> Json:
        return next(row for row in self._cluster.admin.tables() if row["table_id"] == table_id)
