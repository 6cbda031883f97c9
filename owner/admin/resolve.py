"""Parts that several operations share: finding what a request names, and saying what is there. Any thread, no I/O of its own
but the registry's reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from owner.admin.errors import RefusedError, UnknownTableError
from owner.admin.ports import OwnerPort, TermPort
from tablewire.errors import NotLeaderError, UnknownCaptureError
from tablewire.etcd.records import ChangefeedInfo, ChangefeedState
from tablewire.model.ids import CaptureID, ChangefeedID, TableID
from tablewire.runtime.uris import redact_uri

if TYPE_CHECKING:
    from owner.changefeed.run import ChangefeedRun, ChangefeedRuntime
    from owner.scheduling.scheduler import SchedulerAndInfo

NAMES_IN_A_TEXT_MAX = 10


def schedulers(owner: OwnerPort) -> Iterator[tuple[ChangefeedID, SchedulerAndInfo]]:
    return schedulers_of(owner, owner.changefeeds.list())


def schedulers_of(owner: OwnerPort, stored: Iterable[ChangefeedInfo]) -> Iterator[tuple[ChangefeedID, SchedulerAndInfo]]:
    """Of those changefeeds that run here."""
    for info in stored:
        scheduler = scheduler_of(owner, info.changefeed)
        if scheduler is not None:
            yield info.changefeed, scheduler


def leads(owner: OwnerPort) -> bool:
    """Return whether this owner leads and has read the state in etcd."""
    term = owner.term
    return term is not None and term.leads


def leading_term(owner: OwnerPort) -> TermPort:
    """Return the current term; raise NotLeaderError if there is none."""
    term = owner.term
    if term is None:
        raise NotLeaderError(f"owner {owner.owner_id} does not lead")
    return term


def run_of(owner: OwnerPort, changefeed: ChangefeedID) -> ChangefeedRun | None:
    """Return the run of a changefeed in the current term, if there is one."""
    term = owner.term
    return None if term is None else term.runs.get(changefeed)


def scheduler_of(owner: OwnerPort, changefeed: ChangefeedID) -> SchedulerAndInfo | None:
    """Return the scheduler of a changefeed; None if the changefeed does not run here."""
    run = run_of(owner, changefeed)
    return None if run is None else run.scheduler


def runtime_of(owner: OwnerPort, changefeed: ChangefeedID) -> ChangefeedRuntime | None:
    """Return what the leader knows of a changefeed; None on an owner that does not lead."""
    run = run_of(owner, changefeed)
    return None if run is None else run.runtime()


def current_state(owner: OwnerPort, info: ChangefeedInfo) -> str:
    """What etcd holds, where the leader knows better only that a running one is in warning (which is never stored): right
    after a pause or resume it has not looked yet."""
    runtime = runtime_of(owner, info.changefeed) if info.state.runs else None
    seen = ChangefeedState(runtime.state) if runtime is not None else info.state
    return seen.value if seen.runs else info.state.value


def check_capture(owner: OwnerPort, capture: CaptureID) -> None:
    known = leading_term(owner).captures
    if capture not in known:
        raise UnknownCaptureError(f"no capture {capture!r}; {names_text('registered', sorted(known))}")


def names_text(what: str, names: Sequence[str]) -> str:
    """A short list for the end of an error's text."""
    if not names:
        return f"{what}: none"
    more = f" and {len(names) - NAMES_IN_A_TEXT_MAX} more" if len(names) > NAMES_IN_A_TEXT_MAX else ""
    return f"{what}: {', '.join(names[:NAMES_IN_A_TEXT_MAX])}{more}"


def running(owner: OwnerPort, info: ChangefeedInfo) -> SchedulerAndInfo:
    """The changefeed's scheduler; RefusedError with the reason when it has none."""
    scheduler = scheduler_of(owner, info.changefeed)
    if scheduler is None:
        state = current_state(owner, info)
        why = f"is {state}" if not info.state.runs else f"is {state}, but does not run yet"
        error = f": {redact_uri(info.error)}" if info.error else ""
        raise RefusedError(f"changefeed {info.changefeed} {why}, so it has no tables now{error}")
    return scheduler


def table_names(owner: OwnerPort, info: ChangefeedInfo) -> Mapping[TableID, str]:
    runtime = runtime_of(owner, info.changefeed)
    return runtime.table_names if runtime is not None else {}


def table_id_of(info: ChangefeedInfo, names: Mapping[TableID, str], table: str) -> TableID:
    """By id, or by the name as the source tells it."""
    if re.fullmatch(r"-?[0-9]{1,19}", table):
        return int(table)
    found = [table_id for table_id, name in names.items() if name == table]
    if not found:
        raise UnknownTableError(
            f"no table {table[:200]!r} in changefeed {info.changefeed}; {names_text('there', sorted(names.values()))}"
        )
    return found[0]
