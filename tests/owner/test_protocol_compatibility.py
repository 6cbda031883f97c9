"""The protocol version for each capture, and which incompatible captures count as alive."""

from __future__ import annotations

from owner.leadership.protocol_compatibility import ProtocolCompatibility
from tablewire.etcd.records import CaptureRecord, decode, encode, now
from tablewire.wire.versions import INCOMPATIBLE_LABEL, ProtocolVersions


def record(name: str, lowest: int, highest: int) -> CaptureRecord:
    """Return the record of a processor that supports these versions."""
    return CaptureRecord(
        id=name, address=f"{name}:1", labels={"zone": "x"}, started_at=now(), protocol_lowest=lowest, protocol_highest=highest
    )


def test_scenario_36_each_pair_has_its_own_version() -> None:
    """The highest common version is used; a record written before versions were registered means 1."""
    old = decode(CaptureRecord, "key", b'{"id": "old", "address": "a:1", "started_at": "2026-01-01T00:00:00Z"}')
    compatibility = ProtocolCompatibility(ProtocolVersions(1, 3))
    alive = compatibility.update([old, record("a", 1, 2), record("b", 2, 9)])
    assert set(alive) == {"old", "a", "b"}
    assert compatibility.versions == {"old": 1, "a": 2, "b": 3}
    assert not compatibility.incompatible
    assert decode(CaptureRecord, "key", encode(record("b", 2, 9))).protocols == ProtocolVersions(2, 9)


def test_scenario_36_an_incompatible_newcomer_is_ignored() -> None:
    """An incompatible newcomer is listed with the reason beside its own labels, and nothing waits
    for it."""
    compatibility = ProtocolCompatibility(ProtocolVersions(1, 1))
    assert set(compatibility.update([record("a", 1, 1)])) == {"a"}
    alive = compatibility.update([record("a", 1, 1), record("new", 2, 3)])
    assert set(alive) == {"a"}
    assert compatibility.incompatible["new"].labels == {"zone": "x", INCOMPATIBLE_LABEL: "speaks protocol 2 to 3, this owner 1"}


def test_scenario_36_an_incompatible_capture_from_before_may_hold_tables() -> None:
    """It counts as alive, so its tables stay with it, and it is not called; once its registration
    ends it is forgotten."""
    compatibility = ProtocolCompatibility(ProtocolVersions(2, 2))
    alive = compatibility.update([record("a", 1, 2), record("former", 1, 1)])
    assert set(alive) == {"a", "former"}
    assert set(compatibility.compatible(alive)) == {"a"}
    assert set(compatibility.update([record("a", 1, 2)])) == {"a"}
    assert not compatibility.incompatible
