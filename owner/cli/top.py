"""owner top: the whole cluster at a glance, again and again."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from owner.cli.client import CallError
from owner.cli.json_objects import to_object, to_objects
from owner.cli.options import Session, remote
from owner.cli.output import Output, counts, duration, new_table, printable, size
from owner.cli.statistics import number, size_per_s
from tablewire.v1 import admin_pb2 as pb

INTERVAL_S_DEFAULT = 1.0
ROWS_MAX = 15
"""Of captures and changefeeds on a terminal; and of stalled spans everywhere."""
EVENTS_SHOWN = 5

_CAPTURES = ("CAPTURE", "STATE", "#SPANS", "DRAINING", "ADDRESS")
_CHANGEFEEDS = ("CHANGEFEED", "STATE", "#SPANS", "#STALLED", "#ROWS/S", "#BYTES/S", "#LAG", "#RETAINED", "WHY")
_STALLED = ("STALLED SPAN", "CHANGEFEED", "STATE", "FOR", "REASON", "PRIMARY", "ERROR")
_EVENTS = ("AT", "EVENT", "CHANGEFEED", "SUBJECT", "WHAT")

Section = tuple[Sequence[str], list[Sequence[object]]]


@dataclass(frozen=True, slots=True)
class Look:
    """One look at the cluster. error: why there was no answer; the rest is then what was seen last. stalled: with the name of
    its changefeed."""

    at: str
    status: pb.GetStatusResponse
    captures: Sequence[pb.Capture] = ()
    changefeeds: Sequence[pb.Changefeed] = ()
    stalled: Sequence[tuple[str, pb.TableRow]] = ()
    events: Sequence[pb.Event] = field(default=())
    error: str = ""


@click.command("top")
@remote
@click.option(
    "--interval-s", type=click.FloatRange(0.1, 3_600), default=INTERVAL_S_DEFAULT, show_default=True, help="Between two looks."
)
@click.option("--plain", is_flag=True, help="One look after the other as text, as it is where there is no terminal.")
@click.option("--count", type=click.IntRange(min=0), default=0, metavar="N", help="So many looks; 0: until q or Ctrl-C.")
@click.option("--once", is_flag=True, help="One look as text: --plain --count 1.")
def top(session: Session, interval_s: float, plain: bool, count: int, once: bool) -> None:
    """Watch captures, changefeeds, rates, lag and stalls.

    And what happened last. It is drawn anew in each interval; q or Ctrl-C leaves.
    """
    looks = islice(_looks(session), 1 if once else count or None)
    try:
        if plain or once or session.output.is_json or not session.output.is_terminal:
            _print_looks(session.output, looks, interval_s)
        else:
            _show_looks(session.output, looks, interval_s)
    except KeyboardInterrupt:
        return


def _looks(session: Session) -> Iterator[Look]:
    """For ever. Without an answer at the first one it is a CallError; later that is shown, and asked again."""
    look = _look(session)
    while True:
        yield look
        try:
            look = _look(session)
        except CallError as error:
            session.client.close()
            look = replace(look, at=_now(), error=error.text)


def _look(session: Session) -> Look:
    status = session.ask("GetStatus", pb.GetStatusRequest(), reads=True)
    captures = session.ask("ListCaptures", pb.ListCapturesRequest(), reads=True).captures
    changefeeds = session.ask("ListChangefeeds", pb.ListChangefeedsRequest(), reads=True).changefeeds
    stalled: list[tuple[str, pb.TableRow]] = []
    for row in changefeeds:
        room = ROWS_MAX - len(stalled)
        if room > 0 and row.running and sum(row.stalls.values()):
            stalled += [(row.changefeed, span) for span in _stalled(session, row.changefeed, room)]
    (answer, *_) = session.client.stream("ListEvents", pb.ListEventsRequest(limit=EVENTS_SHOWN), session.timeout_s(), reads=True)
    return Look(_now(), status, captures, changefeeds, stalled, answer.events)


def _stalled(session: Session, changefeed: str, limit: int) -> Iterator[pb.TableRow]:
    """None when it was paused or removed since it was listed."""
    request = pb.ListTablesRequest(changefeed=changefeed, stalled=True, limit=limit)
    try:
        for chunk in session.client.stream("ListTables", request, session.timeout_s(), reads=True):
            yield from chunk.tables
    except CallError as error:
        if error.code not in ("failed_precondition", "not_found"):
            raise


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


# ---------------------------------------------------------------------------------------------------------------------
# As text, and as JSON


def _print_looks(output: Output, looks: Iterator[Look], interval_s: float) -> None:
    for at, look in enumerate(_paced(looks, interval_s, time.sleep)):
        if output.is_json:
            output.json(_as_json(look))
            continue
        if at:
            output.line("")
        output.line(f"{look.at}  {_headline(look)}")
        for headings, rows in _sections(look):
            output.line("")
            output.table(headings, rows)


def _paced(looks: Iterator[Look], interval_s: float, pause: Callable[[float], object]) -> Iterator[Look]:
    """The pause comes before each look but the first, so that the last one is followed by none."""
    for at, _ in enumerate(iter(int, 1)):
        if at:
            pause(interval_s)
        look = next(looks, None)
        if look is None:
            return
        yield look


def _as_json(look: Look) -> dict[str, object]:
    return {
        "at": look.at,
        "error": look.error or None,
        "status": to_object(look.status),
        "captures": to_objects(look.captures),
        "changefeeds": to_objects(look.changefeeds),
        "stalled": [{"changefeed": name, **to_object(row)} for name, row in look.stalled],
        "events": to_objects(look.events),
    }


def _headline(look: Look) -> str:
    status = look.status
    leader = f"{status.leader.id} leads" if status.HasField("leader") else "nobody leads"
    parts = [f"cluster {status.cluster}", leader, f"{len(status.owners)} owners"]
    parts.append(f"captures: {counts(status.captures_by_state) or 'none'}")
    parts.append(f"changefeeds: {counts(status.changefeeds_by_state) or 'none'}")
    return " | ".join(parts) + (f" | NO ANSWER: {look.error}" if look.error else "")


def _sections(look: Look, rows_max: int | None = None) -> Iterator[Section]:
    """What there is to see, each part as headings and rows; rows_max: of each, the worst first."""
    captures = sorted(look.captures, key=lambda row: (row.state in ("ready", "idle"), row.id))[:rows_max]
    yield _CAPTURES, [(row.id, row.state, row.spans, "yes" if row.draining else "", row.address) for row in captures]
    feeds = sorted(look.changefeeds, key=lambda row: (row.state == "normal" and not row.stalls, row.changefeed))[:rows_max]
    yield _CHANGEFEEDS, [_changefeed(row) for row in feeds]
    if look.stalled:
        yield _STALLED, [_stalled_row(name, row) for name, row in look.stalled[:rows_max]]
    if look.events:
        yield _EVENTS, [(row.at, row.kind, row.changefeed, row.subject, row.text or row.why) for row in look.events]


def _changefeed(row: pb.Changefeed) -> Sequence[object]:
    return (
        row.changefeed,
        row.state,
        row.spans if row.running else None,
        sum(row.stalls.values()) if row.running else None,
        number(row, "rows_per_s"),
        size_per_s(row),
        row.lag if row.HasField("lag") else None,
        size(row.retained_bytes if row.HasField("retained_bytes") else None),
        row.error or counts(row.stalls),
    )


def _stalled_row(changefeed: str, row: pb.TableRow) -> Sequence[object]:
    name = row.table or str(row.table_id)
    return name, changefeed, row.state, duration(row.state_age_ms), row.stall_reason, row.primary, row.error


# ---------------------------------------------------------------------------------------------------------------------
# On a terminal


def _show_looks(output: Output, looks: Iterator[Look], interval_s: float) -> None:
    with _keys() as is_left, Live(console=output.console(), screen=True, auto_refresh=False) as live:
        for look in looks:
            live.update(_render(look, live.console.height), refresh=True)
            if is_left(interval_s):
                return


def _render(look: Look, height: int) -> RenderableType:
    rows_max = max(2, min(ROWS_MAX, (height - 12 - EVENTS_SHOWN) // 3))
    style = "bold white on red" if look.error else "reverse"
    parts: list[RenderableType] = [
        Text(printable(f" {look.at}  {_headline(look)} "), style=style, overflow="ellipsis", no_wrap=True)
    ]
    for headings, rows in _sections(look, rows_max):
        parts += [Text(""), new_table(headings, rows, overflow="ellipsis")]
    parts += [Text(""), Text("q leaves", style="dim")]
    return Group(*parts)


@contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """A wait that ends early, and is True, when q is pressed; keys come at once meanwhile. Without a keyboard it only waits."""
    keyboard = _keyboard()
    if keyboard is None:
        yield lambda seconds: threading.Event().wait(seconds)
        return
    import termios
    import tty

    before = termios.tcgetattr(keyboard)

    def is_left(seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (left_s := deadline - time.monotonic()) > 0:
            if select.select([keyboard], [], [], left_s)[0]:
                pressed = os.read(keyboard, 64)
                if not pressed or b"q" in pressed.lower():
                    return True
        return False

    try:
        tty.setcbreak(keyboard)
        yield is_left
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _keyboard() -> int | None:
    """The descriptor of a terminal to read keys from, where this platform can."""
    return sys.stdin.fileno() if os.name == "posix" and sys.stdin.isatty() else None
