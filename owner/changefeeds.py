"""The changefeeds as etcd has them, and the states of one changefeed as data.

`TRANSITIONS` is the whole life of a changefeed: every state with every event, each a next state or a refusal with its
reason. `step` applies it to a record; nothing else in the owner writes `state`. Warning is never stored: it is what the
leader sees now (an error being retried), and a new leader finds it again by itself.

    normal <-> warning      error, recovered
    normal, warning   -> failed (cannot be retried), finished (target reached)
    normal, warning, failed -> stopped (pause) -> normal (resume, at a higher epoch)
    failed            -> normal (resume)
    all               -> removed, and then the keys go
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

import msgspec

from tablewire.errors import OperatingError
from tablewire.registry import ChangefeedInfo, ChangefeedState, next_epoch


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


def step(info: ChangefeedInfo, event: ChangefeedEvent, *, error: str = "", revision: int = 0) -> ChangefeedInfo:
    """The record after the event; the same object when nothing changes. Pure.

    error: the text that goes with ERROR, FATAL or a removal that did not work. revision: an etcd revision read just now, for
    the epoch of a restart. ChangefeedRefusedError names the changefeed and the reason.
    """
    outcome = TRANSITIONS[info.state, event]
    if isinstance(outcome, Refused):
        raise ChangefeedRefusedError(f"changefeed {info.changefeed}: cannot {event}: {outcome.reason}")
    if outcome.state is info.state and not info.state.runs and event is not _EVENT.REMOVE:
        return info
    epoch = next_epoch(info.epoch, revision) if outcome.restarts else info.epoch
    if (outcome.state, error, epoch) == (info.state, info.error, info.epoch):
        return info
    return msgspec.structs.replace(info, state=outcome.state, error=error, epoch=epoch)
