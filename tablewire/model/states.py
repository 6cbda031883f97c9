"""The enums of the protocol. Columns and the wire hold the `code` of a member.

A code is the position in the definition, so new members are only ever appended.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from functools import cache
from typing import Self


class CodedEnum(StrEnum):
    """A StrEnum whose members have a small stable number."""

    code: int

    def __init__(self, _value: str) -> None:
        self.code = len(type(self).__members__)

    @classmethod
    def from_code(cls, code: int) -> Self:
        """Return the member with this code; raise ValueError if there is none."""
        members = cls._members()
        if not 0 <= code < len(members):
            raise ValueError(f"{cls.__name__} has no code {code}")
        return members[code]

    @classmethod
    @cache
    def _members(cls) -> tuple[Self, ...]:
        return tuple(cls)


class TableState(CodedEnum):
    """The state of a span as an agent reports it. Each state leads to the next."""

    ABSENT = "absent"
    PREPARING = "preparing"
    PREPARED = "prepared"
    REPLICATING = "replicating"
    STOPPING = "stopping"
    STOPPED = "stopped"


class ReplicationState(CodedEnum):
    """The state of a span as the owner keeps it."""

    ABSENT = "absent"
    PREPARE = "prepare"
    COMMIT = "commit"
    REPLICATING = "replicating"
    REMOVING = "removing"


class CaptureState(CodedEnum):
    UNINITIALIZED = "uninitialized"
    READY = "ready"
    SILENT = "silent"
    STOPPING = "stopping"


class LivenessState(CodedEnum):
    ALIVE = "alive"
    STOPPING = "stopping"


class QueryKind(CodedEnum):
    MOVE = "move"
    REBALANCE = "rebalance"
    DRAIN = "drain"
    CANCEL = "cancel"


class QueryState(CodedEnum):
    PENDING = "pending"
    ACCEPTED = "accepted"
    REFUSED = "refused"
    DONE = "done"
    CANCELLED = "cancelled"


class StallReason(CodedEnum):
    """Why a span is not replicating steadily; docs/troubleshooting.md explains each reason."""

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
    """What a dispatch requests for one span: AddTable in its two phases, or RemoveTable."""

    ADD_PREPARE = 0
    ADD_WRITE = 1
    REMOVE = 2
