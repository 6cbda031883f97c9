"""Reads the records of others: an unreadable one is reported once and hides none of the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tablewire.errors import OperatingError
from tablewire.etcd.records import Record, decode
from tablewire.etcd.values import KeyValue

_R = TypeVar("_R", bound=Record)


class RecordReader:
    """report(reason) is called once for each unreadable version of a record. Used by one thread, or
    by callers that may report twice."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._unreadable: dict[str, int] = {}  # by key: the mod_revision that was reported

    def read(self, kind: type[_R], item: KeyValue) -> _R | None:
        """Return the record; None if it is unreadable."""
        try:
            return decode(kind, item.key, item.value)
        except OperatingError as error:
            if self._unreadable.get(item.key) != item.mod_revision:
                self._unreadable[item.key] = item.mod_revision
                self._report(str(error))
            return None
