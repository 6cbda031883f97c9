"""Values and errors of an etcd session, and their conversion from and to etcd's messages. Pure.

Other packages import them from `tablewire.etcd.session`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any

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


class CompareTarget(Enum):
    """The attribute of a key that is compared. Revisions and version of a missing key are 0."""

    CREATE_REVISION = "create_revision"
    MOD_REVISION = "mod_revision"
    VERSION = "version"
    VALUE = "value"


@dataclass(frozen=True, slots=True)
class Compare:
    """The condition that `target` of `key` equals `operand` (bytes for VALUE, otherwise a number)."""

    key: str
    target: CompareTarget
    operand: int | bytes


def is_absent(key: str) -> Compare:
    return Compare(key, CompareTarget.CREATE_REVISION, 0)


def is_created_at(key: str, revision: int) -> Compare:
    """Require that the key has existed since this revision, whatever its value is."""
    return Compare(key, CompareTarget.CREATE_REVISION, revision)


def is_unchanged(key: str, mod_revision: int) -> Compare:
    """Require that the key was last written at this revision (0: that it does not exist)."""
    return Compare(key, CompareTarget.MOD_REVISION, mod_revision)


@dataclass(frozen=True, slots=True)
class Put:
    """A write of one key. lease: 0 for none, which also detaches the key from the lease that it had."""

    key: str
    value: bytes
    lease: int = 0


_NOTHING: Mapping[str, KeyValue] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class TransactionResult:
    """The outcome of a transaction; true if it was applied.

    revision: etcd's after the transaction, and the mod_revision of what it put. found: if it was not applied, the keys that it
    writes and those of `read_on_failure`, without the ones that do not exist.
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
    """Return the first key after all keys with this prefix, which is UTF-8 and not empty, so its last byte is below 0xff."""
    raw = to_bytes(prefix)
    return raw[:-1] + bytes((raw[-1] + 1,))


def to_bytes(text: str) -> bytes:
    return text.encode("utf-8")


def key_value(found: Any) -> KeyValue:
    key = found.key.decode("utf-8", "backslashreplace")
    return KeyValue(key, found.value, found.create_revision, found.mod_revision, found.lease)


def compare_message(compare: Compare) -> Any:
    target = {
        CompareTarget.CREATE_REVISION: rpc.Compare.CREATE,
        CompareTarget.MOD_REVISION: rpc.Compare.MOD,
        CompareTarget.VERSION: rpc.Compare.VERSION,
        CompareTarget.VALUE: rpc.Compare.VALUE,
    }[compare.target]
    operand = {compare.target.value: compare.operand}
    return rpc.Compare(result=rpc.Compare.EQUAL, target=target, key=to_bytes(compare.key), **operand)


def put_message(put: Put) -> Any:
    return rpc.RequestOp(request_put=rpc.PutRequest(key=to_bytes(put.key), value=put.value, lease=put.lease))


def delete_message(key: str) -> Any:
    return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=to_bytes(key)))


def get_message(key: str) -> Any:
    return rpc.RequestOp(request_range=rpc.RangeRequest(key=to_bytes(key)))


def is_repeatable(compares: Sequence[Compare], written: Sequence[str]) -> bool:
    """Return whether a transaction cannot be applied twice: each key that it writes is compared with its previous state."""
    pinned = {
        compare.key
        for compare in compares
        if compare.target in (CompareTarget.MOD_REVISION, CompareTarget.VERSION)
        or (compare.target is CompareTarget.CREATE_REVISION and compare.operand == 0)
    }
    return pinned.issuperset(written)


def revision_if_applied(found: Mapping[str, KeyValue], puts: Sequence[Put], deletes: Sequence[str]) -> int:
    """Return the revision at which exactly this write was made, 0 if etcd holds something else."""
    if not puts or any(key in found for key in deletes):
        return 0
    now = [found.get(put.key) for put in puts]
    if any(item is None or (item.value, item.lease) != (put.value, put.lease) for item, put in zip(now, puts, strict=True)):
        return 0
    revisions = {item.mod_revision for item in now if item is not None}
    return revisions.pop() if len(revisions) == 1 else 0
