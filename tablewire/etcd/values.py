"""The values that an etcd session takes and gives, its errors, and their way into etcd's messages. Pure.

Import them from `tablewire.etcd.session`; this module is apart only so that the session and its watches can share it.
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
    """No member answered in time. A write may have been applied all the same."""


class LeaseLostError(EtcdError):
    """The lease does not exist (any more)."""


class CompactedError(EtcdError):
    """The revision that was asked for has been compacted away."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as it stood at some revision. lease: 0 = none."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int = 0


class CompareTarget(Enum):
    """What of a key is compared; the revisions and the version of a key that does not exist are 0."""

    CREATE_REVISION = "create_revision"
    MOD_REVISION = "mod_revision"
    VERSION = "version"
    VALUE = "value"


@dataclass(frozen=True, slots=True)
class Compare:
    """`target` of `key` equals `operand` (bytes for VALUE, else a number)."""

    key: str
    target: CompareTarget
    operand: int | bytes


def is_absent(key: str) -> Compare:
    return Compare(key, CompareTarget.CREATE_REVISION, 0)


def is_created_at(key: str, revision: int) -> Compare:
    """The key is the one that was created at this revision, whatever it holds now."""
    return Compare(key, CompareTarget.CREATE_REVISION, revision)


def is_unchanged(key: str, mod_revision: int) -> Compare:
    """Nobody wrote the key since this revision (0: it still does not exist)."""
    return Compare(key, CompareTarget.MOD_REVISION, mod_revision)


@dataclass(frozen=True, slots=True)
class Put:
    """lease: 0 = none (and takes the key off the lease that it had)."""

    key: str
    value: bytes
    lease: int = 0


_NOTHING: Mapping[str, KeyValue] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Transaction:
    """What became of a transaction; true when it was applied. revision: etcd's after it, the mod_revision of what it put.
    found: the keys asked for by `read_on_failure`, as they stood when a compare failed (a missing key is not in it)."""

    applied: bool
    revision: int
    found: Mapping[str, KeyValue] = field(default_factory=lambda: _NOTHING)

    def __bool__(self) -> bool:
        return self.applied


@dataclass(frozen=True, slots=True)
class Credentials:
    """PEM texts for TLS to etcd. root: None = the system's roots. key and chain: both or none (a client certificate)."""

    root: bytes | None = None
    key: bytes | None = None
    chain: bytes | None = None


@dataclass(frozen=True, slots=True)
class PrefixState:
    """All keys of a prefix as they stood at one revision."""

    revision: int
    entries: Mapping[str, KeyValue]


# ---------------------------------------------------------------------------------------------------------------------
# etcd's messages


def prefix_end(prefix: str) -> bytes:
    """The first key after all that start with the prefix (which is not empty and ends below 0xff, as UTF-8 does)."""
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
    """Whether applying it twice is impossible: every key it writes is pinned to how it was before."""
    pinned = {
        compare.key
        for compare in compares
        if compare.target in (CompareTarget.MOD_REVISION, CompareTarget.VERSION)
        or (compare.target is CompareTarget.CREATE_REVISION and compare.operand == 0)
    }
    return pinned.issuperset(written)


def revision_if_applied(found: Mapping[str, KeyValue], puts: Sequence[Put], deletes: Sequence[str]) -> int:
    """The revision of this very write if it is what stands in etcd, else 0."""
    if not puts or any(key in found for key in deletes):
        return 0
    now = [found.get(put.key) for put in puts]
    if any(item is None or (item.value, item.lease) != (put.value, put.lease) for item, put in zip(now, puts, strict=True)):
        return 0
    revisions = {item.mod_revision for item in now if item is not None}
    return revisions.pop() if len(revisions) == 1 else 0
