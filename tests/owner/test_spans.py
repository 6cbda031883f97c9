"""Tables of several spans: splitting, holes, moves of spans, and the watermark."""

from __future__ import annotations

import numpy as np
import pytest

from owner.core.coverage import uncovered_tables
from tablewire.model.columns import I64
from tablewire.model.progress import Watermark
from tablewire.model.spans import Span, SpanBlock
from tablewire.model.splitter import HashRanges, Splitter, WholeTables
from tablewire.model.states import QueryState, ReplicationState
from tests.owner.world import World


class Holes:
    """A splitter that omits the second half of each table."""

    def split(self, table_ids: I64) -> SpanBlock:
        spans = HashRanges(2).split(table_ids)
        return SpanBlock.of([span for span in spans if span.end_key])


def split_world(splitter: Splitter, tables: int = 3) -> World:
    world = World(tables=range(1, tables + 1))
    world.splitter = splitter
    world.scheduler = world.new_scheduler()
    return world


def all_steady(world: World, spans: int) -> bool:
    views = list(world.snapshot.spans)
    return len(views) == spans and all(view.state is ReplicationState.REPLICATING for view in views)


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 256])
def test_hash_ranges_cover_each_table(parts: int) -> None:
    """Spans are adjacent, cover the table, and have the requested number."""
    spans = HashRanges(parts).split(np.array([4, 9], np.int64))
    assert len(spans) == 2 * parts
    assert uncovered_tables(spans) == {}
    assert sorted(spans) == list(spans)


def test_holes_and_overlaps_are_found() -> None:
    """A missing start, middle or end, and an overlap, are each reported with the table and the key."""
    spans = [
        Span(1, b"\x10"),
        Span(2, b"", b"\x10"),
        Span(3, b"", b"\x10"),
        Span(3, b"\x20"),
        Span(4, b"", b"\x20"),
        Span(4, b"\x10"),
        Span(5, b"", b"\x10"),
        Span(5, b"\x10"),
        Span(6),
    ]
    found = uncovered_tables(SpanBlock.of(spans))
    assert sorted(found) == [1, 2, 3, 4]
    assert "10" in found[1]


def test_a_hole_stops_the_watermark() -> None:
    """The watermark is 0 while the spans of a table do not cover it."""
    world = split_world(Holes())
    world.run(6)
    assert all_steady(world, 3)
    assert world.watermark == Watermark(0, 0, 0, 0)


def test_spans_are_spread_moved_and_counted() -> None:
    """Twelve spans of three tables are spread evenly, one of them is moved alone, and the watermark
    is their minimum."""
    world = split_world(HashRanges(4))
    world.until(lambda: all_steady(world, 12))
    assert sorted(view.spans for view in world.snapshot.captures) == [4, 4, 4]
    span = world.snapshot.spans[1].span
    source = world.snapshot.spans[1].primary
    target = next(capture for capture in "abc" if capture != source)
    before = {view.span: view.primary for view in world.snapshot.spans if view.span != span}
    query = world.scheduler.move_span(span, target)
    world.until(lambda: query.state is QueryState.DONE)
    after = {view.span: view.primary for view in world.snapshot.spans}
    assert after.pop(span) == target
    assert after == before
    world.advance(500)
    world.executors[target].advance(900, span)
    world.run(3)
    assert world.watermark.checkpoint_ts == 500


def test_move_table_moves_all_its_spans() -> None:
    """One query covers all spans of a table."""
    world = split_world(HashRanges(4))
    world.until(lambda: all_steady(world, 12))
    query = world.scheduler.move_table(2, "c")
    world.until(lambda: query.state is QueryState.DONE)
    assert {view.primary for view in world.snapshot.spans if view.span.table_id == 2} == {"c"}


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 3)])
def test_a_new_split_by_a_new_owner_makes_no_two_writers(before: int, after: int) -> None:
    """Overlapping spans are never held together: the old ones stop first, then the new ones start,
    and progress never goes back."""
    world = split_world(HashRanges(before))
    world.until(lambda: all_steady(world, 3 * before))
    world.advance(400)
    world.run(3)
    world.splitter = HashRanges(after)
    world.elect("owner2")
    for _ in range(60):
        world.step()
        for table in world.tables:
            held = [span for executor in world.executors.values() for span in executor.spans() if span.table_id == table]
            writers = [span for span in held if world.sink.writers(span)]
            assert not (
                set(writers) & old_spans(before, table) and set(writers) & old_spans(after, table) - old_spans(before, table)
            )
    assert all_steady(world, 3 * after)
    assert world.watermark.checkpoint_ts == 400


def old_spans(parts: int, table: int) -> set[Span]:
    return set(HashRanges(parts).split(np.array([table], np.int64)))


def test_whole_tables_are_the_default() -> None:
    """There is one span for each table."""
    assert list(WholeTables().split(np.array([1, 2], np.int64))) == [Span(1), Span(2)]


def test_audit_finds_unexpected_spans() -> None:
    """A capture that holds other spans than its owner expects sends a complete report, and is
    corrected."""
    world = World(tables=[1, 2, 3])
    world.settle()
    core = world.scheduler._core  # type: ignore[attr-defined]
    row = core.tables.row_of(Span(1))
    core.tables.primary_reported[row] = 1  # as a bug might leave it
    core.audits_failed = 0
    world.run(3)
    world.until(lambda: core.audits_failed == 1, ticks=120)
    core.tables.steady[row] = False
    world.run(120)
    assert core.audits_failed == 1
    assert core.tables.primary_reported[row] == 3
    assert world.view(1).state is ReplicationState.REPLICATING
