"""Versions of the wire protocol, and which one two processes have in common."""

from __future__ import annotations

from dataclasses import dataclass

from tablewire.model.messages import PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class ProtocolVersions:
    """The versions of the wire protocol that a process supports, from lowest to highest."""

    lowest: int = PROTOCOL_VERSION
    highest: int = PROTOCOL_VERSION

    def common(self, other: ProtocolVersions) -> int | None:
        """Return the highest version that both support, None if there is none."""
        version = min(self.highest, other.highest)
        return version if version >= max(self.lowest, other.lowest) else None

    def __contains__(self, version: int) -> bool:
        return self.lowest <= version <= self.highest

    def __str__(self) -> str:
        return str(self.lowest) if self.lowest == self.highest else f"{self.lowest} to {self.highest}"


SUPPORTED_VERSIONS = ProtocolVersions()
"""The versions of this build. A release that changes the wire keeps the previous version too."""

INCOMPATIBLE_LABEL = "incompatible"
"""The label of captures without a version in common with the owner; its value is the reason."""
