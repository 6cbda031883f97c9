"""The changefeeds as etcd has them, and the states of one changefeed as data.

`TRANSITIONS` is the whole life of a changefeed: every state with every event, each a next state or a refusal with its
reason. `step` applies it to a record; nothing else in the owner writes `state`. Warning is never stored: it is what the
leader sees now (an error being retried), and a new leader finds it again by itself. docs/cli.md has the
picture, drawn from the table.
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
"""How often a change is tried again after another writer changed the same record in between."""

_log = structlog.get_logger("owner.changefeeds")


class ChangefeedEvent(StrEnum):
    """What can happen to a changefeed: to it (error, recovered, fatal, target_reached) or by an operator (the others)."""

    ERROR = "error"
    RECOVERED = "recovered"
    FATAL = "fatal"
    TARGET_REACHED = "target_reached"
    PAUSE = "pause"
    RESUME = "resume"
    REMOVE = "remove"


class ChangefeedRefusedError(OperatingError):
    """The state of the changefeed does not allow what was asked; nothing was changed."""


@dataclass(frozen=True, slots=True)
class Next:
    """The state after the event. restarts: it starts anew, at a higher epoch, so that nothing of its former run counts."""

    state: ChangefeedState
    restarts: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    reason: str


_NORMAL, _WARNING, _FAILED = ChangefeedState.NORMAL, ChangefeedState.WARNING, ChangefeedState.FAILED
_STOPPED, _FINISHED, _REMOVED = ChangefeedState.STOPPED, ChangefeedState.FINISHED, ChangefeedState.REMOVED
_EVENT = ChangefeedEvent

_RUNS = Refused("it is running already")
_IS_FINISHED = Refused("it has reached its target and is finished")
_IS_REMOVED = Refused("it is being removed")

TRANSITIONS: Mapping[tuple[ChangefeedState, ChangefeedEvent], Next | Refused] = MappingProxyType(
    {
        (_NORMAL, _EVENT.ERROR): Next(_WARNING),
        (_NORMAL, _EVENT.RECOVERED): Next(_NORMAL),
        (_NORMAL, _EVENT.FATAL): Next(_FAILED),
        (_NORMAL, _EVENT.TARGET_REACHED): Next(_FINISHED),
        (_NORMAL, _EVENT.PAUSE): Next(_STOPPED),
        (_NORMAL, _EVENT.RESUME): _RUNS,
        (_NORMAL, _EVENT.REMOVE): Next(_REMOVED),
        #
        (_WARNING, _EVENT.ERROR): Next(_WARNING),
        (_WARNING, _EVENT.RECOVERED): Next(_NORMAL),
        (_WARNING, _EVENT.FATAL): Next(_FAILED),
        (_WARNING, _EVENT.TARGET_REACHED): Next(_FINISHED),
        (_WARNING, _EVENT.PAUSE): Next(_STOPPED),
        (_WARNING, _EVENT.RESUME): _RUNS,
        (_WARNING, _EVENT.REMOVE): Next(_REMOVED),
        # What does not run sees no events of its run: a late one changes nothing.
        (_FAILED, _EVENT.ERROR): Next(_FAILED),
        (_FAILED, _EVENT.RECOVERED): Next(_FAILED),
        (_FAILED, _EVENT.FATAL): Next(_FAILED),
        (_FAILED, _EVENT.TARGET_REACHED): Next(_FAILED),
        (_FAILED, _EVENT.PAUSE): Next(_STOPPED),
        (_FAILED, _EVENT.RESUME): Next(_NORMAL, restarts=True),
        (_FAILED, _EVENT.REMOVE): Next(_REMOVED),
        #
        (_STOPPED, _EVENT.ERROR): Next(_STOPPED),
        (_STOPPED, _EVENT.RECOVERED): Next(_STOPPED),
        (_STOPPED, _EVENT.FATAL): Next(_STOPPED),
        (_STOPPED, _EVENT.TARGET_REACHED): Next(_STOPPED),
        (_STOPPED, _EVENT.PAUSE): Refused("it is paused already"),
        (_STOPPED, _EVENT.RESUME): Next(_NORMAL, restarts=True),
        (_STOPPED, _EVENT.REMOVE): Next(_REMOVED),
        #
        (_FINISHED, _EVENT.ERROR): Next(_FINISHED),
        (_FINISHED, _EVENT.RECOVERED): Next(_FINISHED),
        (_FINISHED, _EVENT.FATAL): Next(_FINISHED),
        (_FINISHED, _EVENT.TARGET_REACHED): Next(_FINISHED),
        (_FINISHED, _EVENT.PAUSE): _IS_FINISHED,
        (_FINISHED, _EVENT.RESUME): _IS_FINISHED,
        (_FINISHED, _EVENT.REMOVE): Next(_REMOVED),
        # A removal is never taken back; asking for it again tries again.
        (_REMOVED, _EVENT.ERROR): Next(_REMOVED),
        (_REMOVED, _EVENT.RECOVERED): Next(_REMOVED),
        (_REMOVED, _EVENT.FATAL): Next(_REMOVED),
        (_REMOVED, _EVENT.TARGET_REACHED): Next(_REMOVED),
        (_REMOVED, _EVENT.PAUSE): _IS_REMOVED,
        (_REMOVED, _EVENT.RESUME): _IS_REMOVED,
        (_REMOVED, _EVENT.REMOVE): Next(_REMOVED),
    }
)


def step(info: ChangefeedInfo, event: ChangefeedEvent, *, error: str = "", revision: int = 0, by: str = "") -> ChangefeedInfo:
    """The record after the event; the same object when nothing changes. Pure.

    error: the text that goes with ERROR, FATAL or a removal that did not work. revision: an etcd revision read just now, for
    the epoch of a restart. by: who asked. ChangefeedRefusedError names the changefeed and the reason.
    """
    outcome = TRANSITIONS[info.state, event]
    if isinstance(outcome, Refused):
        raise ChangefeedRefusedError(f"changefeed {info.changefeed}: cannot {event}: {outcome.reason}")
    if outcome.state is info.state and not info.state.runs and event is not _EVENT.REMOVE:
        return info
    epoch = next_epoch(info.epoch, revision) if outcome.restarts else info.epoch
    if (outcome.state, error, epoch) == (info.state, info.error, info.epoch):
        return info
    return msgspec.structs.replace(info, state=outcome.state, error=error, epoch=epoch, asked_by=by)


def replaced(
    info: ChangefeedInfo, checked: ChangefeedInfo, tables: Sequence[str], options: Mapping[str, str], by: str = ""
) -> ChangefeedInfo:
    """The record with another filter and options. ConflictError when it is not the one that was checked before. Pure."""
    if info != checked or info.state is not ChangefeedState.STOPPED:
        raise ConflictError(f"changefeed {info.changefeed} was changed meanwhile; nothing was changed: try again")
    return msgspec.structs.replace(info, tables=list(tables), options=dict(options), asked_by=by)


# ---------------------------------------------------------------------------------------------------------------------
# The registry


class EtcdChangefeeds:
    """The changefeeds in etcd. Any thread; every call may block for the session's deadline.

    Errors of the writes: NotLeaderError (this owner does not lead), ConflictError (the id exists; or others kept changing the
    record), UnknownChangefeedError, ChangefeedRefusedError (its state forbids it), EtcdError.
    """

    def __init__(self, session: EtcdSession, cluster: str, write: GuardedWrite) -> None:
        self._session = session
        self._cluster = cluster
        self._write = write

    def list(self) -> Sequence[ChangefeedInfo]:
        """All that can be read, by id; one that cannot is logged with its key."""
        items, _ = self._session.get_prefix(etcd_keys.changefeeds_prefix(self._cluster))
        infos, errors = read_infos(self._cluster, items)
        for error in errors.values():
            _log.warning("unreadable_changefeed", reason=error)
        return [infos[changefeed] for changefeed in sorted(infos)]

    def get(self, changefeed: ChangefeedID) -> ChangefeedInfo:
        return self._read(changefeed)[0]

    def status(self, changefeed: ChangefeedID) -> ChangefeedStatus | None:
        """How far it was known to be; None while nothing was stored."""
        key = etcd_keys.changefeed_status_key(self._cluster, changefeed)
        found = self._session.get(key)
        return decode(ChangefeedStatus, key, found.value) if found is not None else None

    def create(self, info: ChangefeedInfo) -> None:
        """Stores a new one at an epoch above that of every former changefeed of this id."""
        key = etcd_keys.changefeed_info_key(self._cluster, info.changefeed)
        _, revision = self._session.get_prefix(key)
        record = msgspec.structs.replace(info, epoch=next_epoch(0, revision))
        try:
            self._write([Put(key, encode(record))], extra_compares=[is_absent(key)])
        except ConflictError:
            raise ConflictError(f"changefeed {info.changefeed} exists already; nothing was changed") from None

    def pause(self, changefeed: ChangefeedID, by: str = "") -> None:
        self.apply(changefeed, ChangefeedEvent.PAUSE, by=by)

    def resume(self, changefeed: ChangefeedID, by: str = "") -> None:
        self.apply(changefeed, ChangefeedEvent.RESUME, by=by)

    def update(
        self,
        changefeed: ChangefeedID,
        checked: ChangefeedInfo,
        *,
        tables: Sequence[str],
        options: Mapping[str, str],
        by: str = "",
    ) -> None:
        """Stores another filter and options of a stopped one, if its record is still the one that was checked."""

        def change(info: ChangefeedInfo, _revision: int) -> ChangefeedInfo:
            return replaced(info, checked, tables, options, by)

        self._change(changefeed, change)

    def remove(self, changefeed: ChangefeedID, by: str = "") -> None:
        """Marks it removed; the leader stops it, drops what it made at the source, then forgets it."""
        self.apply(changefeed, ChangefeedEvent.REMOVE, by=by)

    def apply(
        self, changefeed: ChangefeedID, event: ChangefeedEvent, *, error: str = "", epoch: int | None = None, by: str = ""
    ) -> ChangefeedInfo:
        """One event of one changefeed; the record as it stands now. epoch: the run that the event comes from; when another
        one runs by now, nothing is changed. by: who asked for it."""

        def change(info: ChangefeedInfo, revision: int) -> ChangefeedInfo:
            if epoch is not None and info.epoch != epoch:
                return info
            return step(info, event, error=error, revision=revision, by=by)

        return self._change(changefeed, change)

    def set_start(self, changefeed: ChangefeedID, epoch: int, start_ts: Ts) -> ChangefeedInfo:
        """Stores where replication starts, once; the record as it stands now. Nothing is changed when another epoch runs."""

        def change(info: ChangefeedInfo, _revision: int) -> ChangefeedInfo:
            if info.epoch != epoch or info.start_ts:
                return info
            return msgspec.structs.replace(info, start_ts=start_ts)

        return self._change(changefeed, change)

    def set_status(self, changefeed: ChangefeedID, status: ChangefeedStatus, info_revision: int) -> None:
        """Stores how far it is; ConflictError when its record is not the one of `info_revision` (its mod_revision) any more,
        so that a status never comes back after its changefeed was removed."""
        info_key = etcd_keys.changefeed_info_key(self._cluster, changefeed)
        put = Put(etcd_keys.changefeed_status_key(self._cluster, changefeed), encode(status))
        self._write([put], extra_compares=[is_unchanged(info_key, info_revision)])

    def forget(self, changefeed: ChangefeedID, epoch: int) -> None:
        """Deletes the keys of this changefeed alone, if it is removed and still the one of this epoch."""
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
        raise ConflictError(f"changefeed {changefeed} is being changed by others: try again")

    def _read(self, changefeed: ChangefeedID) -> tuple[ChangefeedInfo, KeyValue]:
        key = etcd_keys.changefeed_info_key(self._cluster, changefeed)
        found = self._session.get(key)
        if found is None:
            raise UnknownChangefeedError(f"no changefeed {changefeed}")
        return decode(ChangefeedInfo, key, found.value), found


def read_infos(cluster: str, items: Sequence[KeyValue]) -> tuple[dict[ChangefeedID, ChangefeedInfo], dict[ChangefeedID, str]]:
    """The changefeeds among these keys, and the text of why not for those that cannot be read. Pure."""
    infos: dict[ChangefeedID, ChangefeedInfo] = {}
    errors: dict[ChangefeedID, str] = {}
    for item in items:
        place = etcd_keys.changefeed_of(cluster, item.key)
        if place is None or place[1] is not ChangefeedKey.INFO:
            continue
        try:
            infos[place[0]] = decode(ChangefeedInfo, item.key, item.value)
        except OperatingError as error:
            errors[place[0]] = str(error)
    return infos, errors
