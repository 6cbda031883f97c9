"""The enums of the protocol. Each value is the lower-case name; in columns and on the wire an enum is its `code`.

A code is the position in the definition, so members are only ever appended.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum


class _CodedEnum(StrEnum):
    """A StrEnum with a small stable number for columns and the wire."""

    @property
    def code(self) -> int:
        return _codes(type(self))[self]

    @classmethod
    def from_code(cls, code: int) -> _CodedEnum:
        """The member with this code; ValueError when there is none."""
        members = _members(cls)
        if not 0 <= code < len(members):
            raise ValueError(f"{cls.__name__} has no code {code}")
        return members[code]


_CODES: dict[type, dict[str, int]] = {}


_MEMBERS: dict[type, tuple[_CodedEnum, ...]] = {}


def _members(enum: type[_CodedEnum]) -> tuple[_CodedEnum, ...]:
    found = _MEMBERS.get(enum)
    if found is None:
        found = _MEMBERS[enum] = tuple(enum)
    return found


def _codes(enum: type[_CodedEnum]) -> dict[str, int]:
    found = _CODES.get(enum)
    if found is None:
        found = _CODES[enum] = {member: code for code, member in enumerate(enum)}
    return found


class TableState(_CodedEnum):
    """What an agent reports of a span. Absent -> Preparing -> Prepared -> Replicating -> Stopping -> Stopped."""

    ABSENT = "absent"
    PREPARING = "preparing"
    PREPARED = "prepared"
    REPLICATING = "replicating"
    STOPPING = "stopping"
    STOPPED = "stopped"


class ReplicationState(_CodedEnum):
    """What the owner keeps of a span."""

    ABSENT = "absent"
    PREPARE = "prepare"
    COMMIT = "commit"
    REPLICATING = "replicating"
    REMOVING = "removing"


class CaptureState(_CodedEnum):
    UNINITIALIZED = "uninitialized"
    READY = "ready"
    SILENT = "silent"
    STOPPING = "stopping"


class LivenessState(_CodedEnum):
    ALIVE = "alive"
    STOPPING = "stopping"


class QueryKind(_CodedEnum):
    MOVE = "move"
    REBALANCE = "rebalance"
    DRAIN = "drain"
    CANCEL = "cancel"


class QueryState(_CodedEnum):
    PENDING = "pending"
    ACCEPTED = "accepted"
    REFUSED = "refused"
    DONE = "done"
    CANCELLED = "cancelled"


class StallReason(_CodedEnum):
    """Why a span is not steady; a closed list (docs/operations.md explains each)."""

    BOOTSTRAP = "bootstrap"
    SILENT_CAPTURE = "silent_capture"
    NO_CAPTURE = "no_capture"
    CONCURRENCY = "concurrency"
    PREPARING = "preparing"
    SNAPSHOT = "snapshot"
    PRIMARY_STOPPING = "primary_stopping"
    UNDETERMINED = "undetermined"
    REMOVING = "removing"
    BARRIER = "barrier"
    EXECUTOR_ERROR = "executor_error"
    BACKOFF = "backoff"
    BRAKE = "brake"


class DispatchAction(IntEnum):
    """What a dispatch asks of one span: AddTable in its two phases, or RemoveTable."""

    ADD_PREPARE = 0
    ADD_WRITE = 1
    REMOVE = 2
