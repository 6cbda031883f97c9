"""With whom which version of the wire is spoken, and who counts as alive without being spoken with."""

from __future__ import annotations

from owner.leadership.compatibility import FOREIGN_LABEL, Spoken
from tablewire.etcd.records import CaptureRecord, decode, encode, now
from tablewire.wire.versions import ProtocolVersions


def record(name: str, lowest: int, highest: int) -> CaptureRecord:
    """A processor that speaks these versions."""
    return CaptureRecord(
        id=name, address=f"{name}:1", labels={"zone": "x"}, started_at=now(), protocol_lowest=lowest, protocol_highest=highest
    )


def test_scenario_36_each_pair_has_its_own_version() -> None:
    """The highest that both know; a record from before versions were registered speaks 1."""
    old = decode(CaptureRecord, "key", b'{"id": "old", "address": "a:1", "started_at": "2026-01-01T00:00:00Z"}')
    spoken = Spoken(ProtocolVersions(1, 3))
    alive = spoken.take([old, record("a", 1, 2), record("b", 2, 9)])
    assert set(alive) == {"old", "a", "b"}
    assert spoken.versions == {"old": 1, "a": 2, "b": 3}
    assert not spoken.foreign
    assert decode(CaptureRecord, "key", encode(record("b", 2, 9))).protocols == ProtocolVersions(2, 9)


def test_scenario_36_a_foreign_newcomer_is_not_there() -> None:
    """It is shown with the reason beside its own labels, and nothing waits for it."""
    spoken = Spoken(ProtocolVersions(1, 1))
    assert set(spoken.take([record("a", 1, 1)])) == {"a"}
    alive = spoken.take([record("a", 1, 1), record("new", 2, 3)])
    assert set(alive) == {"a"}
    assert spoken.foreign["new"].labels == {"zone": "x", FOREIGN_LABEL: "speaks protocol 2 to 3, this owner 1"}


def test_scenario_36_a_foreign_capture_from_before_may_hold_tables() -> None:
    """It counts as alive, so that nobody else writes them, and is not called; once it has gone it is forgotten."""
    spoken = Spoken(ProtocolVersions(2, 2))
    alive = spoken.take([record("a", 1, 2), record("former", 1, 1)])
    assert set(alive) == {"a", "former"}
    assert set(spoken.reached(alive)) == {"a"}
    assert set(spoken.take([record("a", 1, 2)])) == {"a"}
    assert not spoken.foreign
