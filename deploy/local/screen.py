"""The output of the demo: a live view on a terminal, otherwise one line per event (`--plain`)."""

from __future__ import annotations

import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deploy.local.admin import Json
from deploy.local.observer import View
from tablewire.postgres.lsn import format_lsn

EVENTS_KEPT = 50
EVENT_LINES_MIN = 2
REFRESH_PER_S = 4
_INDENT = " " * 11
_STATE_STYLES = {"replicating": "green", "commit": "yellow", "prepare": "yellow", "absent": "red", "removing": "magenta"}
_COLUMNS = (
    ("table", 5, 0),
    ("state", 11, 1),
    ("replicated by", 13, 2),
    ("prepared by", 11, 4),
    ("checkpoint", 10, 5),
    ("waits for", 16, 3),
)
"""(heading, minimal width, rank): on a narrow terminal the highest ranks are left out."""


class Screen:
    """The demo's output. Events may come from any thread."""

    def __init__(self, *, plain: bool, console: Console | None = None) -> None:
        """Prepare the output. console: where the live view is drawn, None = the terminal."""
        self.plain = plain
        self.console = console or Console()
        self._begin = time.monotonic()
        self._events: deque[str] = deque(maxlen=EVENTS_KEPT)
        self._lock = threading.Lock()
        self._live: Live | None = None
        self._view: Callable[[], View] | None = None
        self._load: Callable[[], str] | None = None

    def __enter__(self) -> Screen:
        if not self.plain:
            self._live = Live(
                get_renderable=self.render,
                console=self.console,
                refresh_per_second=REFRESH_PER_S,
                transient=True,
                vertical_overflow="crop",
            )
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def show(self, view: Callable[[], View], load: Callable[[], str]) -> None:
        """Let the live view show these from now on."""
        self._view, self._load = view, load

    def say(self, text: str) -> None:
        """Show an event at once."""
        line = f"[{time.monotonic() - self._begin:6.1f} s] {text}"
        with self._lock:
            self._events.append(line)
            if self.plain:
                print(line, flush=True)

    def render(self) -> RenderableType:
        """Return the live view, fitted to the console: the cluster, its tables, and the last events."""
        width, height = self.console.width, self.console.height - 1
        parts: list[RenderableType] = []
        if self._view is not None and self._load is not None:
            view = self._view()
            header = _header(view, self._load()).wrap(self.console, width)
            table = _tables(view, width, height - len(header) - EVENT_LINES_MIN - 3)
            parts = [*header, Text(), table, Text()]
            height -= len(header) + table.row_count + 3
        with self._lock:
            lines = [line for event in self._events for line in textwrap.wrap(event, width, subsequent_indent=_INDENT)]
        return Group(*parts, Text("\n".join(lines[-max(1, height) :]), style="dim"))


def _header(view: View, load: str) -> Text:
    text = Text()
    text.append("leader      ", style="bold")
    text.append(f"{view.leader} (election {view.leader_revision})" if view.leader else "none", "green" if view.leader else "red")
    text.append("\nprocessors  ", style="bold")
    states = [f"{view.node_of(capture)} {state}" for capture, state in view.capture_states.items()]
    text.append(", ".join(sorted(states)) or "none")
    if view.changefeed is not None:
        checkpoint_ts = int(view.changefeed["checkpoint_ts"])
        text.append("\ncheckpoint  ", style="bold")
        text.append(f"{format_lsn(checkpoint_ts)}, {max(0, view.source_ts - checkpoint_ts):,} bytes of WAL behind the source")
    text.append("\nload        ", style="bold")
    return text.append(load)


def _tables(view: View, width: int, height: int) -> Table:
    """Return the tables in at most `height` rows, without the columns that do not fit into `width`."""
    rows = [_cells(view, row) for row in sorted(view.tables, key=lambda row: (row["state"] == "replicating", str(row["table"])))]
    height = max(1, height)
    if len(rows) > height:
        rows = [*rows[: height - 1], [f"{len(rows) - height + 1} more tables", *[""] * (len(_COLUMNS) - 1)]]
    else:
        rows.sort(key=lambda cells: cells[0])
    widths = [
        max([least, len(heading), *(len(row[at]) for row in rows)]) + 2 for at, (heading, least, _rank) in enumerate(_COLUMNS)
    ]
    shown = sorted(range(len(_COLUMNS)), key=lambda at: _COLUMNS[at][2])
    while len(shown) > 1 and sum(widths[at] for at in shown) - 2 > width:
        shown.pop()
    shown.sort()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for at in shown:
        table.add_column(_COLUMNS[at][0], no_wrap=True, min_width=widths[at] - 2)
    for row in rows:
        table.add_row(*(Text(row[at], _STATE_STYLES.get(row[at], "")) for at in shown))
    return table


def _cells(view: View, row: Json) -> list[str]:
    return [
        str(row["table"] or row["table_id"]),
        row["state"],
        view.node_of(row["primary"]),
        view.node_of(row["secondary"]),
        format_lsn(int(row["checkpoint_ts"])),
        row["stall_reason"] or "",
    ]
