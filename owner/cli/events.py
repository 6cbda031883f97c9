"""owner events"""

from __future__ import annotations

import os
import select
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator

import click

from owner.cli.client import CallError
from owner.cli.json_objects import to_object, to_objects
from owner.cli.options import TIMEOUT_S_MAX, Session, remote
from owner.cli.output import Output
from tablewire.v1 import admin_pb2 as pb

EVENTS_DEFAULT = 50
RECONNECT_INTERVAL_S = 0.5


@click.command("events")
@remote
@click.option("-f", "--follow", is_flag=True, help="And what happens from now on, until Ctrl-C.")
@click.option(
    "-n",
    "--limit",
    type=click.IntRange(min=0, max=100_000),
    default=EVENTS_DEFAULT,
    show_default=True,
    metavar="N",
    help="The newest N; 0 for all that are kept.",
)
def events(session: Session, follow: bool, limit: int) -> None:
    """What happened: elections, captures that came and went, changefeeds, moves, failovers; oldest first.

    The leader keeps a bounded number in etcd. What happens to many tables at once is one event with a count.
    """
    if follow:
        _end_with_reader()
        try:
            _follow(session, limit)
        except KeyboardInterrupt:
            return
    request = pb.ListEventsRequest(limit=limit)
    found = [
        event
        for answer in session.client.stream("ListEvents", request, session.timeout_s(), reads=True)
        for event in answer.events
    ]
    if session.output.is_json:
        session.output.json({"events": to_objects(found)})
        return
    session.output.table(
        ("AT", "EVENT", "CHANGEFEED", "SUBJECT", "WHAT", "WHY", "BY", "JOB"),
        ((event.at, event.kind, event.changefeed, event.subject, event.text, event.why, event.by, event.job) for event in found),
    )


def _end_with_reader() -> None:
    """`... | head` ends this command when head has seen enough, and not only with the next event, which may be hours away: what
    Ctrl-C does is done when a pipe has no reader any more."""
    try:
        pipe = sys.stdout.fileno()
        if not hasattr(select, "poll") or not stat.S_ISFIFO(os.fstat(pipe).st_mode):
            return
    except (OSError, ValueError):
        return
    waiting = select.poll()
    waiting.register(pipe, 0)  # errors alone, which are always told
    reader = threading.main_thread().ident

    def watch() -> None:
        waiting.poll()
        if reader is not None:
            signal.pthread_kill(reader, signal.SIGINT)

    threading.Thread(target=watch, name="reader", daemon=True).start()


def _follow(session: Session, limit: int) -> None:
    """For ever. When the leader changes, it goes on with the next one where it was; a cluster without a leader for longer than
    the command's timeout ends it."""
    after = 0
    while True:
        for event in _until_broken(session, limit, after):
            _show(session.output, event)
            after, limit = event.sequence, 0
        time.sleep(RECONNECT_INTERVAL_S)


def _until_broken(session: Session, limit: int, after: int) -> Iterator[pb.Event]:
    # Asking once, with the usual patience, finds a leader; the stream itself may then last.
    session.ask("GetStatus", pb.GetStatusRequest(), reads=True)
    request = pb.ListEventsRequest(limit=limit, after=after, follow=True)
    try:
        for answer in session.client.stream("ListEvents", request, TIMEOUT_S_MAX, reads=True):
            yield from answer.events
    except CallError as error:
        if error.code not in ("unavailable", "cancelled"):
            raise
        session.output.note(f"asking again: {error.text}")
        session.client.close()


def _show(output: Output, event: pb.Event) -> None:
    if output.is_json:
        output.json(to_object(event))
        return
    parts = [event.at, event.kind, event.changefeed, event.subject, event.text, f"({event.why})" if event.why else ""]
    parts += [f"by {event.by}" if event.by else "", f"job {event.job}" if event.job else ""]
    output.line("  ".join(part for part in parts if part))
