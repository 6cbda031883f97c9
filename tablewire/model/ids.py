"""Identifiers and positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

Ts: TypeAlias = int
"""A position in the source: unsigned 64 bit, monotone, defined by the source (PostgreSQL: an LSN)."""
TableID: TypeAlias = int
"""Signed 64 bit."""
CaptureID: TypeAlias = str
"""One run of a processor process; new at every start."""

TS_MAX: Ts = 2**64 - 1
CHECKPOINT_CANNOT_PROCEED: Ts = 0
"""The global checkpoint as long as it must not advance."""

_NO_LABELS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class CaptureInfo:
    """A processor as registered under its lease. `address` is host:port of its gRPC server."""

    id: CaptureID
    address: str
    version: str = ""
    labels: Mapping[str, str] = field(default_factory=lambda: _NO_LABELS)


@dataclass(frozen=True, slots=True, order=True)
class ChangefeedID:
    namespace: str
    id: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.id}"
