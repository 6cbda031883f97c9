"""Parts that several operations share: finding what a request names, and saying what is there. Any thread, no I/O of its own
but the registry's reads."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from owner.view import OwnerView
from tablewire.errors import UnknownCaptureError
from tablewire.registry import ChangefeedInfo, ChangefeedState
from tablewire.types import CaptureID, ChangefeedID

if TYPE_CHECKING:
    from owner.scheduler import SchedulerAndInfo

NAMES_IN_A_TEXT_MAX = 10


def software_version() -> str:
    return importlib.metadata.version("tablewire")


def schedulers(view: OwnerView) -> Iterator[tuple[ChangefeedID, SchedulerAndInfo]]:
    for info in view.registry().list():
        scheduler = view.scheduler(info.changefeed)
        if scheduler is not None:
            yield info.changefeed, scheduler


def current_state(view: OwnerView, info: ChangefeedInfo) -> str:
    """What etcd holds, where the leader knows better only that a running one is in warning (which is never stored): right
    after a pause or resume it has not looked yet."""
    runtime = view.runtime(info.changefeed) if info.state.runs else None
    seen = ChangefeedState(runtime.state) if runtime is not None else info.state
    return seen.value if seen.runs else info.state.value


def check_capture(view: OwnerView, capture: CaptureID) -> None:
    known = view.captures()
    if capture not in known:
        raise UnknownCaptureError(f"no capture {capture!r}; {names_text('registered', sorted(known))}")


def names_text(what: str, names: Sequence[str]) -> str:
    """A short list for the end of an error's text."""
    if not names:
        return f"{what}: none"
    more = f" and {len(names) - NAMES_IN_A_TEXT_MAX} more" if len(names) > NAMES_IN_A_TEXT_MAX else ""
    return f"{what}: {', '.join(names[:NAMES_IN_A_TEXT_MAX])}{more}"
