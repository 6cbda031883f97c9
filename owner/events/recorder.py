"""What becomes an event of the history, and in which words: captures that come and go, changefeeds
whose state changes, and what the schedulers' facts say (see `owner.events.placement_log`, whose
lines are bounded already). What happens to many spans is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

import structlog

from owner.events.history import History
from tablewire.etcd.records import ChangefeedInfo, ChangefeedState
from tablewire.model.ids import CaptureID, CaptureInfo, ChangefeedID, TableID

NAMES_MAX = 5

_log = structlog.get_logger("owner.term")

_ENTERED = {
    ChangefeedState.FAILED: "changefeed_failed",
    ChangefeedState.STOPPED: "changefeed_paused",
    ChangefeedState.FINISHED: "changefeed_finished",
    ChangefeedState.REMOVED: "changefeed_removing",
}


_ASKED_FOR = frozenset(f"changefeed_{word}" for word in ("created", "updated", "paused", "resumed", "removing"))
"""What an operator does; the rest happens."""


def note_asked(history: History, kind: str, capture: CaptureID, by: str) -> None:
    """Something that an operator asked of a capture, also in the log; nothing when nobody did (by is empty)."""
    if by:
        history.tell(kind, subject=capture, by=by)


def note_captures(
    history: History | None,
    before: Mapping[CaptureID, CaptureInfo],
    after: Mapping[CaptureID, CaptureInfo],
    leaving: Set[CaptureID] = frozenset(),
) -> None:
    """Logs them, too. before, after: all that are registered. history: None at the first reading, as those were there before.
    leaving: those that had said so. Many at once are one event."""
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
            history.note(kind, text=f"{len(captures)} captures, among them {named}: {text}")
            continue
        for capture in captures:
            info = after.get(capture) or before[capture]
            why = "it had said that it was leaving" if capture in leaving else ""
            history.note(kind, subject=capture, text=f"{text}, address {info.address}", why=why if capture in gone else "")


def note_changefeeds(
    history: History, before: Mapping[ChangefeedID, ChangefeedInfo], after: Mapping[ChangefeedID, ChangefeedInfo]
) -> None:
    """before, after: all records."""
    for changefeed in sorted(before.keys() | after.keys()):
        former, latter = before.get(changefeed), after.get(changefeed)
        kind = _what_happened(former, latter)
        record = latter or former
        if kind and record is not None:
            by = record.asked_by if kind in _ASKED_FOR else ""
            history.note(kind, changefeed=str(changefeed), text=f"epoch {record.epoch}", why=record.error, by=by)
            _log.info(kind, changefeed=str(changefeed), epoch=record.epoch, **({"by": by} if by else {}))


def _what_happened(former: ChangefeedInfo | None, latter: ChangefeedInfo | None) -> str:
    if latter is None:
        return "changefeed_removed"
    if former is None or former.created_at != latter.created_at:
        return "changefeed_created"
    if latter.state is not former.state and latter.state in _ENTERED:
        return _ENTERED[latter.state]
    if latter.state.runs and (not former.state.runs or latter.epoch != former.epoch):
        return "changefeed_resumed"
    if (latter.tables, latter.options) != (former.tables, former.options):
        return "changefeed_updated"
    return ""


class ToldPlacement:
    """The log of one changefeed's placement, which is told to the history too. The tick's thread."""

    def __init__(
        self, log: Any, history: History, changefeed: ChangefeedID, names: Callable[[], Mapping[TableID, str]] = dict
    ) -> None:
        """log: a bound structlog logger. names: of the tables, as known now."""
        self._log = log
        self._history = history
        self._changefeed = str(changefeed)
        self._names = names

    def info(self, event: str, **fields: Any) -> None:
        self._log.info(event, **fields)
        self._tell(event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._log.warning(event, **fields)
        self._tell(event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._log.error(event, **fields)
        self._tell(event, fields)

    def _tell(self, event: str, fields: Mapping[str, Any]) -> None:
        if event == "spans_placed":
            self._history.count(self._changefeed, fields)
        elif event == "span_moved" and fields["why"] != "move":
            self._history.count(self._changefeed, {fields["why"]: 1})
        elif event == "job_ended" and fields["kind"] == "cancel":
            pass  # `drain_cancelled` says it, once for all changefeeds and with who asked
        elif event == "more_jobs_ended":
            self._history.note("jobs_ended", changefeed=self._changefeed, text=f"{fields['jobs']} more jobs")
        elif event != "job_ended" or (fields["kind"], fields["state"]) != ("move", "done"):  # that one is a span_moved
            subject, text, why = self._words(event, fields)
            ids = {name: str(fields[name]) for name in ("by", "job") if fields.get(name)}
            self._history.note(event, changefeed=self._changefeed, subject=subject, text=text, why=why, **ids)

    def _words(self, event: str, fields: Mapping[str, Any]) -> tuple[str, str, str]:
        """(subject, text, why)"""
        match event:
            case "span_moved":
                return self._named(fields["span"]), f"from {fields['source']} to {fields['target']}", fields["why"]
            case "span_failed":
                return self._named(fields["span"]), "it is tried again after a pause", fields["error"]
            case "two_writers":
                return self._named(fields["span"]), f"{fields['stays']} stays, {fields['goes']} goes", "two reported to write it"
            case "failover_began":
                return (
                    ", ".join(fields["captures"]),
                    f"{fields['spans']} spans lost their writer",
                    f"{fields['gone']} captures gone",
                )
            case "failover_done":
                return "", f"{fields['spans']} spans have a writer again, after {fields['took_ms']} ms", ""
            case "brake_on":
                text = f"{fields['spans_waiting']} spans wait, {fields['captures_left']} captures are left"
                return "", text, "many captures vanished at once"
            case "job_ended":
                where = f" to {fields['target']}" if fields["kind"] == "move" else ""
                moves = f" after {fields['moves']} moves" if "moves" in fields else ""
                subject = self._named(fields["subject"].rpartition(" ")[2]) if fields["kind"] == "move" else fields["target"]
                return subject or "", f"{fields['kind']}{where}: {fields['state']}{moves}", fields["reason"]
            case _:
                return "", ", ".join(f"{name} {value}" for name, value in fields.items()), ""

    def _named(self, span: str) -> str:
        """span: as its text has it; the table's name in front where it is known."""
        table_id = span.split("[", 1)[0]
        name = self._names().get(int(table_id), "")
        return f"{name}{span[len(table_id) :]}" if name else span
