"""Versions of the wire protocol, and which one two processes share."""

from __future__ import annotations

from dataclasses import dataclass

from tablewire.model.messages import PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class ProtocolVersions:
    """The versions of the wire that a process speaks, both ends included; its text is for people."""

    lowest: int = PROTOCOL_VERSION
    highest: int = PROTOCOL_VERSION

    def common(self, other: ProtocolVersions) -> int | None:
        """The one that both should speak; None: they cannot speak with each other."""
        version = min(self.highest, other.highest)
        return version if version >= max(self.lowest, other.lowest) else None

    def __contains__(self, version: int) -> bool:
        return self.lowest <= version <= self.highest

    def __str__(self) -> str:
        return str(self.lowest) if self.lowest == self.highest else f"{self.lowest} to {self.highest}"


SPOKEN = ProtocolVersions()
"""What this build speaks. A release that changes the wire raises `highest`, and keeps the former version for one more release."""

INCOMPATIBLE_LABEL = "incompatible"
"""The label in listings of captures whose versions do not overlap with the owner's; its value is the reason."""
