"""The decision whether replication may continue at a server: each case, without a server."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tablewire.errors import OperatingError
from tablewire.postgres.lsn import parse_lsn
from tablewire.postgres.servers import (
    Action,
    Mark,
    ServerIdentity,
    ServerState,
    SinkState,
    SourceRecord,
    decide,
    parse_history,
    record_from_json,
    record_to_json,
)
from tablewire.postgres.slots import SlotInfo

SERVER = ServerIdentity(system=7, database=5, timeline=1)
SLOT = SlotInfo("s", "pgoutput", "d", restart_ts=80, confirmed_ts=90, lost_reason="")
LOST = replace(SLOT, lost_reason="idle_timeout")
IDLE = Mark(position=95, xmin=50, xmax=50)
RECORD = SourceRecord(SERVER, IDLE, restart_ts=80)
NOW = ServerState(SERVER, wal_end=200, xmax=50, slot=SLOT)


def now(**changes: object) -> ServerState:
    return replace(NOW, **changes)  # type: ignore[arg-type]


def over(**changes: object) -> ServerState:
    """The same after a failover at 120."""
    return replace(NOW, **{"server": replace(SERVER, timeline=2), "switch_ts": 120, **changes})  # type: ignore[arg-type]


def slot(**changes: object) -> SlotInfo:
    return replace(SLOT, **changes)  # type: ignore[arg-type]


def server(**changes: object) -> ServerIdentity:
    return replace(SERVER, **changes)  # type: ignore[arg-type]


def sink(checkpoint_ts: int = 100, highest_ts: int = 100, **record: object) -> SinkState:
    return SinkState(replace(RECORD, **record), checkpoint_ts, highest_ts)  # type: ignore[arg-type]


NONE = SinkState(None, 100)

CASES = [
    # what                                   the source                       the sink                    the decision
    ("the same server",                      now(),                           sink(),                     "continue"),
    ("nothing was recorded yet",             now(),                           NONE,                       "continue"),
    ("nothing was recorded, slot missing",   now(slot=None),                  NONE,                       "fail: not exist"),
    ("another server",                       now(server=server(system=8)),    sink(),                     "fail: is 8"),
    ("another database",                     now(server=server(database=6)),  sink(),                     "fail: is 6"),
    ("WAL ends before the checkpoint",       now(wal_end=99),                 sink(),                     "fail: up to 0/64"),
    ("WAL ends before a table",              now(wal_end=150),                sink(highest_ts=151),       "fail: up to 0/97"),
    ("WAL ends exactly there",               now(wal_end=100),                sink(),                     "continue"),
    ("fewer transactions than were seen",    now(xmax=49),                    sink(),                     "fail: is 49"),
    ("fewer, but the mark is not common",    over(xmax=49, switch_ts=94),     sink(90, 90),               "continue"),
    ("the slot went back",                   now(slot=slot(restart_ts=79)),   sink(),                     "fail: an older copy"),
    ("the slot went back by a failover",     over(slot=slot(restart_ts=79)),  sink(),                     "continue"),
    ("the slot is past the checkpoint",      now(slot=slot(confirmed_ts=101), xmax=51), sink(),           "fail: 0/65 on"),
    ("it is, and nothing happened",          now(slot=slot(confirmed_ts=101)), sink(),                    "pass_over"),
    ("it is, since it was restored",         now(slot=slot(confirmed_ts=101)), sink(restored_ts=101),     "continue"),
    ("failover, the slot is there",          over(),                          sink(),                     "continue"),
    ("failover at the checkpoint",           over(switch_ts=100),             sink(),                     "continue"),
    ("failover before the checkpoint",       over(switch_ts=99),              sink(),                     "fail: at 0/63"),
    ("failover before a row at the sink",    over(),                          sink(highest_ts=121),       "fail: up to 0/79"),
    ("a timeline of another history",        over(switch_ts=0),               sink(),                     "fail: not contain"),
    ("back to a former primary",             now(),                           sink(server=server(timeline=2)), "fail: is on "),
    ("missing, a processor has one",         now(slot=None, xmax=60, living_slot="x"), sink(),            "restore"),
    ("lost, a processor has one",            now(slot=LOST, xmax=60, living_slot="x"), sink(),            "restore"),
    ("missing, nothing happened",            now(slot=None),                  sink(),                     "pass_over"),
    ("missing by failover, nothing happened", over(slot=None),                sink(),                     "pass_over"),
    ("missing, a transaction has ended",     now(slot=None, xmax=51),         sink(),                     "fail: are lost"),
    ("missing, the mark was not idle",       now(slot=None),                  sink(mark=Mark(95, 49, 50)), "fail: are lost"),
    ("missing, the mark is after the checkpoint", now(slot=None),             sink(mark=Mark(101, 50, 50)), "fail: are lost"),
    ("missing, the mark is after the switch", over(slot=None, switch_ts=100), sink(mark=Mark(105, 50, 50)), "fail: are lost"),
    ("missing, without a mark",              now(slot=None),                  sink(mark=None),            "fail: are lost"),
    ("lost, a transaction has ended",        now(slot=LOST, xmax=51),         sink(),                     "fail: idle_"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "at_sink", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_each_case(source: ServerState, at_sink: SinkState, expected: str) -> None:
    """The action is that of the table above, and a failure names the reason."""
    action, _, reason = expected.partition(": ")
    found = decide(source, at_sink)
    assert found.action == Action(action), found.reason
    assert reason in found.reason
    assert bool(found.reason) is (action == "fail")


def test_record_survives_the_sink() -> None:
    """What is written to tablewire.checkpoints.source is what is read; what cannot be read is an error, not an empty record."""
    full = SourceRecord(replace(SERVER, system=2**63 + 1), Mark(1, 2, 3), 4, 5)
    for kept in (full, SourceRecord(SERVER)):
        assert record_from_json(record_to_json(kept)) == kept
    assert record_from_json(None) is None
    with pytest.raises(OperatingError, match="cannot be read"):
        record_from_json({"system": "x"})


def test_history_of_a_timeline() -> None:
    """The file that the server sends lists the end of each earlier timeline."""
    text = "1\t0/3000060\tno recovery target specified\n\n2\t1/A0\tbefore 2000-01-01 00:00:00+00\n"
    assert parse_history(text) == {1: parse_lsn("0/3000060"), 2: parse_lsn("1/A0")}
