"""The state of the cluster in etcd, as one term of leadership sees it: captures, changefeeds and
drains.

It is level-triggered: watches deliver the whole of each prefix, and every attribute is replaced as
a whole. Any thread may read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType

import structlog

from owner.changefeed.run import StoredChangefeed
from owner.events.cluster_events import record_captures, record_changefeeds
from owner.events.history import History
from owner.leadership.protocol_compatibility import ProtocolCompatibility
from tablewire.errors import EtcdError
from tablewire.etcd import keys as etcd_keys
from tablewire.etcd.keys import ChangefeedKey
from tablewire.etcd.record_reader import RecordReader
from tablewire.etcd.records import CaptureRecord, ChangefeedInfo, ChangefeedStatus
from tablewire.etcd.session import EtcdSession
from tablewire.etcd.values import KeyValue, PrefixState
from tablewire.etcd.watch import PrefixWatch
from tablewire.model.ids import CaptureID, CaptureInfo, ChangefeedID

_log = structlog.get_logger("owner.term")


class ClusterState:
    """on_change is called on the thread of the watches after a change that the next tick should
    see."""

    def __init__(
        self,
        session: EtcdSession,
        cluster: str,
        history: History,
        compatibility: ProtocolCompatibility,
        on_change: Callable[[], None],
    ) -> None:
        self.captures: Mapping[CaptureID, CaptureInfo] = MappingProxyType({})
        """The captures that count as alive; see ProtocolCompatibility."""
        self.capture_keys: Mapping[CaptureID, KeyValue] = MappingProxyType({})
        self.changefeeds: Mapping[ChangefeedID, StoredChangefeed] = MappingProxyType({})
        self.statuses: Mapping[ChangefeedID, ChangefeedStatus] = MappingProxyType({})
        self.drains: frozenset[CaptureID] = frozenset()
        self.compatibility = compatibility
        self._session = session
        self._cluster = cluster
        self._history = history
        self._on_change = on_change
        self._watches: list[PrefixWatch] = []
        self._loaded = threading.Event()
        self._lock = threading.Lock()
        """Of `drains`, which callers change too."""
        self._reader = RecordReader(lambda reason: _log.error("unreadable_record", reason=reason))

    @property
    def is_loaded(self) -> bool:
        return self._loaded.is_set()

    def load(self, timeout_s: float) -> None:
        """Start to watch, and return once everything has been read. EtcdError after timeout_s: call
        it again."""
        if not self._watches:
            prefixes = {
                etcd_keys.captures_prefix(self._cluster): self._captures_changed,
                etcd_keys.changefeeds_prefix(self._cluster): self._changefeeds_changed,
                etcd_keys.drains_prefix(self._cluster): self._drains_changed,
            }
            self._watches = self._session.watch_prefixes(prefixes, name="watch")
        for watch in self._watches:
            watch.wait_loaded(timeout_s)
        if not self._loaded.wait(timeout_s):
            raise EtcdError("etcd: the state was read, but not taken over in time")

    def close(self) -> None:
        for watch in self._watches:
            watch.close()

    def add_drain(self, capture: CaptureID) -> None:
        """Add a drain that was stored, before the watch delivers it."""
        with self._lock:
            self.drains |= {capture}

    def remove_drain(self, capture: CaptureID) -> None:
        with self._lock:
            self.drains -= {capture}

    # -- the thread "watch"

    def _captures_changed(self, state: PrefixState) -> None:
        found = [
            (record, item) for item in state.entries.values() if (record := self._reader.read(CaptureRecord, item)) is not None
        ]
        self.capture_keys = MappingProxyType({record.id: item for record, item in found})
        captures = self.compatibility.update(record for record, _ in found)
        before, self.captures = self.captures, captures
        record_captures(self._history if self.is_loaded else None, before, captures, self.compatibility.leaving)
        self._on_change()

    def _changefeeds_changed(self, state: PrefixState) -> None:
        changefeeds: dict[ChangefeedID, StoredChangefeed] = {}
        statuses: dict[ChangefeedID, ChangefeedStatus] = {}
        before = self.changefeeds
        for item in state.entries.values():
            place = etcd_keys.changefeed_of(self._cluster, item.key)
            if place is None:
                continue
            changefeed, kind = place
            known = before.get(changefeed)
            if kind is ChangefeedKey.STATUS:
                if (status := self._reader.read(ChangefeedStatus, item)) is not None:
                    statuses[changefeed] = status
            elif known is not None and known.revision == item.mod_revision:
                changefeeds[changefeed] = known
            elif (info := self._reader.read(ChangefeedInfo, item)) is not None:
                changefeeds[changefeed] = StoredChangefeed(info, item.mod_revision)
        self.statuses = MappingProxyType(statuses)
        if changefeeds == before:
            return  # only a status has changed, which this owner has written itself
        if self.is_loaded:
            record_changefeeds(self._history, _infos(before), _infos(changefeeds))
        self.changefeeds = MappingProxyType(changefeeds)
        self._on_change()

    def _drains_changed(self, state: PrefixState) -> None:
        found = (etcd_keys.drain_of(self._cluster, key) for key in state.entries)
        with self._lock:
            self.drains = frozenset(capture for capture in found if capture is not None)
        self._loaded.set()  # it is the last prefix that is read
        self._on_change()


def _infos(changefeeds: Mapping[ChangefeedID, StoredChangefeed]) -> dict[ChangefeedID, ChangefeedInfo]:
    return {changefeed: stored.info for changefeed, stored in changefeeds.items()}
