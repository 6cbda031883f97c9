"""What the admin API needs of an owner process: the contract between the service and the operations on it.

`owner.service.OwnerService` implements OwnerView and `owner.changefeed.store` the registry;
`owner.admin.operations` and `owner.admin.grpc_service` know only these Protocols. Every method may
be called from any thread (gRPC's pool). Methods of OwnerView return at once; those of
ChangefeedRegistry talk to etcd and take at most its deadline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from owner.changefeed.run import ChangefeedRuntime
from tablewire.model.ids import CaptureID, CaptureInfo, ChangefeedID
from tablewire.source import Source, SourceRequest

if TYPE_CHECKING:
    from owner.events.history import History
    from owner.leadership.election import Leadership
    from owner.scheduling.scheduler import SchedulerAndInfo
    from tablewire.etcd.records import ChangefeedInfo, LeaderRecord


class ChangefeedRegistry(Protocol):
    """The changefeeds as etcd has them. Writes are guarded by leadership: NotLeaderError when it is gone, EtcdError when
    etcd does not answer, UnknownChangefeedError for an id that is not there. by: who asked (`owner.admin.caller_identity`)."""

    def list(self) -> Sequence[ChangefeedInfo]: ...

    def get(self, changefeed: ChangefeedID) -> ChangefeedInfo: ...

    def create(self, info: ChangefeedInfo) -> None:
        """Stores a new one; ConflictError when the id exists."""
        ...

    def pause(self, changefeed: ChangefeedID, by: str = "") -> None: ...

    def resume(self, changefeed: ChangefeedID, by: str = "") -> None: ...

    def update(
        self,
        changefeed: ChangefeedID,
        checked: ChangefeedInfo,
        *,
        tables: Sequence[str],
        options: Mapping[str, str],
        by: str = "",
    ) -> None:
        """Stores another filter and options of a stopped one. checked: the record that was looked at before; ConflictError when
        it is not the one that stands there any more."""
        ...

    def remove(self, changefeed: ChangefeedID, by: str = "") -> None:
        """Marks it removed; the leader stops it, drops what it made at the source, then forgets it."""
        ...


class OwnerView(Protocol):
    """One owner process, leading or not."""

    @property
    def cluster(self) -> str:
        """The cluster's name, as configured."""
        ...

    @property
    def owner_id(self) -> str: ...

    def leadership(self) -> Leadership | None:
        """None = this process does not lead."""
        ...

    def leader(self) -> LeaderRecord | None:
        """Who leads now, from etcd; None while an election is under way."""
        ...

    def why_no_candidate(self) -> str:
        """Why this process cannot be elected now (etcd does not answer, say); "" while it can."""
        ...

    def captures(self) -> Mapping[CaptureID, CaptureInfo]: ...

    def scheduler(self, changefeed: ChangefeedID) -> SchedulerAndInfo | None:
        """None while this changefeed does not run here."""
        ...

    def runtime(self, changefeed: ChangefeedID) -> ChangefeedRuntime | None: ...

    def registry(self) -> ChangefeedRegistry: ...

    def new_source(self, request: SourceRequest) -> Source:
        """By the scheme of the source URI; OperatingError when no plug-in serves it or the request cannot be right."""
        ...

    def poke(self) -> None:
        """Something changed: tick soon."""
        ...

    def drain(self, capture: CaptureID, by: str = "") -> None:
        """Stores the target in etcd first (survives this owner), then hands it to every scheduler."""
        ...

    def cancel_drain(self, capture: CaptureID, by: str = "") -> None: ...

    def draining(self) -> Sequence[CaptureID]:
        """The drain targets as stored."""
        ...

    def resign(self, by: str = "") -> None:
        """Gives leadership up and stays as a follower. Does nothing when not leading."""
        ...

    def history(self) -> History | None:
        """What happened in the cluster; None while this process does not lead."""
        ...

    def owners(self) -> Sequence[LeaderRecord]:
        """Every owner process that campaigns now, the leader first."""
        ...
