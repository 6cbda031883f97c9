"""Plays a transcript: a script of commands with the full output of each, readable as a story.

A line that starts with "> " is a command, and the indented lines after it are its output; all other
lines are comments. `play` returns the same text with the present output. A test compares the two,
and `python -m tests.transcripts.player --rewrite` writes it back.

Dispatches and reports are shown as they are sent (heartbeats and acknowledgements are not), then
the effects on the spans and the watermark. Time is virtual: a tick is 100 ms, and every agent ticks
after the owner.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from owner.core.scheduler_config import SchedulerConfig
from tablewire.model.messages import DispatchTableRequest, DispatchTableResponse, HeartbeatResponse, Message
from tablewire.model.queries import Query
from tablewire.model.spans import Span
from tablewire.model.splitter import HashRanges
from tablewire.model.states import DispatchAction, TableState
from tablewire.testing import Deliver
from tests.owner.world import World

FOLDER = Path(__file__).parent
_ACTIONS = {
    DispatchAction.ADD_PREPARE: "AddTable(prepare)",
    DispatchAction.ADD_WRITE: "AddTable(write)",
    DispatchAction.REMOVE: "RemoveTable",
}


class Player:
    """One transcript. Commands are methods called `do_...`; each takes the words after its name."""

    def __init__(self) -> None:
        self.world = World(captures=[], tables=[])
        self.lines: list[str] = []
        self.fates: dict[tuple[str, str], Deliver] = {}
        self.held_links: set[tuple[str, str]] = set()
        self.owner = "owner"
        self.shown: dict[Span, str] = {}
        self.watermark = self.world.watermark
        self.queries: list[tuple[str, Query]] = []
        self.query_shown: dict[str, str] = {}
        self.world.network.hook = self._hook

    def run(self, command: str) -> list[str]:
        name, *words = command.split()
        self.lines = []
        method: Callable[..., None] = getattr(self, "do_" + name.replace("-", "_"))
        method(*words)
        return self.lines

    # -- commands -----------------------------------------------------------------------------------------------------

    def do_captures(self, *names: str) -> None:
        for name in names:
            self.world.join(name)

    def do_tables(self, *tables: str) -> None:
        self.world.tables = [int(table) for table in tables]

    def do_split(self, parts: str) -> None:
        """Split each table into this number of spans, from the next owner on."""
        self.world.splitter = HashRanges(int(parts))

    def do_bootstrap_timeout(self, milliseconds: str) -> None:
        """Set the bootstrap timeout, from the next owner on."""
        self.world.config = SchedulerConfig(bootstrap_timeout_ms=int(milliseconds))

    def do_tick(self, count: str = "1") -> None:
        for _ in range(int(count)):
            self.lines.append("-- tick")
            self.world.step()
            self._show()
            if self.lines[-1] == "-- tick":
                self.lines.pop()
        if not self.lines:
            self.lines.append("nothing")

    def do_quietly(self, count: str) -> None:
        """Run ticks, and show the result only."""
        for _ in range(int(count)):
            self.world.step()
        self.lines.clear()
        self._show()

    def do_settle(self) -> None:
        self.world.step()
        for _ in range(100):
            if len(self.world.snapshot.spans) >= len(self.world.tables) and self.world.steady():
                break
            self.world.step()
        self.lines.clear()
        self._show()

    def do_advance(self, ts: str) -> None:
        self.world.advance(int(ts))

    def do_move(self, table: str, _to: str, target: str) -> None:
        self._query(f"move {table} -> {target}", self.world.scheduler.move_table(int(table), target))

    def do_cancel(self) -> None:
        self.queries[-1][1].cancel()

    def do_drain(self, target: str) -> None:
        self.lines.append(f"left: {self.world.scheduler.drain_capture(target)}")

    def do_hang(self, capture: str, step: str) -> None:
        self.world.executors[capture].hang(step)

    def do_let_go(self, capture: str, step: str) -> None:
        self.world.executors[capture].let_go(step)

    def do_lose(self, capture: str, table: str) -> None:
        self.world.executors[capture].lose(Span(int(table)))

    def do_fail(self, capture: str, table: str, *text: str) -> None:
        self.world.executors[capture].fail(Span(int(table)), " ".join(text))

    def do_stop(self, capture: str) -> None:
        self.world.liveness[capture].stop()

    def do_pause(self, capture: str) -> None:
        self.world.paused.add(capture)

    def do_resume(self, capture: str) -> None:
        self.world.paused.discard(capture)

    def do_crash(self, capture: str) -> None:
        """Remove the process and its lease."""
        self.world.die(capture)

    def do_restart(self, capture: str) -> None:
        """Restart the agent in its slot, without spans."""
        self.world.restart_agent(capture)

    def do_elect(self, owner: str) -> None:
        self.owner = owner
        self.world.elect(owner)

    def do_link(self, sender: str, _to: str, receiver: str, fate: str) -> None:
        """Set the fate of the messages that are sent from now on: deliver, drop, duplicate, hold."""
        self.fates[(sender, receiver)] = Deliver(fate)

    def do_release(self) -> None:
        self.world.network.release()

    # -- what is shown ------------------------------------------------------------------------------------------------

    def _query(self, name: str, query: Query) -> None:
        self.queries.append((name, query))
        self.query_shown[name] = ""

    def _hook(self, sender: str, receiver: str, message: Message) -> Deliver:
        fate = self.fates.get((sender, receiver), Deliver.DELIVER)
        note = "" if fate is Deliver.DELIVER else f"   ({fate.value})"
        self.lines += [f"{sender} -> {receiver}: {text}{note}" for text in self._texts(message)]
        return fate

    def _texts(self, message: Message) -> Iterable[str]:
        body = message.body
        tables = self.world.scheduler._core.tables  # type: ignore[attr-defined]
        if isinstance(body, DispatchTableRequest):
            for position, span in enumerate(body.spans):
                action = DispatchAction(int(body.actions[position]))
                start = f" from {int(body.checkpoint_ts[position])}" if action is not DispatchAction.REMOVE else ""
                epoch = int(body.assignment_epochs[position])
                grant = f" under {epoch >> 20}.{epoch & 0xFFFFF}" if epoch else ""
                yield f"{_ACTIONS[action]} {name_of(span)}{start}{grant}"
        elif isinstance(body, DispatchTableResponse | HeartbeatResponse):
            named = iter(body.reports.spans)
            for position, number in enumerate(body.reports.numbers.tolist()):
                row = int(tables.rows_of_numbers(body.reports.numbers[position : position + 1])[0]) if number else -1
                span = next(named) if not number else tables.span(row) if row >= 0 else None
                state = tuple(TableState)[int(body.reports.states[position])]
                yield f"{name_of(span)} is {state} at {int(body.reports.checkpoint_ts[position])}"

    def _show(self) -> None:
        core = self.world.scheduler._core  # type: ignore[attr-defined]
        snapshot, now = self.world.snapshot, {}
        for view in snapshot.spans:
            row = core.tables.row(core.tables.row_of(view.span))
            undetermined = ", ".join(sorted(core.captures[index].id for index in row.undetermined))
            roles = [
                f"primary {view.primary}" if view.primary else "",
                f"secondary {view.secondary}" if view.secondary else "",
                f"undetermined {undetermined}" if undetermined else "",
                f"[{view.stall_reason}]" if view.stall_reason else "",
                view.error,
            ]
            now[view.span] = f"{view.state}  {'  '.join(role for role in roles if role)}".rstrip()
        for span, text in now.items():
            if self.shown.get(span) != text:
                self.lines.append(f"   {name_of(span)}: {text}")
        self.lines += [f"   {name_of(span)}: no row any more" for span in self.shown if span not in now]
        self.shown = now
        if self.world.watermark != self.watermark:
            self.watermark = self.world.watermark
            self.lines.append(f"   watermark {self.watermark.checkpoint_ts}")
        for name, query in self.queries:
            text = f"{query.state}" + (f": {query.reason}" if query.reason else "")
            if self.query_shown[name] != text:
                self.query_shown[name] = text
                self.lines.append(f"   {name} is {text}")


def name_of(span: Span | None) -> str:
    return "a span without a row" if span is None else str(span)


def play(text: str) -> str:
    """Return the transcript with the present output."""
    player, kept = Player(), []
    for line in text.splitlines():
        if line.startswith("> "):
            kept.append(line)
            kept += [f"  {output}" for output in player.run(line.removeprefix("> "))]
        elif not line.startswith("  "):
            kept.append(line)
    return "\n".join(kept) + "\n"


def main() -> int:
    if sys.argv[1:] != ["--rewrite"]:
        print("usage: python -m tests.transcripts.player --rewrite", file=sys.stderr)
        return 2
    for path in sorted(FOLDER.glob("*.txt")):
        path.write_text(play(path.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
