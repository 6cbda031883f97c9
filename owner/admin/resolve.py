"""How the operations resolve what a request names. Any thread; the only I/O is reading changefeeds from etcd."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from owner.admin.errors import InvalidRequestError, RefusedError, UnknownTableError
from owner.admin.ports import OwnerPort, TermPort
from owner.changefeed.run import ChangefeedRuntime
from tablewire.errors import NotLeaderError, OperatingError, UnknownCaptureError, UnknownChangefeedError
from tablewire.etcd.keys import check_name
from tablewire.etcd.records import ChangefeedInfo, ChangefeedState
from tablewire.model.ids import CaptureID, ChangefeedID, TableID
from tablewire.runtime.uris import redact_uri

if TYPE_CHECKING:
    from owner.changefeed.run import ChangefeedRun
    from owner.scheduling.scheduler import SchedulerAndInfo

DEFAULT_NAMESPACE = "default"
CHANGEFEED_ID_LENGTH_MAX = 48
"""A source names objects after a changefeed; a PostgreSQL slot name has 63 characters, `tablewire_` included."""
NAMES_LISTED_MAX = 10

_CHANGEFEED_ID = re.compile(r"[a-z0-9][a-z0-9_-]*")


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


def check_capture(owner: OwnerPort, capture: CaptureID) -> None:
    """Raise UnknownCaptureError unless the processor is registered."""
    known = leading_term(owner).captures
    if capture not in known:
        raise UnknownCaptureError(f"no processor {capture!r}; {names_text('registered', known)}")


def parse_changefeed(text: str) -> ChangefeedID:
    """Return the changefeed that `id` or `namespace/id` names; raise InvalidRequestError for other texts."""
    namespace, slash, name = text.rpartition("/")
    if not slash:
        namespace = DEFAULT_NAMESPACE
    try:
        check_name("namespace", namespace)
    except OperatingError as error:
        raise InvalidRequestError(str(error)) from error
    if not _CHANGEFEED_ID.fullmatch(name) or len(name) > CHANGEFEED_ID_LENGTH_MAX:
        raise InvalidRequestError(
            f"changefeed id {name[:100]!r} is not valid: lower-case letters, digits, '_' and '-', "
            f"starting with a letter or digit, at most {CHANGEFEED_ID_LENGTH_MAX} characters"
        )
    return ChangefeedID(namespace, name)


def find_changefeed(owner: OwnerPort, text: str) -> ChangefeedInfo:
    """Return the changefeed of this name; for an empty name the only one, if there is only one."""
    if text:
        changefeed = parse_changefeed(text)
        try:
            return owner.changefeeds.get(changefeed)
        except UnknownChangefeedError:
            raise UnknownChangefeedError(f"no changefeed {changefeed}; {_changefeed_names(owner.changefeeds.list())}") from None
    infos = owner.changefeeds.list()
    if len(infos) > 1:  # a changefeed that is being removed counts only if there is no other
        infos = [info for info in infos if info.state is not ChangefeedState.REMOVED] or infos
    if len(infos) == 1:
        return infos[0]
    if not infos:
        raise UnknownChangefeedError("there is no changefeed")
    raise InvalidRequestError(f"there are {len(infos)} changefeeds, so name one; {_changefeed_names(infos)}")


def _changefeed_names(infos: Iterable[ChangefeedInfo]) -> str:
    return names_text("there", (str(info.changefeed) for info in infos))


def run_of(owner: OwnerPort, changefeed: ChangefeedID) -> ChangefeedRun | None:
    """Return the run of a changefeed in the current term, if there is one."""
    term = owner.term
    return None if term is None else term.runs.get(changefeed)


def runtime_of(owner: OwnerPort, info: ChangefeedInfo) -> ChangefeedRuntime:
    """Return what the leader knows of a changefeed; without a run, what is stored."""
    run = run_of(owner, info.changefeed)
    return ChangefeedRuntime(info.state.value, info.error) if run is None else run.runtime()


def scheduler_of(owner: OwnerPort, changefeed: ChangefeedID) -> SchedulerAndInfo | None:
    """Return the scheduler of a changefeed; None if the changefeed does not run here."""
    run = run_of(owner, changefeed)
    return None if run is None else run.scheduler


def schedulers_of(owner: OwnerPort, stored: Iterable[ChangefeedInfo]) -> Iterator[tuple[ChangefeedInfo, SchedulerAndInfo]]:
    """Yield those of the changefeeds that run here, with their schedulers."""
    for info in stored:
        scheduler = scheduler_of(owner, info.changefeed)
        if scheduler is not None:
            yield info, scheduler


def running(owner: OwnerPort, info: ChangefeedInfo) -> SchedulerAndInfo:
    """Return the scheduler of a changefeed; raise RefusedError with the reason if there is none."""
    scheduler = scheduler_of(owner, info.changefeed)
    if scheduler is None:
        why = f"is {current_state(owner, info)}{', but does not run yet' if info.state.runs else ''}"
        error = f": {redact_uri(info.error)}" if info.error else ""
        raise RefusedError(f"changefeed {info.changefeed} {why}, so it has no tables now{error}")
    return scheduler


def rebalanced(owner: OwnerPort, text: str) -> Sequence[tuple[ChangefeedInfo, SchedulerAndInfo]]:
    """Return the changefeeds that a rebalance is about, by name: the named one, or all that run."""
    infos = sorted(owner.changefeeds.list(), key=lambda info: info.changefeed)
    if text or len(infos) < 2:
        info = find_changefeed(owner, text)
        return [(info, running(owner, info))]
    found = list(schedulers_of(owner, infos))
    if not found:
        raise RefusedError(f"none of the {len(infos)} changefeeds runs, so there is nothing to rebalance")
    return found


def current_state(owner: OwnerPort, info: ChangefeedInfo) -> str:
    """Return the stored state, or warning, which only the leader knows.

    Right after a pause or a resume the leader's view is older than the stored state.
    """
    seen = ChangefeedState(runtime_of(owner, info).state)
    return seen.value if info.state.runs and seen.runs else info.state.value


def table_names(owner: OwnerPort, changefeed: ChangefeedID) -> Mapping[TableID, str]:
    """Return the known names of a changefeed's tables."""
    run = run_of(owner, changefeed)
    return {} if run is None else run.runtime().table_names


def table_id_of(info: ChangefeedInfo, names: Mapping[TableID, str], table: str) -> TableID:
    """Return the id of a table that is given by its id or name."""
    if re.fullmatch(r"-?[0-9]{1,19}", table):
        return int(table)
    for table_id, name in names.items():
        if name == table:
            return table_id
    raise UnknownTableError(f"no table {table[:200]!r} in changefeed {info.changefeed}; {names_text('there', names.values())}")


def names_text(what: str, names: Iterable[str]) -> str:
    """Return a short list of names, in order, for the end of an error's text."""
    ordered = sorted(names)
    more = f" and {len(ordered) - NAMES_LISTED_MAX} more" if len(ordered) > NAMES_LISTED_MAX else ""
    return f"{what}: {', '.join(ordered[:NAMES_LISTED_MAX]) or 'none'}{more}"
