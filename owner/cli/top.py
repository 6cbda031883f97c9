"""owner top: a view of the whole cluster, refreshed periodically."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import count as count_from
from typing import TYPE_CHECKING

import click

from owner.cli.json_objects import to_object, to_objects
from owner.cli.options import Session, remote
from owner.cli.output import CommandError, Output, counts, duration, new_table, number, optional, printable, size
from tablewire.runtime.text import plural

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tablewire.v1 import admin_pb2 as pb

INTERVAL_S_DEFAULT = 1.0
ROWS_MAX = 15
"""The number of processors and of changefeeds on a terminal; of stalled tables everywhere."""
EVENTS_SHOWN = 5

_CAPTURES = ("PROCESSOR", "STATE", "#TABLES", "DRAINING", "ADDRESS")
_CHANGEFEEDS = ("CHANGEFEED", "STATE", "#TABLES", "#STALLED", "#ROWS/S", "#BYTES/S", "#LAG", "#RETAINED", "WHY")
_STALLED = ("STALLED TABLE", "CHANGEFEED", "STATE", "FOR", "REASON", "PRIMARY", "ERROR")
_EVENTS = ("AT", "EVENT", "CHANGEFEED", "SUBJECT", "WHAT")

Section = tuple[Sequence[str], list[Sequence[object]]]


@dataclass(frozen=True, slots=True)
class TopView:
    """The cluster at one time. error: why no owner answered; the rest is then what was last seen."""

    at: str
    status: pb.GetStatusResponse
    captures: Sequence[pb.Capture]
    changefeeds: Sequence[pb.Changefeed]
    stalled: Sequence[tuple[str, pb.TableRow]]
    """Each with the name of its changefeed."""
    events: Sequence[pb.Event]
    error: str = ""


@click.command("top")
@remote
@click.option(
    "--interval-s",
    type=click.FloatRange(0.1, 3_600),
    default=INTERVAL_S_DEFAULT,
    show_default=True,
    help="Time between two refreshes.",
)
@click.option("--plain", is_flag=True, help="Print each refresh as text; the default without a terminal.")
@click.option("--count", type=click.IntRange(min=0), default=0, metavar="N", help="Refresh N times; 0: until q or Ctrl-C.")
@click.option("--once", is_flag=True, help="Print the view once as text: --plain --count 1.")
def top(session: Session, interval_s: float, plain: bool, count: int, once: bool) -> None:
    """Watch processors, changefeeds, rates, lag, stalls and the last events. Press q or Ctrl-C to leave."""
    rounds: Iterable[int] = range(1 if once else count) if once or count else count_from()
    show = _show_views
    if plain or once or session.output.is_json or not session.output.is_terminal:
        show = _print_views
    try:
        show(session.output, _views(session), rounds, interval_s)
    except KeyboardInterrupt:
        return


def _views(session: Session) -> Iterator[TopView]:
    """Yield views endlessly. The first raises CommandError if no owner answers; later ones show it."""
    view = _view(session)
    while True:
        yield view
        try:
            view = _view(session)
        except CommandError as error:
            session.client.close()
            view = replace(view, at=_now(), error=error.message)


def _view(session: Session) -> TopView:
    status = session.ask("GetStatus")
    captures = session.ask("ListCaptures").captures
    changefeeds = session.ask("ListChangefeeds").changefeeds
    stalled: list[tuple[str, pb.TableRow]] = []
    for row in changefeeds:
        room = ROWS_MAX - len(stalled)
        if room > 0 and row.running and sum(row.stalls.values()):
            stalled += [(row.changefeed, span) for span in _stalled(session, row.changefeed, room)]
    (answer, *_) = session.client.stream("ListEvents", session.timeout_s(), limit=EVENTS_SHOWN)
    return TopView(_now(), status, captures, changefeeds, stalled, answer.events)


def _stalled(session: Session, changefeed: str, limit: int) -> Iterator[pb.TableRow]:
    """Yield the stalled tables; none if the changefeed was paused or removed since it was listed."""
    try:
        for chunk in session.client.stream("ListTables", session.timeout_s(), changefeed=changefeed, stalled=True, limit=limit):
            yield from chunk.tables
    except CommandError as error:
        if error.code not in ("failed_precondition", "not_found"):
            raise


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


# ---------------------------------------------------------------------------------------------------------------------
# As text, and as JSON


def _print_views(output: Output, views: Iterator[TopView], rounds: Iterable[int], interval_s: float) -> None:
    for round_ in rounds:
        if round_:
            time.sleep(interval_s)
        view = next(views)
        if output.is_json:
            output.json(_as_json(view))
            continue
        if round_:
            output.line("")
        output.line(f"{view.at}  {_headline(view)}")
        for headings, rows in _sections(view):
            output.line("")
            output.print(new_table(headings, rows))


def _as_json(view: TopView) -> dict[str, object]:
    return {
        "at": view.at,
        "error": view.error or None,
        "status": to_object(view.status),
        "captures": to_objects(view.captures),
        "changefeeds": to_objects(view.changefeeds),
        "stalled": [{"changefeed": name, **to_object(row)} for name, row in view.stalled],
        "events": to_objects(view.events),
    }


def _headline(view: TopView) -> str:
    status = view.status
    leader = f"{status.leader.id} leads" if status.HasField("leader") else "no leader"
    parts = [f"cluster {status.cluster}", leader, plural(len(status.owners), "owner")]
    parts.append(f"processors: {counts(status.captures_by_state) or 'none'}")
    parts.append(f"changefeeds: {counts(status.changefeeds_by_state) or 'none'}")
    return " | ".join(parts) + (f" | NO ANSWER: {view.error}" if view.error else "")


def _sections(view: TopView, rows_max: int | None = None) -> Iterator[Section]:
    """Yield headings and rows of each part, those that need attention first. rows_max: of each part."""
    captures = sorted(view.captures, key=lambda row: (row.state in ("ready", "idle"), row.id))[:rows_max]
    yield _CAPTURES, [(row.id, row.state, row.spans, "yes" if row.draining else "", row.address) for row in captures]
    feeds = sorted(view.changefeeds, key=lambda row: (row.state == "normal" and not row.stalls, row.changefeed))[:rows_max]
    yield _CHANGEFEEDS, [_changefeed(row) for row in feeds]
    if view.stalled:
        yield _STALLED, [_stalled_row(name, row) for name, row in view.stalled[:rows_max]]
    if view.events:
        yield _EVENTS, [(row.at, row.kind, row.changefeed, row.subject, row.text or row.why) for row in view.events]


def _changefeed(row: pb.Changefeed) -> Sequence[object]:
    return (
        row.changefeed,
        row.state,
        row.spans if row.running else None,
        sum(row.stalls.values()) if row.running else None,
        number(optional(row, "rows_per_s")),
        size(optional(row, "bytes_per_s")),
        optional(row, "lag"),
        size(optional(row, "retained_bytes")),
        row.error or counts(row.stalls),
    )


def _stalled_row(changefeed: str, row: pb.TableRow) -> Sequence[object]:
    name = row.table or str(row.table_id)
    return name, changefeed, row.state, duration(row.state_age_ms), row.stall_reason, row.primary, row.error


# ---------------------------------------------------------------------------------------------------------------------
# On a terminal


def _show_views(output: Output, views: Iterator[TopView], rounds: Iterable[int], interval_s: float) -> None:
    from rich.live import Live

    with _quit_key() as is_pressed, Live(console=output.console(), screen=True, auto_refresh=False) as live:
        for _ in rounds:
            live.update(_render(next(views), live.console.height), refresh=True)
            if is_pressed(interval_s):
                return


def _render(view: TopView, height: int) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    rows_max = max(2, min(ROWS_MAX, (height - 12 - EVENTS_SHOWN) // 3))
    style = "bold white on red" if view.error else "reverse"
    headline = Text(printable(f" {view.at}  {_headline(view)} "), style=style, overflow="ellipsis", no_wrap=True)
    parts: list[RenderableType] = [headline]
    for headings, rows in _sections(view, rows_max):
        parts += [Text(""), new_table(headings, rows, overflow="ellipsis")]
    return Group(*parts, Text(""), Text("q leaves", style="dim"))


@contextmanager
def _quit_key() -> Iterator[Callable[[float], bool]]:
    """Provide a wait that returns True early if q is pressed. Without a keyboard it only waits."""
    if os.name != "posix" or not sys.stdin.isatty():
        yield lambda seconds: threading.Event().wait(seconds)
        return
    import termios
    import tty

    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)

    def is_pressed(seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (left_s := deadline - time.monotonic()) > 0:
            if select.select([keyboard], [], [], left_s)[0]:
                pressed = os.read(keyboard, 64)
                if not pressed or b"q" in pressed.lower():
                    return True
        return False

    try:
        tty.setcbreak(keyboard)
        yield is_pressed
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
