"""Decisions about changed tables, against a model on which random DDL and DML is executed."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from tablewire.postgres.shapes import CopyAgain, Follow, SeenShape, TableShape, decide, decide_between_rows
from tests.tablewire.postgres.table_model import Row, SinkModel, SourceModel

NAMES = ("a", "b", "c")
KINDS = (23, 25, 1043)
OPERATIONS = ("add", "add", "drop", "rename", "compute", "widen", "harmless", "vacuum full", "write", "write", "write")


def _change(source: SourceModel, operation: str, data: st.DataObject) -> None:
    others = source.shape.columns[1:]
    free = [name for name in NAMES if name not in {column.name for column in source.shape.columns}]
    if operation == "add" and free:
        default = data.draw(st.sampled_from(("none", "constant", "volatile")))
        source.add(data.draw(st.sampled_from(free)), data.draw(st.sampled_from(KINDS)), default)
    elif operation == "vacuum full":
        source.rewrite()
    elif others:
        column = data.draw(st.sampled_from(others))
        match operation:
            case "drop":
                source.drop(column)
            case "rename" if free:
                source.alter(column, name=data.draw(st.sampled_from(free)))
            case "compute":
                source.compute(column, data.draw(st.sampled_from(KINDS)))
            case "widen":
                kinds = {25: 1043, 1043: 25}
                source.alter(column, type_oid=kinds.get(column.type_oid, column.type_oid))
            case "harmless":
                source.alter(column)


class History:
    """What the source did: for each moment the shape, the content, and the row that was written, if one was."""

    def __init__(self, data: st.DataObject) -> None:
        self.source = SourceModel()
        self.moments: list[tuple[TableShape, list[Row], tuple[SeenShape, Row] | None]] = []
        for key in range(3):
            self.source.write(key)
        self._note(None)
        for operation in data.draw(st.lists(st.sampled_from(OPERATIONS), max_size=14)):
            if operation == "write":
                row = self.source.write(data.draw(st.integers(0, 4)))
                self._note((self.source.seen(), row))
            else:
                _change(self.source, operation, data)
                self._note(None)

    def _note(self, written: tuple[SeenShape, Row] | None) -> None:
        self.moments.append((self.source.shape, self.source.content(), written))

    def sink_at(self, moment: int) -> tuple[TableShape, SinkModel]:
        """Return a sink that has just been copied."""
        shape, content, _ = self.moments[moment]
        rows = {int(str(row["id"])): dict(row) for row in content}
        return shape, SinkModel([column.name for column in shape.columns], rows)


def _same(sink: SinkModel, content: list[Row], shape: TableShape) -> bool:
    return set(sink.columns) == {column.name for column in shape.columns} and sink.content() == content


@settings(max_examples=1_000, deadline=None)
@given(st.data())
def test_no_decision_hides_a_difference(data: st.DataObject) -> None:
    """After each row that is not answered with a copy, the sink equals the source as it was at that row."""
    history = History(data)
    last = len(history.moments) - 1
    applied, sink = history.sink_at(0)
    moment = read_at = 0
    while moment < last:
        moment += 1
        shape, content, written = history.moments[moment]
        if written is None:
            continue
        read_at = data.draw(st.integers(max(moment, read_at), last))
        current = history.moments[read_at][0]
        proofs = data.draw(st.booleans()), data.draw(st.booleans())
        decision = decide(applied, current, written[0], proofs[0] and shape == applied, proofs[1] and shape == current)
        if isinstance(decision, CopyAgain):
            applied, sink = history.sink_at(read_at)
            moment = read_at
            continue
        if isinstance(decision, Follow):
            sink.apply(decision.steps)
            applied = decision.shape
        sink.write(written[1])
        assert _same(sink, content, shape), (decision, sink.content(), content)
    shape, content, _ = history.moments[last]
    decision = decide_between_rows(applied, shape)
    if not isinstance(decision, CopyAgain):
        if isinstance(decision, Follow):
            sink.apply(decision.steps)
        assert _same(sink, content, shape), (decision, sink.content(), content)


def test_most_changes_are_followed() -> None:
    """A decision is not a copy out of caution: what a migration usually does is followed while rows are written."""
    decisions: Counter[str] = Counter()

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.data())
    def count(data: st.DataObject) -> None:
        source = SourceModel()
        source.write(1)
        before = source.shape
        for operation in data.draw(
            st.lists(st.sampled_from(("add", "rename", "harmless", "widen", "drop")), min_size=1, max_size=2)
        ):
            _change(source, operation, data)
        decisions[type(decide(before, source.shape, source.seen())).__name__] += 1

    count()
    assert decisions["CopyAgain"] < decisions["Follow"] + decisions["Same"]
