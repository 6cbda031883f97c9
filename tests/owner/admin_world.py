"""An owner for the tests of the admin API: a real scheduler and agents in virtual time, and a store in memory.

`AdminView` is the OwnerPort; `ticking(view)` lets a thread tick it while the test asks through the real API or CLI.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import msgspec

from owner.admin.grpc_service import new_admin_server
from owner.changefeed.run import ChangefeedRuntime
from owner.changefeed.store import ChangefeedEvent, replaced, step
from owner.events.history import StoredEvent
from owner.scheduling.scheduler import SchedulerAndInfo
from tablewire.errors import ConflictError, UnknownCaptureError, UnknownChangefeedError
from tablewire.etcd.records import ChangefeedInfo, ChangefeedState, EventRecord, LeaderRecord, now
from tablewire.model.ids import TS_MAX, CaptureID, CaptureInfo, ChangefeedID
from tablewire.runtime.grpc import listen, open_channel
from tablewire.runtime.sections import PeerTlsSection
from tablewire.runtime.tls import channel_credentials, interceptors, server_credentials
from tablewire.source import CheckFailure, Source, SourceRequest
from tablewire.v1 import admin_pb2 as pb
from tests.owner.world import CHANGEFEED, World

TICK_PAUSE_S = 0.002
FEED = str(CHANGEFEED)
CREATE = pb.CreateChangefeedRequest(
    changefeed="new", source_uri="counter:///source", sink_uri="file:///sink", tables=["public.*"]
)


def feed(name: str = CHANGEFEED.id, **fields: object) -> ChangefeedInfo:
    """Return the record of a changefeed whose source URI has a password."""
    return msgspec.structs.replace(
        ChangefeedInfo(
            id=name,
            source_uri="postgresql://me:secret@source/db",
            sink_uri="postgresql://me:${SINK_PASSWORD}@sink/db",
            tables=["public.*"],
            created_at=now(),
        ),
        **fields,
    )


class MemoryRegistry:
    """The changefeeds in a dict, changed by the real transitions."""

    def __init__(self, *infos: ChangefeedInfo) -> None:
        self.infos = {info.changefeed: info for info in infos}

    def list(self) -> Sequence[ChangefeedInfo]:
        return [self.infos[changefeed] for changefeed in sorted(self.infos)]

    def get(self, changefeed: ChangefeedID) -> ChangefeedInfo:
        if changefeed not in self.infos:
            raise UnknownChangefeedError(f"no changefeed {changefeed}")
        return self.infos[changefeed]

    def create(self, info: ChangefeedInfo) -> None:
        if info.changefeed in self.infos:
            raise ConflictError(f"changefeed {info.changefeed} exists already; nothing was changed")
        self.infos[info.changefeed] = info

    def update(
        self,
        changefeed: ChangefeedID,
        checked: ChangefeedInfo,
        *,
        tables: Sequence[str],
        options: Mapping[str, str],
        by: str = "",
    ) -> None:
        self.infos[changefeed] = replaced(self.get(changefeed), checked, tables, options, by)

    def apply(self, changefeed: ChangefeedID, event: ChangefeedEvent, *, by: str = "") -> ChangefeedInfo:
        info = self.infos[changefeed] = step(self.get(changefeed), event, by=by)
        return info


class MemoryHistory:
    """Events in a list, as a reader of a History sees them."""

    def __init__(self) -> None:
        self._events: list[StoredEvent] = []
        self._changed = threading.Condition()

    def add(self, kind: str, **fields: Any) -> None:
        record = EventRecord(at=now(), kind=kind, owner="owner-1", **fields)
        with self._changed:
            self._events.append(StoredEvent(len(self._events) + 1, 1, record))
            self._changed.notify_all()

    def add_and_log(self, kind: str, **fields: Any) -> None:
        self.add(kind, **fields)

    def events_after(self, sequence: int) -> Sequence[StoredEvent]:
        return self._events[sequence:]

    def wait_after(self, sequence: int, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: len(self._events) > sequence, timeout_s)


class CheckedSource:
    """A source whose checks fail as configured."""

    def __init__(self, failures: Sequence[CheckFailure]) -> None:
        self._failures = failures
        self.closed = False

    def check(self) -> Sequence[CheckFailure]:
        return self._failures

    def current_ts(self) -> int:
        return 1_000

    def close(self) -> None:
        self.closed = True


class AdminRun:
    """A ChangefeedRun that has a scheduler and a runtime and nothing else."""

    def __init__(self, view: AdminView, changefeed: ChangefeedID) -> None:
        self.scheduler = view.scheduler(changefeed)
        self.runtime = lambda: view.runtime(changefeed)


class AdminView:
    """An OwnerPort on a World, its ElectionPort and its TermPort; only the changefeed `default/test` runs."""

    def __init__(self, world: World | None = None, owner_id: str = "owner-1", names: Mapping[int, str] | None = None) -> None:
        self.world = world or World(tables=(1, 2, 3))
        self.owner_id = owner_id
        self.cluster = "test"
        self.election = self.term = self
        self.revision = 7
        self.leads = True
        self.records = [LeaderRecord(id=owner_id, address="127.0.0.1:1", version="1.0")]
        self.store = self.changefeeds = MemoryRegistry(feed())
        self.names = names or {table: f"public.t{table}" for table in self.world.tables}
        self.failures: list[CheckFailure] = []
        self.requests: list[SourceRequest] = []
        self.sources: list[CheckedSource] = []
        self.drains: list[CaptureID] = []
        self.events = self.history = MemoryHistory()
        self.pokes = threading.Event()
        self.is_closed = False
        self.error = ""

    def leader(self) -> LeaderRecord | None:
        return self.records[0] if self.records else None

    def candidates(self) -> Sequence[LeaderRecord]:
        return list(self.records)

    @property
    def captures(self) -> Mapping[CaptureID, CaptureInfo]:
        return {capture: CaptureInfo(capture, f"{capture}:1", "1.0", {"zone": "x"}) for capture in self.world.alive}

    @property
    def runs(self) -> Mapping[ChangefeedID, AdminRun]:
        return {changefeed: AdminRun(self, changefeed) for changefeed in self.store.infos}

    def scheduler(self, changefeed: ChangefeedID) -> SchedulerAndInfo | None:
        info = self.store.infos.get(changefeed)
        return self.world.scheduler if changefeed == CHANGEFEED and info is not None and info.state.runs else None

    def runtime(self, changefeed: ChangefeedID) -> ChangefeedRuntime | None:
        info = self.store.infos.get(changefeed)
        if info is None:
            return None
        return ChangefeedRuntime(
            state=info.state.value,
            watermark=self.world.watermark,
            source_ts=min(self.world.watermark.checkpoint_ts + 50, TS_MAX),
            retained_bytes=4096,
            table_names=MappingProxyType(self.names),
        )

    def new_source(self, request: SourceRequest) -> Source:
        self.requests.append(request)
        self.sources.append(CheckedSource(self.failures))
        return self.sources[-1]  # type: ignore[return-value]

    def wake(self) -> None:
        self.pokes.set()

    def drain(self, capture: CaptureID, by: str = "") -> None:
        if capture not in self.world.alive:
            raise UnknownCaptureError(f"no capture {capture}")
        if capture not in self.drains:
            self.drains.append(capture)
            self.events.add("drain_requested", subject=capture, by=by)
        self.world.scheduler.drain_capture(capture)
        self.wake()

    def cancel_drain(self, capture: CaptureID, by: str = "") -> None:
        self.drains.remove(capture)
        self.world.scheduler.cancel_drain(capture)
        self.wake()

    def stop(self, reason: str, by: str = "") -> None:
        self.events.add("owner_stops_leading", subject=self.owner_id, by=by)
        self.records = [*self.records[1:], self.records[0]]
        self.leads = False


@contextmanager
def ticking(view: AdminView) -> Iterator[AdminView]:
    """Tick the view's world on a thread until the block ends; fail the test if a tick failed."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            while not stop.is_set():
                view.world.step()
                view.pokes.wait(TICK_PAUSE_S)
                view.pokes.clear()
        except BaseException as error:
            failures.append(error)
            raise

    thread = threading.Thread(target=run, name="tick")
    thread.start()
    try:
        yield view
    finally:
        stop.set()
        thread.join()
    assert not failures, failures


def paused(name: str = "other") -> ChangefeedInfo:
    return feed(name, state=ChangefeedState.STOPPED)


@contextmanager
def serving(view: AdminView, tls: PeerTlsSection = PeerTlsSection()) -> Iterator[str]:  # noqa: B008 - frozen
    """Serve the admin API of this view on a free port, and return the address, which the view's own record gets."""
    credentials = channel_credentials(tls)
    admin = new_admin_server(view, lambda address: open_channel(address, credentials), interceptors(tls))
    address = f"127.0.0.1:{listen(admin.server, '127.0.0.1', 0, server_credentials(tls))}"
    if view.leads:
        view.records[0] = msgspec.structs.replace(view.records[0], address=address)
    admin.server.start()
    try:
        yield address
    finally:
        admin.close(grace_s=0.1)
