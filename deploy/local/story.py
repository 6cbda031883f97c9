"""The acts of the demo on a running cluster: a planned move, a kill of the leader, a kill of a
processor.

Each act checks its outcome by reading the cluster again, and raises StoryError when it is not as
announced.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from deploy.local.admin import Json
from deploy.local.cluster import CliError, Cluster
from deploy.local.report import LEADER, PROCESSOR, Kill, Report, TableMove

TAKEOVER_TIMEOUT_S = 60.0
MOVE_TIMEOUT_S = 30.0


class StoryError(Exception):
    """An announced act did not happen."""


class Acts:
    """Performs the acts one after the other, from one thread, and adds their outcome to the report."""

    def __init__(self, cluster: Cluster, report: Report, say: Callable[[str], None], tables: int) -> None:
        """Prepare the acts. tables: how many tables must replicate after each act."""
        self._cluster = cluster
        self._report = report
        self._say = say
        self._tables = tables

    def move_a_table(self) -> None:
        """Move a table from the processor with most tables to the one with fewest, with the CLI."""
        captures, held = self._held()
        if len(held) < 2:
            raise StoryError(f"a move needs two processors, there is {', '.join(held) or 'none'}")
        origin = self._busiest(held)
        target = min((node for node in held if node != origin), key=lambda node: (len(held[node]), node))
        table = held[origin][0]["table"]
        self._say(f"moving {table} from {origin} to {target}: owner table move {table} --to {captures[target]}")
        begin = time.monotonic()
        try:
            job = self._cluster.owner_json("table", "move", table, "--to", captures[target], "--wait")
        except CliError as error:
            raise StoryError(f"the move of {table} was not done: {error}") from None
        seconds = time.monotonic() - begin
        self._cluster.wait(
            f"{table} is replicated by {target}",
            lambda: any(row["table"] == table and row["primary"] == captures[target] for row in self._cluster.admin.tables()),
            MOVE_TIMEOUT_S,
        )
        self._report.moves.append(TableMove(table, origin, target, round(seconds, 3)))
        self._say(f"moved {table} to {target}: {job['state']} in {seconds:.2f} s, including the start of the CLI")

    def kill_the_leader(self) -> None:
        """Kill the leader; the other owner must win a newer election and have all tables scheduled."""
        leader = self._cluster.wait_for_leader()
        revision = self._cluster.admin.status()["leader_revision"]
        self._say(f"killing the leading owner, {leader}, with SIGKILL")
        begin = time.monotonic()
        self._kill(leader)
        successor = self._cluster.wait_for_leader(other_than=leader, timeout_s=TAKEOVER_TIMEOUT_S)
        self._cluster.wait(
            f"{successor} has scheduled all tables",
            lambda: self._cluster.admin.changefeed()["initialized"] and len(self._replicating()) >= self._tables,
            TAKEOVER_TIMEOUT_S,
        )
        seconds = time.monotonic() - begin
        if self._cluster.admin.status()["leader_revision"] <= revision:
            raise StoryError(f"{successor} leads without a newer election")
        self._report.kills.append(Kill(leader, LEADER, round(seconds, 3), [successor]))
        self._say(f"{successor} has taken over after {seconds:.2f} s")

    def kill_a_processor(self) -> None:
        """Kill the processor with most tables; other processors must replicate them."""
        captures, held = self._held()
        victim = self._busiest(held)
        names = sorted(row["table"] for row in held[victim])
        self._say(f"killing {victim}, which replicates {', '.join(names)}, with SIGKILL")
        begin = time.monotonic()
        self._kill(victim)

        def taken_over() -> bool:
            now = self._replicating()
            return len(now) >= self._tables and all(row["primary"] != captures[victim] for row in now)

        self._cluster.wait(f"other processors replicate the tables of {victim}", taken_over, TAKEOVER_TIMEOUT_S)
        seconds = time.monotonic() - begin
        nodes = {capture: node for node, capture in captures.items()}
        takers = sorted({str(nodes.get(row["primary"])) for row in self._replicating() if row["table"] in names})
        self._report.kills.append(Kill(victim, PROCESSOR, round(seconds, 3), takers, names))
        self._say(f"{', '.join(takers)} took over its {len(names)} tables after {seconds:.2f} s")

    def _kill(self, node: str) -> None:
        process = self._cluster.node(node).process
        if not process.running:
            raise StoryError(f"{node} had ended by itself (exit code {process.exit_code}) before it was killed")
        process.kill()
        if process.exit_code != -signal.SIGKILL:
            raise StoryError(f"{node} ended with exit code {process.exit_code}, not by SIGKILL")

    def _replicating(self) -> list[Json]:
        return [row for row in self._cluster.admin.tables() if row["state"] == "replicating" and row["primary"]]

    def _held(self) -> tuple[dict[str, str], dict[str, list[Json]]]:
        """Return processor -> its capture id, and processor -> the tables that it replicates."""
        captures, rows = self._cluster.captures(), self._replicating()
        return captures, {node: [row for row in rows if row["primary"] == capture] for node, capture in captures.items()}

    def _busiest(self, held: dict[str, list[Json]]) -> str:
        busiest = max(held, key=lambda node: (len(held[node]), node), default="")
        if not busiest or not held[busiest]:
            raise StoryError("no processor replicates a table")
        return busiest
