"""The type of a write that is guarded by leadership, for code that does not know the election."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tablewire.etcd.values import Compare, Put


class GuardedWrite(Protocol):
    """Write all of it in one transaction if this owner still leads and the compares hold; return the revision.

    NotLeaderError: another owner leads. ConflictError: another compare failed. EtcdUnavailableError: it is not known
    whether the write was applied.
    """

    def __call__(self, puts: Sequence[Put], deletes: Sequence[str] = (), extra_compares: Sequence[Compare] = ()) -> int: ...
