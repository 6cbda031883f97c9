"""What the admin API needs of an owner process. `owner.service.OwnerService` is the OwnerPort.

A port is a Protocol for what belongs to a package above this one; for the packages below,
operations use the classes themselves. Everything here may be called from any thread and returns at
once, except for `changefeeds` and the writes of a term, which talk to etcd and take at most its
deadline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from owner.changefeed.run import ChangefeedRun
    from owner.changefeed.store import EtcdChangefeeds
    from owner.events.history import History
    from tablewire.etcd.records import LeaderRecord
    from tablewire.model.ids import CaptureID, CaptureInfo, ChangefeedID
    from tablewire.source import Source, SourceRequest


class ElectionPort(Protocol):
    """The election, as this process sees it."""

    @property
    def error(self) -> str:
        """Why this process cannot be elected now (etcd is unreachable, for example); empty if it can."""
        ...

    def leader(self) -> LeaderRecord | None:
        """Return the leader; None during an election."""
        ...

    def candidates(self) -> Sequence[LeaderRecord]:
        """Return all owner processes, the leader first."""
        ...


class TermPort(Protocol):
    """A term of leadership of this process. `by` is the caller that asked (`owner.admin.caller_identity`)."""

    revision: int
    history: History

    @property
    def leads(self) -> bool:
        """Whether the term has read the state in etcd and has not ended."""
        ...

    @property
    def captures(self) -> Mapping[CaptureID, CaptureInfo]: ...

    @property
    def drains(self) -> Sequence[CaptureID]:
        """The processors to drain, as stored in etcd."""
        ...

    @property
    def runs(self) -> Mapping[ChangefeedID, ChangefeedRun]: ...

    def drain(self, capture: CaptureID, by: str = "") -> None:
        """Store the drain in etcd, so that it outlives this owner, and start it."""
        ...

    def cancel_drain(self, capture: CaptureID, by: str = "") -> None: ...

    def stop(self, reason: str, by: str = "") -> None:
        """Give up leadership; the process continues as a follower."""
        ...


class OwnerPort(Protocol):
    """An owner process."""

    cluster: str
    owner_id: str
    changefeeds: EtcdChangefeeds

    @property
    def election(self) -> ElectionPort: ...

    @property
    def term(self) -> TermPort | None:
        """The current term; None while this process does not lead."""
        ...

    def new_source(self, request: SourceRequest) -> Source: ...

    def wake(self) -> None:
        """Run the next tick soon, because something has changed."""
        ...
