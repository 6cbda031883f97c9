"""What the demo shows: a live view where there is a terminal, one line an event where there is none (`--plain`)."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deploy.local.observer import View

EVENTS_SHOWN = 12
REFRESH_PER_S = 4
_STATE_STYLES = {"replicating": "green", "commit": "yellow", "prepare": "yellow", "absent": "red", "removing": "magenta"}


class Screen:
    """`say` from any thread. The live view shows `view()` and `load()` as they are at each refresh, once they are given."""

    def __init__(self, *, plain: bool) -> None:
        self.plain = plain
        self._begin = time.monotonic()
        self._events: deque[str] = deque(maxlen=EVENTS_SHOWN)
        self._lock = threading.Lock()
        self._console = Console()
        self._live: Live | None = None
        self._view: Callable[[], View] | None = None
        self._load: Callable[[], str] | None = None

    def __enter__(self) -> Screen:
        if not self.plain:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=REFRESH_PER_S, transient=True
            )
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def show(self, view: Callable[[], View], load: Callable[[], str]) -> None:
        """What the live view reads from now on."""
        self._view, self._load = view, load

    def say(self, text: str) -> None:
        """One event: a line, at once."""
        line = f"[{time.monotonic() - self._begin:6.1f} s] {text}"
        with self._lock:
            self._events.append(line)
            if self._live is None:
                print(line, flush=True)

    def result(self, lines: list[str]) -> None:
        """The end: plain lines on stdout, after the live view has been taken away."""
        with self._lock:
            sys.stdout.write("\n".join(lines) + "\n")
            sys.stdout.flush()

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self._view is not None and self._load is not None:
            view = self._view()
            parts += [_header(view, self._load()), _tables(view)]
        with self._lock:
            parts.append(Text("\n".join(self._events), style="dim", no_wrap=True, overflow="ellipsis"))
        return Group(*parts)


def _header(view: View, load: str) -> Text:
    text = Text()
    text.append("leader ", style="bold")
    text.append(view.leader or "nobody", style="green" if view.leader else "red")
    text.append(f" (election {view.leader_revision})   ")
    text.append("processors ", style="bold")
    text.append(", ".join(f"{view.node_of(capture)} {state}" for capture, state in view.capture_states.items()) or "none")
    if view.changefeed is not None:
        lag = max(0, view.source_ts - int(view.changefeed["checkpoint_ts"]))
        text.append("\ncheckpoint ", style="bold")
        text.append(f"{view.changefeed['checkpoint_ts']:,} (lag {lag:,} bytes of WAL)   ")
    text.append("load ", style="bold")
    text.append(load)
    return text


def _tables(view: View) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("table", "state", "replicated by", "prepared by", "checkpoint", "waits for"):
        table.add_column(heading, no_wrap=True)
    for row in sorted(view.tables, key=lambda row: str(row["table"])):
        table.add_row(
            str(row["table"] or row["table_id"]),
            Text(row["state"], style=_STATE_STYLES.get(row["state"], "")),
            view.node_of(row["primary"]),
            view.node_of(row["secondary"]),
            f"{row['checkpoint_ts']:,}",
            row["stall_reason"] or "",
        )
    return table
