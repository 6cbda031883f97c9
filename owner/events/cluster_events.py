"""Records captures that come and go, and changefeeds whose records change, in the log and the
history. Any thread."""

from __future__ import annotations

from collections.abc import Mapping, Set

import structlog

from owner.events.history import History
from tablewire.etcd.records import ChangefeedInfo, ChangefeedState
from tablewire.model.ids import CaptureID, CaptureInfo, ChangefeedID

NAMES_MAX = 5

_log = structlog.get_logger("owner.term")

_ENTERED = {
    ChangefeedState.FAILED: "changefeed_failed",
    ChangefeedState.STOPPED: "changefeed_paused",
    ChangefeedState.FINISHED: "changefeed_finished",
    ChangefeedState.REMOVED: "changefeed_removing",
}

_ASKED_FOR = frozenset(f"changefeed_{word}" for word in ("created", "updated", "paused", "resumed", "resynced", "removing"))
"""Events that an operator causes, and that name the caller."""


def record_request(history: History, kind: str, capture: CaptureID, by: str) -> None:
    """Record what a caller asked of a capture. by: the caller; empty: the owner did it by itself,
    and nothing is recorded."""
    if by:
        history.add_and_log(kind, subject=capture, by=by)


def record_captures(
    history: History | None,
    before: Mapping[CaptureID, CaptureInfo],
    after: Mapping[CaptureID, CaptureInfo],
    leaving: Set[CaptureID] = frozenset(),
) -> None:
    """Record how the registered captures changed; many at once are one event in the history.

    history: None at the first reading of a term, since those captures were there before. leaving:
    captures that reported that they were stopping.
    """
    joined, gone = sorted(after.keys() - before.keys()), sorted(before.keys() - after.keys())
    for capture in joined:
        _log.info("capture_joined", capture=capture, address=after[capture].address)
    for capture in gone:
        if capture in leaving:
            _log.info("capture_gone", capture=capture, leaving=True)
        else:
            _log.warning("capture_gone", capture=capture, leaving=False)
    if history is None:
        return
    for kind, captures, text in (("capture_joined", joined, "registered"), ("capture_gone", gone, "no longer registered")):
        if len(captures) > NAMES_MAX:
            named = ", ".join(captures[:NAMES_MAX])
            history.add(kind, text=f"{len(captures)} processors, among them {named}: {text}")
            continue
        for capture in captures:
            info = after.get(capture) or before[capture]
            why = "it was stopping" if kind == "capture_gone" and capture in leaving else ""
            history.add(kind, subject=capture, text=f"{text}, address {info.address}", why=why)


def record_changefeeds(
    history: History, before: Mapping[ChangefeedID, ChangefeedInfo], after: Mapping[ChangefeedID, ChangefeedInfo]
) -> None:
    """Record how the changefeeds changed. before, after: all records."""
    for changefeed in sorted(before.keys() | after.keys()):
        old, new = before.get(changefeed), after.get(changefeed)
        kind, info = _kind_of_change(old, new), new or old
        if kind and info is not None:
            by = info.asked_by if kind in _ASKED_FOR else ""
            history.add(kind, changefeed=str(changefeed), text=f"epoch {info.epoch}", why=info.error, by=by)
            _log.info(kind, changefeed=str(changefeed), epoch=info.epoch, **({"by": by} if by else {}))


def _kind_of_change(old: ChangefeedInfo | None, new: ChangefeedInfo | None) -> str:
    """Return the kind of the event, empty when there is none."""
    if new is None:
        return "changefeed_removed"
    if old is None or old.created_at != new.created_at:
        return "changefeed_created"
    if new.generation != old.generation:
        return "changefeed_resynced"
    if new.state is not old.state and new.state in _ENTERED:
        return _ENTERED[new.state]
    if new.state.runs and (not old.state.runs or new.epoch != old.epoch):
        return "changefeed_resumed"
    if (new.tables, new.options) != (old.tables, old.options):
        return "changefeed_updated"
    return ""
