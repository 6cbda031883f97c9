"""Values and errors of an etcd session, and their conversion from and to etcd's messages. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import etcd3.etcdrpc as rpc

from tablewire.errors import EtcdError


class EtcdUnavailableError(EtcdError):
    """No member answered in time. A write may nevertheless have been applied."""


class LeaseLostError(EtcdError):
    """The lease does not exist."""


class CompactedError(EtcdError):
    """The requested revision has been compacted."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as of some revision. lease: 0 if it has none."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Compare:
    """The condition that a revision of a key has this value, which is 0 for a missing key."""

    key: str
    attribute: Literal["create_revision", "mod_revision"]
    revision: int


def is_absent(key: str) -> Compare:
    return Compare(key, "create_revision", 0)


def is_created_at(key: str, revision: int) -> Compare:
    """Require that the key has existed since this revision, whatever its value is."""
    return Compare(key, "create_revision", revision)


def is_unchanged(key: str, mod_revision: int) -> Compare:
    """Require that the key was last written at this revision (0: that it does not exist)."""
    return Compare(key, "mod_revision", mod_revision)


@dataclass(frozen=True, slots=True)
class Put:
    """A write of one key. lease: 0 for none, which detaches the key from its lease."""

    key: str
    value: bytes
    lease: int = 0


_NOTHING: Mapping[str, KeyValue] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class TransactionResult:
    """The outcome of a transaction; true if it was applied.

    revision: etcd's after the transaction, and the mod_revision of what it put. found: if it was
    not applied, the keys that it writes and those of `read_on_failure`, without the ones that do
    not exist.
    """

    applied: bool
    revision: int
    found: Mapping[str, KeyValue] = field(default_factory=lambda: _NOTHING)

    def __bool__(self) -> bool:
        return self.applied


@dataclass(frozen=True, slots=True)
class PrefixState:
    """All keys of a prefix as of one revision, in order of their names."""

    revision: int
    entries: Mapping[str, KeyValue]


# ---------------------------------------------------------------------------------------------------------------------
# etcd's messages


def prefix_end(prefix: str) -> bytes:
    """Return the first key after all keys with this prefix, whose last byte is below 0xff."""
    raw = to_bytes(prefix)
    return raw[:-1] + bytes((raw[-1] + 1,))


def to_bytes(text: str) -> bytes:
    return text.encode("utf-8")


def key_value(found: Any) -> KeyValue:
    key = found.key.decode("utf-8", "backslashreplace")
    return KeyValue(key, found.value, found.create_revision, found.mod_revision, found.lease)


def compare_message(compare: Compare) -> Any:
    target = {"create_revision": rpc.Compare.CREATE, "mod_revision": rpc.Compare.MOD}[compare.attribute]
    revision = {compare.attribute: compare.revision}
    return rpc.Compare(result=rpc.Compare.EQUAL, target=target, key=to_bytes(compare.key), **revision)


def put_message(put: Put) -> Any:
    return rpc.RequestOp(request_put=rpc.PutRequest(key=to_bytes(put.key), value=put.value, lease=put.lease))


def delete_message(key: str) -> Any:
    return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=to_bytes(key)))


def get_message(key: str) -> Any:
    return rpc.RequestOp(request_range=rpc.RangeRequest(key=to_bytes(key)))


def is_repeatable(compares: Sequence[Compare], written: Sequence[str]) -> bool:
    """Return whether each written key is compared with its previous state."""
    pinned = {compare.key for compare in compares if compare.attribute == "mod_revision" or compare.revision == 0}
    return pinned.issuperset(written)


def revision_if_applied(found: Mapping[str, KeyValue], puts: Sequence[Put], deletes: Sequence[str]) -> int:
    """Return the revision at which exactly this write was made, 0 if etcd holds something else."""
    if not puts or any(key in found for key in deletes):
        return 0
    stored = {key: (item.value, item.lease) for key, item in found.items()}
    revisions = {found[put.key].mod_revision if stored.get(put.key) == (put.value, put.lease) else 0 for put in puts}
    return revisions.pop() if len(revisions) == 1 else 0
