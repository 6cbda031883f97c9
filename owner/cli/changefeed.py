"""owner changefeed create | list | query | pause | resume | update | remove"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import click

from owner.cli.client import CallError
from owner.cli.json_objects import to_object
from owner.cli.names import complete_changefeeds
from owner.cli.options import Session, remote
from owner.cli.output import Output, counts, duration, size
from owner.cli.progress import Progress
from tablewire.model.ids import TS_MAX
from tablewire.postgres.lsn import parse_lsn
from tablewire.v1 import admin_pb2 as pb

CHECKS_TIMEOUT_S = 60.0
REMOVE_TIMEOUT_S = 60.0
STEADY_TIMEOUT_S = 600.0
POLL_INTERVAL_S = 0.25


@click.group("changefeed")
def changefeed_group() -> None:
    """Replication jobs."""


def changefeed_argument(command: Any) -> Any:
    return click.argument("changefeed", default="", metavar="[ID]", shell_complete=complete_changefeeds)(command)


def _pairs(_context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise click.BadParameter(f"{text!r} is not NAME=VALUE", param=parameter)
        if name in pairs:
            raise click.BadParameter(f"{name!r} is given twice", param=parameter)
        pairs[name.strip()] = value
    return pairs


def _patterns(given: Sequence[str]) -> list[str]:
    return [pattern.strip() for text in given for pattern in text.split(",") if pattern.strip()]


def _merged(source_options: Mapping[str, str], sink_options: Mapping[str, str]) -> dict[str, str]:
    if twice := sorted(source_options.keys() & sink_options.keys()):
        raise click.UsageError(f"{twice[0]!r} is given both as --source-option and as --sink-option")
    return {**source_options, **sink_options}


def _ts(_context: click.Context, parameter: click.Parameter, value: str | None) -> int:
    """A whole number, or a PostgreSQL LSN: two hexadecimal numbers, the higher one first. 0 when it is not given."""
    text = (value or "0").strip()
    if re.fullmatch(r"[0-9]{1,20}", text) and int(text) <= TS_MAX:
        return int(text)
    try:
        return parse_lsn(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither a number nor an LSN such as 0/16B3748", param=parameter) from None


@changefeed_group.command("create")
@remote
@click.option("--id", "changefeed", required=True, metavar="ID", help="Lower-case letters, digits, '_', '-'; or NAMESPACE/ID.")
@click.option(
    "--source",
    required=True,
    metavar="URI",
    help="postgresql://USER:${PASSWORD}@HOST/DATABASE: what stands in ${} "
    "is taken from the environment of owners and processors, and stored as written.",
)
@click.option("--sink", required=True, metavar="URI", help="Where to: postgresql://..., file:///folder, blackhole://")
@click.option(
    "--tables",
    multiple=True,
    required=True,
    metavar="PATTERN",
    help="schema.table with * and ?; '!pattern' excludes. Several, or separated by commas.",
)
@click.option("--no-snapshot", is_flag=True, help="Only changes from now on, without the rows that are there.")
@click.option(
    "--source-option",
    "source_options",
    multiple=True,
    callback=_pairs,
    metavar="NAME=VALUE",
    help="A setting of this changefeed; the plug-in of the source's scheme says which there are.",
)
@click.option(
    "--sink-option",
    "sink_options",
    multiple=True,
    callback=_pairs,
    metavar="NAME=VALUE",
    help="The same, where it reads better: both are one set of names.",
)
@click.option(
    "--target-ts",
    callback=_ts,
    metavar="TS",
    help="Stop exactly there (the state is then finished): a number, or an LSN such as 0/16B3748.",
)
@click.option("--dry-run", is_flag=True, help="Run all checks and store nothing.")
@click.option("--wait", is_flag=True, help="Until all tables are copied and follow the source; --timeout-s, else 600 s.")
def create(
    session: Session,
    changefeed: str,
    source: str,
    sink: str,
    tables: Sequence[str],
    no_snapshot: bool,
    source_options: Mapping[str, str],
    sink_options: Mapping[str, str],
    target_ts: int,
    dry_run: bool,
    wait: bool,
) -> None:
    """Check everything, and start to replicate. Nothing is stored unless all checks hold; every failed one is named."""
    if wait and dry_run:
        raise click.UsageError("--dry-run and --wait exclude each other")
    request = pb.CreateChangefeedRequest(
        changefeed=changefeed,
        source_uri=source,
        sink_uri=sink,
        tables=_patterns(tables),
        skip_snapshot=no_snapshot,
        options=_merged(source_options, sink_options),
        dry_run=dry_run,
        target_ts=target_ts,
    )
    session.asked = "" if dry_run else f"{changefeed} may have been created: look at `owner changefeed list`"
    answer = session.ask("CreateChangefeed", request, timeout_s=session.timeout_s(CHECKS_TIMEOUT_S))
    if wait:
        answer = _wait_until_steady(session, answer)
    if session.output.is_json:
        session.output.json(to_object(answer))
    elif dry_run:
        session.output.line(f"changefeed {answer.changefeed}: all checks hold; nothing was stored")
    else:
        session.output.line(f"changefeed {answer.changefeed} created{f': {_standing(answer)}' if wait else ''}")


@changefeed_group.command("list")
@remote
def list_(session: Session) -> None:
    """All changefeeds."""
    answer = session.ask("ListChangefeeds", pb.ListChangefeedsRequest(), reads=True)
    if session.output.is_json:
        session.output.json(to_object(answer))
        return
    session.output.table(
        ("CHANGEFEED", "STATE", "#SPANS", "#STALLED", "#CHECKPOINT", "#LAG", "#RETAINED", "ERROR"),
        (
            (
                row.changefeed,
                row.state,
                row.spans if row.running else None,
                sum(row.stalls.values()) if row.running else None,
                row.checkpoint_ts or None,
                row.lag if row.HasField("lag") else None,
                size(row.retained_bytes if row.HasField("retained_bytes") else None),
                row.error,
            )
            for row in answer.changefeeds
        ),
    )


@changefeed_group.command("query")
@remote
@changefeed_argument
def query(session: Session, changefeed: str) -> None:
    """One changefeed: how far it is, what it waits for, what it costs the source. ID may be left out while there is one."""
    answer = session.ask("QueryChangefeed", pb.ChangefeedRequest(changefeed=changefeed), reads=True)
    if session.output.is_json:
        session.output.json(to_object(answer))
    else:
        _show(session.output, answer)


@changefeed_group.command("pause")
@remote
@changefeed_argument
def pause(session: Session, changefeed: str) -> None:
    """Stop replicating and keep the place: the source keeps all changes from there on (see `query`: retained)."""
    answer = session.ask("PauseChangefeed", pb.ChangefeedRequest(changefeed=changefeed))
    is_known = answer.HasField("retained_bytes")
    kept = f"; the source keeps {size(answer.retained_bytes)} for it, and more with each change" if is_known else ""
    _answer(session, answer, kept)


@changefeed_group.command("resume")
@remote
@changefeed_argument
def resume(session: Session, changefeed: str) -> None:
    """Go on from the checkpoint, after a pause or a failure."""
    _answer(session, session.ask("ResumeChangefeed", pb.ChangefeedRequest(changefeed=changefeed)))


@changefeed_group.command("update")
@remote
@click.argument("changefeed", metavar="ID", shell_complete=complete_changefeeds)
@click.option("--tables", multiple=True, metavar="PATTERN", help="The new filter, as with `create`; it replaces the old one.")
@click.option("--source-option", "source_options", multiple=True, callback=_pairs, metavar="NAME=VALUE", help="A new value.")
@click.option("--sink-option", "sink_options", multiple=True, callback=_pairs, metavar="NAME=VALUE", help="The same.")
@click.option("--unset-option", "unset_options", multiple=True, metavar="NAME", help="Back to the default.")
def update(
    session: Session,
    changefeed: str,
    tables: Sequence[str],
    source_options: Mapping[str, str],
    sink_options: Mapping[str, str],
    unset_options: Sequence[str],
) -> None:
    """Change a paused changefeed; it holds from `resume` on. All checks are run first, and nothing changes unless all hold.

    What may be changed: the tables and the options. A table that comes in begins as with `create`, one that goes out stays in the
    sink as it is. Source, sink and target stay what they are, as data and positions belong to them: for others, create another
    changefeed.
    """
    request = pb.UpdateChangefeedRequest(
        changefeed=changefeed,
        tables=_patterns(tables),
        options=_merged(source_options, sink_options),
        unset_options=unset_options,
    )
    if not (request.tables or request.options or request.unset_options):
        raise click.UsageError("nothing to change: give --tables, --source-option, --sink-option or --unset-option")
    answer = session.ask("UpdateChangefeed", request, timeout_s=session.timeout_s(CHECKS_TIMEOUT_S))
    if session.output.is_json:
        session.output.json(to_object(answer))
    else:
        session.output.line(f"changefeed {answer.changefeed} is changed; `owner changefeed resume` starts it")


@changefeed_group.command("remove")
@remote
@click.argument("changefeed", metavar="ID", shell_complete=complete_changefeeds)
@click.option("--wait", is_flag=True, help="Until it has left the source and the cluster.")
def remove(session: Session, changefeed: str, wait: bool) -> None:
    """Stop it, drop what it made at the source, and forget it. What is in the sink stays."""
    name = session.ask("RemoveChangefeed", pb.ChangefeedRequest(changefeed=changefeed)).changefeed
    session.asked = f"the removal of {name} goes on"
    if wait:
        _wait_until_gone(session, name)
    if session.output.is_json:
        session.output.json({"changefeed": name, "gone": wait})
    else:
        session.output.line(f"changefeed {name} {'is removed' if wait else 'is being removed'}")


def _wait_until_gone(session: Session, name: str) -> None:
    timeout_s = session.timeout_s(REMOVE_TIMEOUT_S)
    deadline = time.monotonic() + timeout_s
    error = ""
    while time.monotonic() < deadline:
        try:
            row = session.ask("QueryChangefeed", pb.ChangefeedRequest(changefeed=name), reads=True)
        except CallError as failure:
            if failure.code == "not_found":
                return
            raise
        if row.error != error:
            error = row.error
            session.output.note(f"changefeed {name}: {error or 'being removed'}")
        time.sleep(POLL_INTERVAL_S)
    why = f": {error}" if error else ""
    raise session.failure(f"changefeed {name} is still being removed after {timeout_s:g} s; it goes on{why}", "deadline_exceeded")


def _wait_until_steady(session: Session, row: pb.Changefeed) -> pb.Changefeed:
    """Until every span follows the source, or the target is reached. A failure when it fails, is paused or removed meanwhile.

    A table's checkpoint stays at its start while it is copied, so a checkpoint beyond the start says that all are.
    """
    timeout_s = session.timeout_s(STEADY_TIMEOUT_S)
    deadline = time.monotonic() + timeout_s
    name = row.changefeed
    session.asked = f"changefeed {name} was created and goes on"
    with Progress(session.output) as progress:
        while True:
            stalled = sum(row.stalls.values())
            follows = row.state == "normal" and row.initialized and not stalled and row.checkpoint_ts > row.start_ts
            if follows or row.state == "finished":
                return row
            text = f"changefeed {name}: {_standing(row)}"
            if row.state not in ("normal", "warning"):
                raise session.failure(text, row.state, changefeed=to_object(row))
            progress.show(text, *((row.spans - stalled, stalled) if row.initialized else ()))
            if time.monotonic() >= deadline:
                text = f"{text} after {timeout_s:g} s; it was created and goes on"
                raise session.failure(text, "deadline_exceeded", changefeed=to_object(row))
            time.sleep(POLL_INTERVAL_S)
            row = session.ask("QueryChangefeed", pb.ChangefeedRequest(changefeed=name), reads=True)


def _standing(row: pb.Changefeed) -> str:
    """How it goes, in a few words."""
    if not row.running or not row.initialized:
        why = f": {row.error}" if row.error else ""
        return f"{row.state}, it is being started{why}" if row.state in ("normal", "warning") else f"{row.state}{why}"
    stalled = sum(row.stalls.values())
    tables = f"{row.spans - stalled} of {row.spans} tables follow the source"
    if not stalled and row.checkpoint_ts <= row.start_ts:
        tables = f"{row.spans} tables are written, and not all have told how far they are"
    return ", ".join(part for part in (row.state, tables, counts(row.stalls), row.error) if part)


def _answer(session: Session, row: pb.Changefeed, more: str = "") -> None:
    if session.output.is_json:
        session.output.json(to_object(row))
    else:
        session.output.line(f"changefeed {row.changefeed} is {row.state}{more}")


def _show(output: Output, row: pb.Changefeed) -> None:
    output.pairs(
        (
            ("changefeed", row.changefeed),
            ("state", row.state),
            ("error", row.error),
            ("source", row.source_uri),
            ("sink", row.sink_uri),
            ("tables", " ".join(row.tables)),
            ("target", row.target_ts or None),
            ("checkpoint", row.checkpoint_ts or None),
            ("resolved", row.resolved_ts or None),
            ("lag", row.lag if row.HasField("lag") else None),
            ("retained at source", size(row.retained_bytes if row.HasField("retained_bytes") else None)),
            ("spans", f"{row.spans}  {counts(row.spans_by_state)}" if row.running else "not running"),
            ("not steady", counts(row.stalls) if row.running else None),
            ("slowest", _slowest(row.slowest) if row.HasField("slowest") else None),
        )
    )
    for job in row.jobs:
        output.line(f"{job.kind} of {job.target}: {job.state}{f': {job.reason}' if job.reason else ''}")


def _slowest(row: pb.TableRow) -> str:
    parts = [row.table or str(row.table_id), f"at {row.checkpoint_ts}", f"{row.state} for {duration(row.state_age_ms)}"]
    if row.primary:
        parts.append(f"on {row.primary}")
    if row.stall_reason:
        parts.append(f"({row.stall_reason})")
    if row.error:
        parts.append(row.error)
    return " ".join(parts)
