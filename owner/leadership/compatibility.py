"""Which version of the wire is spoken with each capture, and what becomes of those with whom none is.

A capture is foreign when its versions and ours do not overlap: it is listed with the reason, never called, and given nothing;
everybody else goes on. One that comes while we lead counts as not there. One that was there before may hold tables that a former
owner gave it, so it counts as alive and silent: nobody else may write them until its registration is over
(`scheduler.capture_evict_ms`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import structlog

from tablewire.etcd.records import CaptureRecord
from tablewire.model.ids import CaptureID, CaptureInfo
from tablewire.model.states import LivenessState
from tablewire.wire.versions import SPOKEN, ProtocolVersions

FOREIGN_LABEL = "incompatible"
"""In lists, beside the labels that the processor itself has; its value is the reason."""
FOREIGN_STATE = "incompatible"

_log = structlog.get_logger("owner.spoken")


class Spoken:
    """take: under the term's lock, from its first reading of the captures on. The rest: any thread, whole new values."""

    def __init__(self, own: ProtocolVersions = SPOKEN) -> None:
        self._own = own
        self.leaving: frozenset[CaptureID] = frozenset()
        """Captures that say, or said before they went, that they are stopping."""
        self._stopping: frozenset[CaptureID] = frozenset()
        self._taken = False
        self._former: frozenset[CaptureID] = frozenset()
        self.versions: Mapping[CaptureID, int] = MappingProxyType({})
        """Of those that can be spoken with."""
        self.foreign: Mapping[CaptureID, CaptureInfo] = MappingProxyType({})
        """The others, with the reason as a label."""

    def take(self, records: Iterable[CaptureRecord]) -> Mapping[CaptureID, CaptureInfo]:
        """All that are registered now; returns those that count as alive."""
        records = list(records)
        before, self._stopping = self._stopping, frozenset(one.id for one in records if one.liveness is LivenessState.STOPPING)
        self.leaving = before | self._stopping
        alive: dict[CaptureID, CaptureInfo] = {}
        versions: dict[CaptureID, int] = {}
        foreign: dict[CaptureID, CaptureInfo] = {}
        for record in records:
            version = self._own.common(record.protocols)
            if version is not None:
                alive[record.id], versions[record.id] = record.info, version
                continue
            reason = f"speaks protocol {record.protocols}, this owner {self._own}"
            foreign[record.id] = CaptureInfo(record.id, record.address, record.version, {**record.labels, FOREIGN_LABEL: reason})
            if record.id not in self.foreign:
                _log.warning("capture_incompatible", capture=record.id, address=record.address, reason=reason)
        if not self._taken:
            self._taken, self._former = True, frozenset(foreign)
        alive.update((capture, info) for capture, info in foreign.items() if capture in self._former)
        self.versions, self.foreign = MappingProxyType(versions), MappingProxyType(foreign)
        return MappingProxyType(alive)

    def reached(self, captures: Mapping[CaptureID, CaptureInfo]) -> Mapping[CaptureID, CaptureInfo]:
        """Of the captures, those that are called."""
        versions = self.versions
        return {capture: info for capture, info in captures.items() if capture in versions}
