"""owner changefeed create | list | query | statistics | pause | resume | resync | update | remove"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from owner.cli.json_objects import to_object
from owner.cli.options import Session, remote
from owner.cli.output import CommandError, Output, ProgressBar, counts, duration, number, optional, size
from owner.cli.parameters import (
    LIST_TIMEOUT_S,
    ROWS_SHOWN_MAX,
    changefeed_argument,
    exclude_each_other,
    limit_option,
    name_values,
    required_changefeed_argument,
)
from tablewire.model.ids import TS_MAX
from tablewire.postgres.filters import split_patterns
from tablewire.postgres.lsn import parse_lsn
from tablewire.runtime.text import plural

if TYPE_CHECKING:
    from tablewire.v1 import admin_pb2 as pb

CHECKS_TIMEOUT_S = 60.0
REMOVE_TIMEOUT_S = 60.0
STEADY_TIMEOUT_S = 600.0


@click.group("changefeed")
def changefeed_group() -> None:
    """Create, show and change changefeeds (replication jobs)."""


def _ts(_context: click.Context, parameter: click.Parameter, value: str | None) -> int:
    """Return a position from a whole number or an LSN; 0 if it is not given."""
    text = (value or "0").strip()
    if re.fullmatch(r"[0-9]{1,20}", text) and int(text) <= TS_MAX:
        return int(text)
    try:
        return parse_lsn(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither a number nor an LSN such as 0/16B3748", param=parameter) from None


def _patterns(_context: click.Context, _parameter: click.Parameter, given: Sequence[str]) -> list[str]:
    return [pattern for text in given for pattern in split_patterns(text)]


_options_option = click.option(
    *("--source-option", "--sink-option", "options"),
    multiple=True,
    callback=name_values(unique=True),
    metavar="NAME=VALUE",
    help="An option of the source's plug-in, the executor or the sink; both spellings set the same options.",
)


_on_conflict_option = click.option(
    "--on-conflict",
    type=click.Choice(["source-wins", "skip", "error"]),
    help="What a PostgreSQL sink does with a change that finds another row there than at the source; the same as the option"
    " on_conflict.",
)


def _with_on_conflict(options: dict[str, str], on_conflict: str | None) -> dict[str, str]:
    if on_conflict is None:
        return options
    if "on_conflict" in options:
        raise click.UsageError("--on-conflict and the option on_conflict exclude each other")
    return {**options, "on_conflict": on_conflict}


@changefeed_group.command("create")
@remote
@click.option("--id", "changefeed", required=True, metavar="ID", help="Lower-case letters, digits, '_', '-'; or NAMESPACE/ID.")
@click.option(
    *("--source", "source_uri"),
    required=True,
    metavar="URI",
    help="postgresql://USER:${PASSWORD}@HOST/DATABASE. ${NAME} is stored as written; owners and processors replace it by "
    "their environment variable NAME.",
)
@click.option("--sink", "sink_uri", required=True, metavar="URI", help="postgresql://..., file:///folder or blackhole://")
@click.option(
    "--tables",
    multiple=True,
    required=True,
    callback=_patterns,
    metavar="PATTERN",
    help="schema.table with * and ?; '!pattern' excludes tables; names with dots are written in double quotes. May be repeated, "
    "or separated by commas.",
)
@click.option("--no-snapshot", "skip_snapshot", is_flag=True, help="Replicate changes from now on, without the rows that exist.")
@_options_option
@_on_conflict_option
@click.option(
    "--target-ts",
    callback=_ts,
    metavar="TS",
    help="Stop exactly at this position (the state is then finished): a number, or an LSN such as 0/16B3748.",
)
@click.option("--dry-run", is_flag=True, help="Run all checks and store nothing.")
@click.option("--wait", is_flag=True, help="Wait until all tables are copied and follow the source; --timeout-s, else 600 s.")
def create(session: Session, changefeed: str, dry_run: bool, wait: bool, on_conflict: str | None, **fields: Any) -> None:
    """Create a changefeed and start it.

    All checks run first. If any fails, all failed checks are shown and nothing is stored.
    """
    # The parameters that are not named here have the names of the request's fields.
    exclude_each_other(dry_run=dry_run, wait=wait)
    fields["options"] = _with_on_conflict(fields["options"], on_conflict)
    session.pending = "" if dry_run else f"{changefeed} may have been created: see `owner changefeed list`"
    answer = session.ask(
        "CreateChangefeed",
        timeout_s=session.timeout_s(CHECKS_TIMEOUT_S),
        changefeed=changefeed,
        dry_run=dry_run,
        **fields,
    )
    if wait:
        answer = _wait_until_steady(session, answer)
    done = "all checks passed; nothing was stored" if dry_run else f"created{f': {_progress(answer)}' if wait else ''}"
    session.output.result(to_object(answer), f"changefeed {answer.changefeed}{':' if dry_run else ''} {done}")


@changefeed_group.command("list")
@remote
def list_(session: Session) -> None:
    """List all changefeeds."""
    answer = session.ask("ListChangefeeds")
    if session.output.is_json:
        session.output.json(to_object(answer))
        return
    session.output.table(
        (
            ("CHANGEFEED", "changefeed"),
            ("STATE", "state"),
            ("#TABLES", lambda row: row.spans if row.running else None),
            ("#STALLED", lambda row: sum(row.stalls.values()) if row.running else None),
            ("#CHECKPOINT", lambda row: row.checkpoint_ts or None),
            ("#LAG", "lag"),
            ("#RETAINED", lambda row: size(optional(row, "retained_bytes"))),
            ("ERROR", "error"),
        ),
        answer.changefeeds,
    )


@changefeed_group.command("query")
@remote
@changefeed_argument
def query(session: Session, changefeed: str) -> None:
    """Show the progress of a changefeed, what it waits for, and what it costs the source.

    ID is optional if there is only one changefeed.
    """
    answer = session.ask("QueryChangefeed", changefeed=changefeed)
    if session.output.is_json:
        session.output.json(to_object(answer))
    else:
        _show(session.output, answer)


@changefeed_group.command("pause")
@remote
@changefeed_argument
def pause(session: Session, changefeed: str) -> None:
    """Stop replicating and keep the position. The source retains all later changes; `query` shows how much."""
    answer = session.ask("PauseChangefeed", changefeed=changefeed)
    retained = size(optional(answer, "retained_bytes"))
    _print_state(session, answer, f"; the source retains {retained} for it, and more with each change" if retained else "")


@changefeed_group.command("resume")
@remote
@changefeed_argument
def resume(session: Session, changefeed: str) -> None:
    """Continue from the checkpoint after a pause or a failure."""
    _print_state(session, session.ask("ResumeChangefeed", timeout_s=session.timeout_s(CHECKS_TIMEOUT_S), changefeed=changefeed))


@changefeed_group.command("resync")
@remote
@required_changefeed_argument
@click.option("--wait", is_flag=True, help="Wait until all tables are copied and follow the source; --timeout-s, else 600 s.")
def resync(session: Session, changefeed: str, wait: bool) -> None:
    """Copy all tables again, and follow the source from there.

    The way out when changes are lost: the source failed over without them, was restored, or no longer
    has the changefeed's slot. The sink stays readable: each table keeps its content until its new copy
    is complete. Works in every state except finished and removed, also for a changefeed that was created
    with --no-snapshot; tables that are added later are then copied too.

    \b
    Example:
      owner changefeed resync orders --wait
    """
    answer = session.ask("ResyncChangefeed", changefeed=changefeed)
    if wait:
        answer = _wait_until_steady(session, answer, "copied again")
    _print_state(session, answer, f": {_progress(answer)}" if wait else "; all tables are being copied again")


def _print_state(session: Session, row: pb.Changefeed, more: str = "") -> None:
    session.output.result(to_object(row), f"changefeed {row.changefeed} is {row.state}{more}")


@changefeed_group.command("update")
@remote
@required_changefeed_argument
@click.option(
    "--tables", multiple=True, callback=_patterns, metavar="PATTERN", help="The new filter, as in `create`; replaces the old one."
)
@_options_option
@_on_conflict_option
@click.option("--unset-option", "unset_options", multiple=True, metavar="NAME", help="Reset the option to its default.")
def update(session: Session, changefeed: str, on_conflict: str | None, **fields: Any) -> None:
    """Change the tables or options of a paused changefeed.

    All checks run first, as in `create`; `resume` applies the changes. A table that is added starts
    as with `create`; the rows of a table that is removed stay in the sink. Source, sink and target
    cannot be changed, because data and positions belong to them: create another changefeed instead.
    """
    fields["options"] = _with_on_conflict(fields["options"], on_conflict)
    if not any(fields.values()):
        raise click.UsageError("nothing to change: give --tables, --source-option, --sink-option or --unset-option")
    answer = session.ask("UpdateChangefeed", timeout_s=session.timeout_s(CHECKS_TIMEOUT_S), changefeed=changefeed, **fields)
    text = f"changefeed {answer.changefeed} was changed; `owner changefeed resume` starts it"
    session.output.result(to_object(answer), text)


@changefeed_group.command("remove")
@remote
@required_changefeed_argument
@click.option("--wait", is_flag=True, help="Wait until it is gone from the source and from the cluster.")
def remove(session: Session, changefeed: str, wait: bool) -> None:
    """Stop a changefeed, drop what it created at the source, and delete it. Data in the sink stays."""
    name = session.ask("RemoveChangefeed", changefeed=changefeed).changefeed
    session.pending = f"the removal of {name} continues"
    if wait:
        _wait_until_gone(session, name)
    text = f"changefeed {name} {'is removed' if wait else 'is being removed'}"
    session.output.result({"changefeed": name, "gone": wait}, text)


def _wait_until_gone(session: Session, name: str) -> None:
    shown = error = ""
    for _ in session.polls(REMOVE_TIMEOUT_S):
        try:
            error = session.ask("QueryChangefeed", changefeed=name).error
        except CommandError as failure:
            if failure.code == "not_found":
                return
            raise
        if error != shown:
            shown = error
            session.output.note(f"changefeed {name}: {error or 'being removed'}")
    why = f": {error}" if error else ""
    text = f"changefeed {name} is still being removed after {session.timeout_s(REMOVE_TIMEOUT_S):g} s; it continues{why}"
    raise CommandError("deadline_exceeded", text)


def _wait_until_steady(session: Session, row: pb.Changefeed, done: str = "created") -> pb.Changefeed:
    """Wait until every table follows the source or the target is reached.

    Fail if the changefeed fails, is paused or removed. The checkpoint of a table stays at its start
    during its copy, so a checkpoint past the start means that all are copied.
    """
    name, text = row.changefeed, ""
    session.pending = f"changefeed {name} was {done} and continues"
    with ProgressBar(session.output) as bar:
        for _ in session.polls(STEADY_TIMEOUT_S):
            row = session.ask("QueryChangefeed", changefeed=name)
            stalled = sum(row.stalls.values())
            follows = row.state == "normal" and row.initialized and not stalled and 0 < row.start_ts < row.checkpoint_ts
            if follows or row.state == "finished":
                return row
            text = f"changefeed {name}: {_progress(row)}"
            if row.state not in ("normal", "warning"):
                raise CommandError(row.state, text, changefeed=to_object(row))
            bar.show(text, *((row.spans - stalled, stalled) if row.initialized else ()))
    text = f"{text} after {session.timeout_s(STEADY_TIMEOUT_S):g} s; it was {done} and continues"
    raise CommandError("deadline_exceeded", text, changefeed=to_object(row))


def _progress(row: pb.Changefeed) -> str:
    """Return the progress of a new changefeed in a few words."""
    if not row.running or not row.initialized:
        why = f": {row.error}" if row.error else ""
        return f"{row.state}, starting{why}" if row.state in ("normal", "warning") else f"{row.state}{why}"
    stalled = sum(row.stalls.values())
    tables = f"{row.spans - stalled} of {plural(row.spans, 'table')} following the source"
    if not stalled and row.checkpoint_ts <= row.start_ts:
        tables = f"{plural(row.spans, 'table')} replicating, not all of which have reported their progress"
    return ", ".join(part for part in (row.state, tables, counts(row.stalls), row.error) if part)


def _show(output: Output, row: pb.Changefeed) -> None:
    output.pairs(
        (
            ("changefeed", row.changefeed),
            ("state", row.state),
            ("error", row.error),
            ("source", row.source_uri),
            ("sink", row.sink_uri),
            ("filter", " ".join(row.tables)),
            ("target", row.target_ts or None),
            ("checkpoint", row.checkpoint_ts or None),
            ("resolved", row.resolved_ts or None),
            ("lag", optional(row, "lag")),
            ("retained at source", size(optional(row, "retained_bytes"))),
            ("tables", f"{row.spans}  {counts(row.spans_by_state)}" if row.running else "not running"),
            ("not steady", counts(row.stalls) if row.running else None),
            ("slowest", _slowest(row.slowest) if row.HasField("slowest") else None),
        )
    )
    for job in row.jobs:
        output.line(f"{job.kind} of {job.target}: {job.state}{f': {job.reason}' if job.reason else ''}")


def _slowest(row: pb.TableRow) -> str:
    parts = [row.table or str(row.table_id), f"at {row.checkpoint_ts}", f"{row.state} for {duration(row.state_age_ms)}"]
    parts += [f"on {row.primary}"] if row.primary else []
    parts += [f"({row.stall_reason})"] if row.stall_reason else []
    return " ".join([*parts, row.error])


# ---------------------------------------------------------------------------------------------------------------------
# Statistics

_TOTAL = ("changefeed", "state", "spans", "rows_per_s", "bytes_per_s", "lag", "retained_bytes", "stalls")
_TABLE = ("table_id", "table", "start_key", "end_key", "primary", "rows_per_s", "bytes_per_s", "checkpoint_ts", "stall_reason")


@changefeed_group.command("statistics")
@remote
@changefeed_argument
@limit_option("tables")
def statistics(session: Session, changefeed: str, limit: int | None) -> None:
    """Show the write rate and the lag of each table, busiest first, and of the whole changefeed.

    Rates are as last reported by the executors (about once in scheduler.stats_interval_ms). A lag
    is the distance from the source's position to the checkpoint (PostgreSQL: bytes of WAL). The
    stall reason `snapshot` marks an initial copy; its progress is not known.
    """
    total = session.ask("QueryChangefeed", changefeed=changefeed)
    rows: list[pb.TableRow] = []
    if total.running:
        chunks = session.client.stream("ListTables", session.timeout_s(LIST_TIMEOUT_S), changefeed=total.changefeed)
        rows = sorted((row for chunk in chunks for row in chunk.tables), key=lambda row: (-row.bytes_per_s, row.checkpoint_ts))
    if session.output.is_json:
        found = to_object(total)
        tables = [_as_json(row, total) for row in rows[: limit or None]]
        session.output.json({**{name: found[name] for name in _TOTAL}, "tables": tables})
    else:
        _show_statistics(session, total, rows, ROWS_SHOWN_MAX if limit is None else limit)


def _show_statistics(session: Session, total: pb.Changefeed, rows: list[pb.TableRow], limit: int) -> None:
    output = session.output
    output.pairs(
        (
            ("changefeed", total.changefeed),
            ("state", total.state),
            ("rows/s", number(optional(total, "rows_per_s"))),
            ("bytes/s", size(optional(total, "bytes_per_s"))),
            ("lag", optional(total, "lag")),
            ("retained at source", size(optional(total, "retained_bytes"))),
            ("tables", total.spans if total.running else "not running"),
            ("not steady", counts(total.stalls)),
        )
    )
    if not total.running:
        return
    output.line("")
    output.table(
        (
            ("TABLE", lambda row: row.table or row.table_id),
            ("#ROWS/S", lambda row: number(optional(row, "rows_per_s"))),
            ("#BYTES/S", lambda row: size(optional(row, "bytes_per_s"))),
            ("#LAG", lambda row: _lag(row, total)),
            ("#CHECKPOINT", lambda row: row.checkpoint_ts or None),
            ("PROCESSOR", "primary"),
            ("STALL", "stall_reason"),
        ),
        rows[: limit or None],
    )
    if limit and len(rows) > limit:
        output.note(f"only {limit} of {plural(len(rows), 'table')} are shown; --limit 0 shows all")


def _as_json(row: pb.TableRow, total: pb.Changefeed) -> dict[str, Any]:
    found = to_object(row)
    return {**{name: found[name] for name in _TABLE}, "lag": _lag(row, total)}


def _lag(row: pb.TableRow, total: pb.Changefeed) -> int | None:
    """Return the lag of a table; None if the position of the source or of the table is unknown."""
    return max(0, total.source_ts - row.checkpoint_ts) if total.source_ts and row.checkpoint_ts else None
