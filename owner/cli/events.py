"""owner events"""

from __future__ import annotations

import os
import select
import signal
import stat
import sys
import threading
import time
from typing import TYPE_CHECKING

import click

from owner.cli.json_objects import to_object, to_objects
from owner.cli.options import TIMEOUT_S_MAX, Session, remote
from owner.cli.output import CommandError, Output

if TYPE_CHECKING:
    from tablewire.v1 import admin_pb2 as pb

EVENTS_DEFAULT = 50
RECONNECT_INTERVAL_S = 0.5

_COLUMNS = (
    *(("AT", "at"), ("EVENT", "kind"), ("CHANGEFEED", "changefeed"), ("SUBJECT", "subject")),
    *(("WHAT", "text"), ("WHY", "why"), ("BY", "by"), ("JOB", "job")),
)


@click.command("events")
@remote
@click.option("-f", "--follow", is_flag=True, help="Print further events as they happen, until Ctrl-C.")
@click.option(
    "-n",
    "--limit",
    type=click.IntRange(min=0, max=100_000),
    default=EVENTS_DEFAULT,
    show_default=True,
    metavar="N",
    help="Only the newest N events; 0 for all.",
)
def events(session: Session, follow: bool, limit: int) -> None:
    """Show events, oldest first.

    Among them: elections, processors that joined and left, changes of changefeeds, moves,
    failovers. The leader keeps a limited number in etcd. What happens to many tables at once is one
    event with a count.
    """
    if follow:
        _end_with_reader()
        try:
            _follow(session, limit)
        except KeyboardInterrupt:
            return
    chunks = session.client.stream("ListEvents", session.timeout_s(), limit=limit)
    found = [event for chunk in chunks for event in chunk.events]
    if session.output.is_json:
        session.output.json({"events": to_objects(found)})
        return
    session.output.table(_COLUMNS, found)


def _end_with_reader() -> None:
    """Interrupt this command as Ctrl-C does when the reader of its pipe ends, as in `... | head`.

    Otherwise the command would end with the next event, which may be hours away.
    """
    try:
        pipe = sys.stdout.fileno()
        if not hasattr(select, "poll") or not stat.S_ISFIFO(os.fstat(pipe).st_mode):
            return
    except (OSError, ValueError):
        return
    poll = select.poll()
    poll.register(pipe, 0)  # errors only, which are always reported
    main_thread = threading.main_thread().ident

    def watch() -> None:
        poll.poll()
        if main_thread is not None:
            signal.pthread_kill(main_thread, signal.SIGINT)

    threading.Thread(target=watch, name="reader", daemon=True).start()


def _follow(session: Session, limit: int) -> None:
    """Print events until interrupted, or until there is no leader for --timeout-s."""
    after = 0
    while True:
        session.ask("GetStatus")  # finds a leader within the usual timeout; the stream itself may last
        try:
            for chunk in session.client.stream("ListEvents", TIMEOUT_S_MAX, limit=limit, after=after, follow=True):
                for event in chunk.events:
                    _show(session.output, event)
                    after, limit = event.sequence, 0
        except CommandError as error:
            if error.code not in ("unavailable", "cancelled"):
                raise
            session.output.note(f"reconnecting: {error.message}")
            session.client.close()
        time.sleep(RECONNECT_INTERVAL_S)


def _show(output: Output, event: pb.Event) -> None:
    parts = [event.at, event.kind, event.changefeed, event.subject, event.text, f"({event.why})" if event.why else ""]
    parts += [f"by {event.by}" if event.by else "", f"job {event.job}" if event.job else ""]
    output.result(to_object(event), "  ".join(part for part in parts if part))
