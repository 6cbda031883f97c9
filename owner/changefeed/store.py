"""The changefeeds in etcd, and the states of a changefeed.

`TRANSITIONS` is the whole life of a changefeed: for each state and event the next state, or why it
is refused. `step` applies it to a record; no other code of the owner writes `state`. Warning is
never stored: the leader derives it from an error that is being retried, and a new leader finds the
error by itself. The picture in docs/cli.md is drawn from the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

import msgspec
import structlog

from tablewire.errors import ConflictError, OperatingError, UnknownChangefeedError
from tablewire.etcd import keys as etcd_keys
from tablewire.etcd.guarded_write import GuardedWrite
from tablewire.etcd.keys import ChangefeedKey
from tablewire.etcd.records import ChangefeedInfo, ChangefeedState, ChangefeedStatus, decode, encode, next_epoch
from tablewire.etcd.session import EtcdSession
from tablewire.etcd.values import KeyValue, Put, is_absent, is_unchanged
from tablewire.model.ids import ChangefeedID, Ts

CONFLICT_ATTEMPTS = 5
"""How often a change is attempted when another writer changes the same record at the same time."""

_log = structlog.get_logger("owner.changefeeds")


class ChangefeedEvent(StrEnum):
    """What happens to a changefeed: during its run (the first four), or because an operator asked
    for it."""

    ERROR = "error"
    RECOVERED = "recovered"
    FATAL = "fatal"
    TARGET_REACHED = "target_reached"
    PAUSE = "pause"
    RESUME = "resume"
    RESYNC = "resync"
    REMOVE = "remove"


class ChangefeedRefusedError(OperatingError):
    """The state of the changefeed does not allow the request; nothing was changed."""


@dataclass(frozen=True, slots=True)
class Next:
    """The state after an event. restarts: the epoch is raised, so that nothing of the previous run
    counts. copies: the progress is forgotten too, and all tables are copied."""

    state: ChangefeedState
    restarts: bool = False
    copies: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    reason: str


_NORMAL, _WARNING, _FAILED, _STOPPED, _FINISHED, _REMOVED = map(Next, ChangefeedState)
_RESTARTS = Next(ChangefeedState.NORMAL, restarts=True)
_RESYNCS = Next(ChangefeedState.NORMAL, restarts=True, copies=True)
_RUNS = Refused("it is running already")
_PAUSED = Refused("it is paused already")
_ENDED = Refused("it has reached its target and is finished")
_LEAVES = Refused("it is being removed")

# A changefeed that does not run ignores late events of its run. A removal can be requested again, but not undone.
_TABLE: Mapping[Next, Sequence[Next | Refused]] = {
    # state     error      recovered  fatal      target     pause      resume     resync     remove
    _NORMAL:   (_WARNING,  _NORMAL,   _FAILED,   _FINISHED, _STOPPED,  _RUNS,     _RESYNCS,  _REMOVED),
    _WARNING:  (_WARNING,  _NORMAL,   _FAILED,   _FINISHED, _STOPPED,  _RUNS,     _RESYNCS,  _REMOVED),
    _FAILED:   (_FAILED,   _FAILED,   _FAILED,   _FAILED,   _STOPPED,  _RESTARTS, _RESYNCS,  _REMOVED),
    _STOPPED:  (_STOPPED,  _STOPPED,  _STOPPED,  _STOPPED,  _PAUSED,   _RESTARTS, _RESYNCS,  _REMOVED),
    _FINISHED: (_FINISHED, _FINISHED, _FINISHED, _FINISHED, _ENDED,    _ENDED,    _ENDED,    _REMOVED),
    _REMOVED:  (_REMOVED,  _REMOVED,  _REMOVED,  _REMOVED,  _LEAVES,   _LEAVES,   _LEAVES,   _REMOVED),
}  # fmt: skip

TRANSITIONS: Mapping[tuple[ChangefeedState, ChangefeedEvent], Next | Refused] = MappingProxyType(
    {(row.state, event): outcome for row, cells in _TABLE.items() for event, outcome in zip(ChangefeedEvent, cells, strict=True)}
)


def step(info: ChangefeedInfo, event: ChangefeedEvent, *, error: str = "", revision: int = 0, by: str = "") -> ChangefeedInfo:
    """Return the record after the event; the same object if nothing changes. Pure.

    error: the text of ERROR and FATAL. revision: a recent revision of etcd, for the epoch of a
    restart. by: the caller. ChangefeedRefusedError names the changefeed and the reason.
    """
    outcome = TRANSITIONS[info.state, event]
    if isinstance(outcome, Refused):
        raise ChangefeedRefusedError(f"changefeed {info.changefeed}: cannot {event}: {outcome.reason}")
    if outcome.state is info.state and not info.state.runs and event is not ChangefeedEvent.REMOVE:
        return info
    epoch = next_epoch(info.epoch, revision) if outcome.restarts else info.epoch
    if (outcome.state, error, epoch) == (info.state, info.error, info.epoch):
        return info
    changed = msgspec.structs.replace(info, state=outcome.state, error=error, epoch=epoch, asked_by=by)
    if not outcome.copies:
        return changed
    return msgspec.structs.replace(changed, start_ts=0, initial_snapshot=True, generation=info.generation + 1)


def replaced(
    info: ChangefeedInfo, checked: ChangefeedInfo, tables: Sequence[str], options: Mapping[str, str], by: str = ""
) -> ChangefeedInfo:
    """Return the record with another filter and options; ConflictError if it is not the one that
    was checked. Pure."""
    if info != checked or info.state is not ChangefeedState.STOPPED:
        raise ConflictError(f"changefeed {info.changefeed} was changed meanwhile; nothing was changed: try again")
    return msgspec.structs.replace(info, tables=list(tables), options=dict(options), asked_by=by)


class EtcdChangefeeds:
    """The changefeeds in etcd. Any thread; every call may block until the session's deadline.

    Errors of the writes: NotLeaderError (this owner does not lead), ConflictError (the id exists,
    or other writers kept changing the record), UnknownChangefeedError, ChangefeedRefusedError (the
    state does not allow it), EtcdError.
    """

    def __init__(self, session: EtcdSession, cluster: str, write: GuardedWrite) -> None:
        self._session = session
        self._cluster = cluster
        self._write = write

    def list(self) -> Sequence[ChangefeedInfo]:
        """Return all changefeeds, by id. One whose record cannot be read is logged and left out."""
        items, _ = self._session.get_prefix(etcd_keys.changefeeds_prefix(self._cluster))
        infos = []
        for item in items:
            place = etcd_keys.changefeed_of(self._cluster, item.key)
            if place is None or place[1] is not ChangefeedKey.INFO:
                continue
            try:
                infos.append(decode(ChangefeedInfo, item.key, item.value))
            except OperatingError as error:
                _log.warning("unreadable_changefeed", reason=str(error))
        return sorted(infos, key=lambda info: info.changefeed)

    def get(self, changefeed: ChangefeedID) -> ChangefeedInfo:
        return self._read(changefeed)[0]

    def create(self, info: ChangefeedInfo) -> None:
        """Store a new changefeed, at a higher epoch than every earlier changefeed of this id had."""
        key = etcd_keys.changefeed_info_key(self._cluster, info.changefeed)
        _, revision = self._session.get_prefix(key)
        record = msgspec.structs.replace(info, epoch=next_epoch(0, revision))
        try:
            self._write([Put(key, encode(record))], extra_compares=[is_absent(key)])
        except ConflictError:
            raise ConflictError(f"changefeed {info.changefeed} exists already; nothing was changed") from None

    def update(
        self,
        changefeed: ChangefeedID,
        checked: ChangefeedInfo,
        *,
        tables: Sequence[str],
        options: Mapping[str, str],
        by: str = "",
    ) -> None:
        """Store another filter and options of a stopped changefeed, if its record is still the one
        that was checked."""

        def change(info: ChangefeedInfo, _revision: int) -> ChangefeedInfo:
            return replaced(info, checked, tables, options, by)

        self._change(changefeed, change)

    def apply(
        self, changefeed: ChangefeedID, event: ChangefeedEvent, *, error: str = "", epoch: int | None = None, by: str = ""
    ) -> ChangefeedInfo:
        """Apply an event and return the record. epoch: that of the run that caused the event; if
        the changefeed has another epoch now, nothing changes. by: the caller."""

        def change(info: ChangefeedInfo, revision: int) -> ChangefeedInfo:
            if epoch is not None and info.epoch != epoch:
                return info
            return step(info, event, error=error, revision=revision, by=by)

        return self._change(changefeed, change)

    def set_start(self, changefeed: ChangefeedID, epoch: int, start_ts: Ts) -> ChangefeedInfo:
        """Store the start position, once, and return the record. Nothing changes if the changefeed
        has another epoch now."""

        def change(info: ChangefeedInfo, _revision: int) -> ChangefeedInfo:
            if info.epoch != epoch or info.start_ts:
                return info
            return msgspec.structs.replace(info, start_ts=start_ts)

        return self._change(changefeed, change)

    def set_status(self, changefeed: ChangefeedID, status: ChangefeedStatus, info_revision: int) -> None:
        """Store the progress. ConflictError if the record has changed since info_revision (its
        mod_revision): so the status of a removed changefeed cannot reappear."""
        info_key = etcd_keys.changefeed_info_key(self._cluster, changefeed)
        put = Put(etcd_keys.changefeed_status_key(self._cluster, changefeed), encode(status))
        self._write([put], extra_compares=[is_unchanged(info_key, info_revision)])

    def forget(self, changefeed: ChangefeedID, epoch: int) -> None:
        """Delete the keys of this changefeed, if it is removed and still has this epoch."""
        info, found = self._read(changefeed)
        if info.epoch != epoch or info.state is not ChangefeedState.REMOVED:
            raise ConflictError(f"changefeed {changefeed} is not the one that was removed")
        keys = [found.key, etcd_keys.changefeed_status_key(self._cluster, changefeed)]
        self._write([], keys, extra_compares=[is_unchanged(found.key, found.mod_revision)])

    def _change(self, changefeed: ChangefeedID, change: Callable[[ChangefeedInfo, int], ChangefeedInfo]) -> ChangefeedInfo:
        for _ in range(CONFLICT_ATTEMPTS):
            before, found = self._read(changefeed)
            after = change(before, found.mod_revision)
            if after is before:
                return before
            try:
                self._write([Put(found.key, encode(after))], extra_compares=[is_unchanged(found.key, found.mod_revision)])
            except ConflictError:
                continue
            return after
        raise ConflictError(f"changefeed {changefeed} is being changed by other requests: try again")

    def _read(self, changefeed: ChangefeedID) -> tuple[ChangefeedInfo, KeyValue]:
        key = etcd_keys.changefeed_info_key(self._cluster, changefeed)
        found = self._session.get(key)
        if found is None:
            raise UnknownChangefeedError(f"no changefeed {changefeed}")
        return decode(ChangefeedInfo, key, found.value), found
