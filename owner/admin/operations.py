"""The operations on changefeeds and tables, which `owner.admin.grpc_service` serves.

Operations may be called from any thread. They answer with the messages of admin.proto, read the
snapshot of the last tick, and never wait for a tick. A failure is an OperatingError with one line
of text; its class determines the status code of the API. `by` is the caller
(`owner.admin.caller_identity`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress

import msgspec
import structlog

from owner.admin import tables_view
from owner.admin.errors import AlreadyExistsError, InvalidRequestError, RefusedError
from owner.admin.jobs import FollowedJob, open_jobs
from owner.admin.ports import OwnerPort
from owner.admin.resolve import (
    check_capture,
    current_state,
    find_changefeed,
    names_text,
    parse_changefeed,
    rebalanced,
    running,
    runtime_of,
    scheduler_of,
    table_id_of,
    table_names,
)
from owner.changefeed.sources import source_request
from owner.changefeed.store import ChangefeedEvent, step
from tablewire.errors import ChangesLostError, OperatingError, UnknownChangefeedError
from tablewire.etcd.records import ChangefeedInfo, ChangefeedState, now
from tablewire.model.ids import CaptureID
from tablewire.runtime.uris import redact_uri
from tablewire.runtime.version import software_version
from tablewire.source import CheckFailure, VerifiedSource
from tablewire.v1 import admin_pb2 as pb

URI_LENGTH_MAX = 4_096
PATTERNS_MAX = 1_000
OPTIONS_MAX = 100

_log = structlog.get_logger("owner.admin")


# ---------------------------------------------------------------------------------------------------------------------
# Changefeeds


def list_changefeeds(owner: OwnerPort) -> Sequence[pb.Changefeed]:
    return [_changefeed_row(owner, info) for info in sorted(owner.changefeeds.list(), key=lambda info: info.changefeed)]


def query_changefeed(owner: OwnerPort, text: str) -> pb.Changefeed:
    return _changefeed_row(owner, find_changefeed(owner, text))


def create_changefeed(owner: OwnerPort, request: pb.CreateChangefeedRequest, by: str = "") -> pb.Changefeed:
    """Run all checks and store the changefeed; if any fails, name all that fail and store nothing."""
    changefeed = parse_changefeed(request.changefeed)
    _check_request(request)
    with suppress(UnknownChangefeedError):
        owner.changefeeds.get(changefeed)
        raise AlreadyExistsError(f"changefeed {changefeed} exists already; nothing was changed")
    info = ChangefeedInfo(
        version=software_version(),
        namespace=changefeed.namespace,
        id=changefeed.id,
        source_uri=request.source_uri,
        sink_uri=request.sink_uri,
        tables=list(request.tables),
        created_at=now(),
        initial_snapshot=not request.skip_snapshot,
        options=dict(request.options),
        target_ts=request.target_ts,
        asked_by=by,
    )
    _check_source(owner, info, "created")
    if not request.dry_run:
        owner.changefeeds.create(info)
        owner.wake()
    return _changefeed_row(owner, info)


def pause_changefeed(owner: OwnerPort, text: str, by: str = "") -> pb.Changefeed:
    """Pause a changefeed. The answer has the retained bytes as last known, even before the paused run knows them."""
    retained_bytes = runtime_of(owner, find_changefeed(owner, text)).retained_bytes
    row = _apply(owner, text, ChangefeedEvent.PAUSE, by)
    if not row.HasField("retained_bytes") and retained_bytes is not None:
        row.retained_bytes = retained_bytes
    return row


def resume_changefeed(owner: OwnerPort, text: str, by: str = "") -> pb.Changefeed:
    """Continue from the checkpoint; refuse it if the source no longer has what follows."""
    info = find_changefeed(owner, text)
    step(info, ChangefeedEvent.RESUME)
    try:
        _verify_source(owner, info)
    except ChangesLostError as error:
        raise RefusedError(f"changefeed {info.changefeed} was not resumed: {redact_uri(str(error))}") from None
    except OperatingError as error:  # the run will retry it, and show the error
        _log.warning("resumes_unverified", changefeed=str(info.changefeed), reason=redact_uri(str(error)))
    return _apply(owner, text, ChangefeedEvent.RESUME, by)


def resync_changefeed(owner: OwnerPort, text: str, by: str = "") -> pb.Changefeed:
    """Start a changefeed from the source as it is now: all tables are copied again. The worker drops what is at the source."""
    if not text:
        raise InvalidRequestError("a resync must name its changefeed")
    return _apply(owner, text, ChangefeedEvent.RESYNC, by)


def update_changefeed(owner: OwnerPort, request: pb.UpdateChangefeedRequest, by: str = "") -> pb.Changefeed:
    """Run all checks and change the filter or options of a paused changefeed, from its next start on."""
    if not (request.tables or request.options or request.unset_options):
        raise InvalidRequestError("nothing to change: give tables or options")
    info = find_changefeed(owner, request.changefeed)
    if info.state is not ChangefeedState.STOPPED:
        state = current_state(owner, info)
        raise RefusedError(f"changefeed {info.changefeed} is {state}: only a paused one can be changed; nothing was changed")
    if unknown := sorted(set(request.unset_options) - info.options.keys()):
        raise InvalidRequestError(f"option {unknown[0]!r} is not set; {names_text('there', info.options)}")
    _check_patterns(request.tables or info.tables, len(info.options) + len(request.options))
    kept = {name: value for name, value in info.options.items() if name not in request.unset_options}
    tables, options = list(request.tables or info.tables), {**kept, **request.options}
    _check_source(owner, msgspec.structs.replace(info, tables=tables, options=options), "changed")
    owner.changefeeds.update(info.changefeed, info, tables=tables, options=options, by=by)
    owner.wake()
    return _changefeed_row(owner, owner.changefeeds.get(info.changefeed))


def remove_changefeed(owner: OwnerPort, text: str, by: str = "") -> str:
    """Mark a changefeed as removed and return its name. The leader cleans up its source and deletes it."""
    if not text:
        raise InvalidRequestError("a removal must name its changefeed")
    changefeed = find_changefeed(owner, text).changefeed
    owner.changefeeds.apply(changefeed, ChangefeedEvent.REMOVE, by=by)
    owner.wake()
    return str(changefeed)


def _apply(owner: OwnerPort, text: str, event: ChangefeedEvent, by: str) -> pb.Changefeed:
    changed = owner.changefeeds.apply(find_changefeed(owner, text).changefeed, event, by=by)
    owner.wake()
    return _changefeed_row(owner, changed)


def _check_request(request: pb.CreateChangefeedRequest) -> None:
    for what, uri in (("source", request.source_uri), ("sink", request.sink_uri)):
        if not re.match(r"[A-Za-z][A-Za-z0-9+.\-]*:", uri):
            raise InvalidRequestError(f"the {what} {redact_uri(uri)!r} is not a URI (scheme://...)")
        if len(uri) > URI_LENGTH_MAX:
            raise InvalidRequestError(f"the {what} URI is longer than {URI_LENGTH_MAX} characters")
    if not request.tables:
        raise InvalidRequestError("no tables: give at least one pattern, such as 'public.*'")
    _check_patterns(request.tables, len(request.options))


def _check_patterns(tables: Sequence[str], options: int) -> None:
    if len(tables) > PATTERNS_MAX or options > OPTIONS_MAX:
        raise InvalidRequestError(f"at most {PATTERNS_MAX} table patterns and {OPTIONS_MAX} options")
    for pattern in tables:
        if not pattern.strip() or pattern != pattern.strip():
            raise InvalidRequestError(f"the table pattern {pattern!r} is empty or has spaces around it")


def _verify_source(owner: OwnerPort, info: ChangefeedInfo) -> None:
    source = owner.new_source(source_request(info, runtime_of(owner, info).watermark.checkpoint_ts))
    try:
        if isinstance(source, VerifiedSource):
            source.verify()
    finally:
        source.close()


def _check_source(owner: OwnerPort, info: ChangefeedInfo, done: str) -> None:
    source = owner.new_source(source_request(info))
    try:
        failures = list(source.check())
        if info.target_ts and not info.start_ts and not failures and (source_ts := source.current_ts()) > info.target_ts:
            failures.append(CheckFailure("target_ts", f"the source is at {source_ts}, past the target {info.target_ts} already"))
    finally:
        source.close()
    if failures:
        named = "; ".join(f"{failure.check}: {redact_uri(failure.reason)}" for failure in failures)
        count = "1 check" if len(failures) == 1 else f"{len(failures)} checks"
        raise RefusedError(f"changefeed {info.changefeed} was not {done}, {count} failed: {named}")


def _changefeed_row(owner: OwnerPort, info: ChangefeedInfo) -> pb.Changefeed:
    runtime, scheduler = runtime_of(owner, info), scheduler_of(owner, info.changefeed)
    watermark, source_ts = runtime.watermark, runtime.source_ts
    row = pb.Changefeed(
        changefeed=str(info.changefeed),
        state=current_state(owner, info),
        error=redact_uri(runtime.error or info.error),
        epoch=info.epoch,
        source_uri=redact_uri(info.source_uri),
        sink_uri=redact_uri(info.sink_uri),
        tables=info.tables,
        skip_snapshot=not info.initial_snapshot,
        start_ts=info.start_ts,
        target_ts=info.target_ts,
        options={name: redact_uri(f"{name}={value}")[len(name) + 1 :] for name, value in info.options.items()},
        running=scheduler is not None,
        checkpoint_ts=watermark.checkpoint_ts,
        resolved_ts=watermark.resolved_ts,
        last_synced_ts=watermark.last_synced_ts,
        source_ts=source_ts,
        lag=max(0, source_ts - watermark.checkpoint_ts) if source_ts and watermark.checkpoint_ts else None,
        retained_bytes=runtime.retained_bytes,
        jobs=[] if scheduler is None else open_jobs(info.changefeed, scheduler),
    )
    if scheduler is not None:
        tables_view.add_summary(row, scheduler.snapshot(), runtime.table_names)
    return row


# ---------------------------------------------------------------------------------------------------------------------
# Tables and jobs


def list_tables(owner: OwnerPort, wanted: pb.ListTablesRequest) -> tuple[str, Iterator[pb.TableRow]]:
    """Return the name of the changefeed and an iterator of its spans. The caller applies the limit."""
    info = find_changefeed(owner, wanted.changefeed)
    snapshot, names = running(owner, info).snapshot(), table_names(owner, info.changefeed)
    table_id = table_id_of(info, names, wanted.table) if wanted.table else None
    if wanted.capture:
        check_capture(owner, wanted.capture)
    spans = tables_view.select_positions(snapshot, capture=wanted.capture, stalled=wanted.stalled, table_id=table_id)
    rows = (tables_view.table_row(span, names, tables_view.rates(snapshot, position)) for position, span in spans)
    return str(info.changefeed), rows


def move_table(owner: OwnerPort, text: str, table: str, target: CaptureID, by: str = "") -> FollowedJob:
    """Ask the scheduler to move a table; its next tick decides."""
    info = find_changefeed(owner, text)
    scheduler, names = running(owner, info), table_names(owner, info.changefeed)
    table_id = table_id_of(info, names, table)
    check_capture(owner, target)
    query = scheduler.move_table(table_id, target, by)
    job = FollowedJob(owner, info.changefeed, scheduler, query, names.get(table_id, str(table_id)))
    job.record_request()
    owner.wake()
    return job


def rebalance(owner: OwnerPort, text: str, by: str = "") -> Sequence[FollowedJob]:
    """Start a job for the named changefeed, or for each that runs. They see each other's loads and plans."""
    jobs = []
    for info, scheduler in rebalanced(owner, text):
        jobs.append(FollowedJob(owner, info.changefeed, scheduler, scheduler.rebalance(by), str(info.changefeed)))
        jobs[-1].record_request()
    owner.wake()
    return jobs
