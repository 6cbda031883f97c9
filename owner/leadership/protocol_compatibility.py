"""The protocol version that is used with each capture, and the captures with which there is none.

A capture is incompatible when its versions and ours do not overlap. It is listed with the reason,
it is never called, and it is given no spans; all other captures continue. An incompatible capture
that registers while this owner leads is ignored. One that was registered before this term may hold
spans that a former owner gave it, so it counts as alive and silent: its spans are not placed
elsewhere until its registration ends (`scheduler.capture_evict_ms`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import structlog

from tablewire.etcd.records import CaptureRecord
from tablewire.model.ids import CaptureID, CaptureInfo
from tablewire.model.states import LivenessState
from tablewire.wire.versions import INCOMPATIBLE_LABEL, SUPPORTED_VERSIONS, ProtocolVersions

_log = structlog.get_logger("owner.protocol_compatibility")


class ProtocolCompatibility:
    """The registered captures of one term, by whether this owner can call them.

    `update` is called under the term's lock. The attributes are replaced as a whole, so any thread
    may read them.
    """

    def __init__(self, own: ProtocolVersions = SUPPORTED_VERSIONS) -> None:
        self._own = own
        self.leaving: frozenset[CaptureID] = frozenset()
        """Captures that are stopping, or were stopping when their registration ended."""
        self._stopping: frozenset[CaptureID] = frozenset()
        self._incompatible_at_start: frozenset[CaptureID] | None = None
        self.versions: Mapping[CaptureID, int] = MappingProxyType({})
        """The version for each compatible capture."""
        self.incompatible: Mapping[CaptureID, CaptureInfo] = MappingProxyType({})
        """The other captures, with the reason as a label."""

    def update(self, records: Iterable[CaptureRecord]) -> Mapping[CaptureID, CaptureInfo]:
        """Take in all captures that are registered now; return those that count as alive."""
        records = list(records)
        before, self._stopping = self._stopping, frozenset(one.id for one in records if one.liveness is LivenessState.STOPPING)
        self.leaving = before | self._stopping
        alive: dict[CaptureID, CaptureInfo] = {}
        versions: dict[CaptureID, int] = {}
        incompatible: dict[CaptureID, CaptureInfo] = {}
        for record in records:
            version = self._own.common(record.protocols)
            if version is not None:
                alive[record.id], versions[record.id] = record.info, version
                continue
            reason = f"speaks protocol {record.protocols}, this owner {self._own}"
            labels = {**record.labels, INCOMPATIBLE_LABEL: reason}
            incompatible[record.id] = CaptureInfo(record.id, record.address, record.version, labels)
            if record.id not in self.incompatible:
                _log.warning("capture_incompatible", capture=record.id, address=record.address, reason=reason)
        if self._incompatible_at_start is None:
            self._incompatible_at_start = frozenset(incompatible)
        alive.update((capture, info) for capture, info in incompatible.items() if capture in self._incompatible_at_start)
        self.versions, self.incompatible = MappingProxyType(versions), MappingProxyType(incompatible)
        return MappingProxyType(alive)

    def compatible(self, captures: Mapping[CaptureID, CaptureInfo]) -> Mapping[CaptureID, CaptureInfo]:
        """Return those of the captures that this owner can call."""
        versions = self.versions
        return {capture: info for capture, info in captures.items() if capture in versions}
