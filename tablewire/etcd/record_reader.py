"""Reads the records of others: an unreadable one is logged once and hides none of the rest."""

from __future__ import annotations

from typing import TypeVar

import structlog

from tablewire.errors import OperatingError
from tablewire.etcd.records import Record, decode
from tablewire.etcd.values import KeyValue

_R = TypeVar("_R", bound=Record)

_log = structlog.get_logger("tablewire.records")


class RecordReader:
    """event: of the log line for an unreadable record. One thread, or callers that may log twice."""

    def __init__(self, event: str = "unreadable_record") -> None:
        self._event = event
        self._unreadable: dict[str, int] = {}  # by key: the mod_revision that was logged

    def read(self, kind: type[_R], item: KeyValue) -> _R | None:
        """Return the record; None if it is unreadable."""
        try:
            return decode(kind, item.key, item.value)
        except OperatingError as error:
            if self._unreadable.get(item.key) != item.mod_revision:
                self._unreadable[item.key] = item.mod_revision
                _log.error(self._event, reason=str(error))
            return None
