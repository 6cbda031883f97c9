"""The planner: pure functions of columns, and their properties for any weights and loads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owner.core.jobs import JobReason, Reason
from owner.core.policies.planner import (
    MOVED_SHARE_MAX,
    LeastLoaded,
    Move,
    PlanInput,
    plan_drain,
    plan_move,
    plan_rebalance,
    refuse_target,
)
from owner.core.tables import NO_CAPTURE, PREPARE, REPLICATING
from tablewire.model.states import CaptureState

CAPTURES = 5
WEIGHTS = st.one_of(st.just(1.0), st.sampled_from([1.02, 2.0, 31.0]), st.floats(1, 50, width=32))
SPANS = st.lists(st.tuples(st.integers(0, CAPTURES - 1), WEIGHTS), max_size=60)
CLUSTER_LOAD = st.dictionaries(st.integers(0, CAPTURES - 1), st.floats(0, 100, width=32), max_size=CAPTURES)
ANY = settings(derandomize=True, deadline=None, max_examples=300)


def inputs_of(spans: Sequence[tuple[int, float]], cluster_load: dict[int, float] | None = None) -> PlanInput:
    """Replicating spans: (capture, weight) of each."""
    count = len(spans)
    return PlanInput(
        np.array([capture for capture, _ in spans], np.int16),
        np.full(count, NO_CAPTURE, np.int16),
        np.full(count, REPLICATING, np.uint8),
        np.array([weight for _, weight in spans], np.float32),
        range(CAPTURES),
        cluster_load or {},
    )


def by_capture(captures: Sequence[Sequence[float]]) -> PlanInput:
    """The weights of the spans of each capture."""
    inputs = inputs_of([(capture, weight) for capture, weights in enumerate(captures) for weight in weights])
    return PlanInput(inputs.primary, inputs.secondary, inputs.state, inputs.weight, range(len(captures)), {})


def every(inputs: PlanInput) -> np.ndarray:
    return np.ones(len(inputs.primary), np.bool_)


def after(inputs: PlanInput, moves: Sequence[Move]) -> PlanInput:
    """The input once these moves have ended."""
    primary = inputs.primary.copy()
    for move in moves:
        assert primary[move.row] == move.source
        primary[move.row] = move.target
    return PlanInput(primary, inputs.secondary, inputs.state, inputs.weight, inputs.captures, inputs.cluster_load)


def loads_of(inputs: PlanInput) -> list[float]:
    return inputs.loads()[list(inputs.captures)].tolist()


def squares(inputs: PlanInput) -> float:
    return sum(load**2 for load in loads_of(inputs))


# ---------------------------------------------------------------------------------------------------------------------
# Rebalance


@ANY
@given(SPANS, CLUSTER_LOAD, st.sampled_from([1, 5, 20]))
def test_a_rebalance_levels_the_loads_and_ends(
    spans: list[tuple[int, float]], cluster_load: dict[int, float], stop_percent: int
) -> None:
    """Each move lowers the spread, loads add up, and a plan for the result is empty."""
    inputs = inputs_of(spans, cluster_load)
    moves = plan_rebalance(inputs, every(inputs), stop_percent)
    result = after(inputs, moves)
    assert sum(loads_of(inputs)) == pytest.approx(sum(loads_of(result)))
    assert len({move.row for move in moves}) == len(moves)
    assert all(move.source != move.target and move.weight == inputs.weight[move.row] for move in moves)
    assert plan_rebalance(result, every(result), stop_percent) == []
    before, loads = loads_of(inputs), loads_of(result)
    assert max(loads) <= max(before)
    assert min(loads) >= min(before)
    if moves:
        assert squares(result) < squares(inputs)


@ANY
@given(SPANS, CLUSTER_LOAD)
def test_no_move_of_a_rebalance_only_permutes_loads(spans: list[tuple[int, float]], cluster_load: dict[int, float]) -> None:
    """Without any one of the moves the loads would be less level, and not just held by other captures."""
    inputs = inputs_of(spans, cluster_load)
    moves = plan_rebalance(inputs, every(inputs), 5)
    result = after(inputs, moves)
    for left_out in range(len(moves)):
        without = after(inputs, [*moves[:left_out], *moves[left_out + 1 :]])
        assert sorted(loads_of(without)) != pytest.approx(sorted(loads_of(result)))
        assert squares(without) > squares(result)


@ANY
@given(SPANS, CLUSTER_LOAD)
def test_a_rebalance_is_level_within_one_weight(spans: list[tuple[int, float]], cluster_load: dict[int, float]) -> None:
    """No capture has more load than the least loaded one plus its lightest span, or it is near enough to the mean; a span that
    is nearly as heavy as the gap is left where it is."""
    inputs = inputs_of(spans, cluster_load)
    result = after(inputs, plan_rebalance(inputs, every(inputs), 5))
    loads = loads_of(result)
    mean, least = sum(loads) / len(loads), min(loads)
    near_enough = 0.05 * mean * (1 + 1e-9)
    for capture, load in enumerate(loads):
        weights = result.weight[result.primary == capture]
        if len(weights) and load > mean and not (load - mean <= near_enough and mean - least <= near_enough):
            assert load - least < weights.min() / MOVED_SHARE_MAX * (1 + 1e-9)


@pytest.mark.parametrize(
    ("captures", "moves"),
    [
        ([[1, 1, 1.02], [1, 1]], 0),
        ([[1, 1, 1], [1, 1]], 0),
        ([[31, 31], [1, 1]], 1),
        ([[31, 1, 31, 1], [], []], 3),
        ([[1] * 5, [1] * 4, []], 3),
        ([[10, *[1] * 20], [14]], 1),
        ([[1] * 8], 0),
        ([], 0),
    ],
)
def test_a_rebalance_makes_the_fewest_moves(captures: list[list[float]], moves: int) -> None:
    """None that leaves two captures with each other's loads."""
    inputs = by_capture(captures)
    assert len(plan_rebalance(inputs, every(inputs), 5)) == moves


def test_a_span_that_may_not_move_stays() -> None:
    """The others are moved."""
    inputs = by_capture([[5, 1, 1, 1, 1, 1], []])
    movable = every(inputs)
    movable[0] = False
    moves = plan_rebalance(inputs, movable, 5)
    assert {move.row for move in moves} == {1, 2, 3, 4, 5}


# ---------------------------------------------------------------------------------------------------------------------
# Drains, and the placement of new spans


@ANY
@given(SPANS, CLUSTER_LOAD, st.sets(st.integers(0, CAPTURES - 1), min_size=1, max_size=2))
def test_a_drain_is_level_within_one_weight(
    spans: list[tuple[int, float]], cluster_load: dict[int, float], leaving: set[int]
) -> None:
    """Every span leaves, and no capture that took one has more load than the least loaded one plus the heaviest it took."""
    inputs = inputs_of(spans, cluster_load)
    moves = list(plan_drain(inputs, leaving, every(inputs)))
    assert {move.row for move in moves} == {row for row, (capture, _) in enumerate(spans) if capture in leaving}
    assert not {move.target for move in moves} & leaving
    loads = loads_of(after(inputs, moves))
    least = min(load for capture, load in enumerate(loads) if capture not in leaving)
    for target in {move.target for move in moves}:
        assert loads[target] - least <= max(move.weight for move in moves if move.target == target)


@ANY
@given(SPANS, CLUSTER_LOAD, st.integers(1, 7))
def test_the_rest_of_a_drain_is_planned_as_before(
    spans: list[tuple[int, float]], cluster_load: dict[int, float], begun: int
) -> None:
    """However few moves a tick begins, the plan of the next tick is the rest of the first plan."""
    inputs = inputs_of(spans, cluster_load)
    plan = list(plan_drain(inputs, {0}, every(inputs)))
    for move in plan[:begun]:
        inputs.secondary[move.row], inputs.state[move.row] = move.target, PREPARE
    assert list(plan_drain(inputs, {0}, every(inputs))) == plan[begun:]


def test_scenario_26_a_drain_places_by_weight() -> None:
    """Two heavy spans and two light ones: each of the others gets one of both."""
    inputs = by_capture([[31, 1, 31, 1], [], []])
    result = after(inputs, list(plan_drain(inputs, {0}, every(inputs))))
    assert loads_of(result) == [0, 32, 32]


def test_a_drain_prefers_captures_where_the_span_has_not_failed() -> None:
    """It avoids the capture that failed, unless there is no other one."""
    inputs = by_capture([[1], [5], []])
    failed = PlanInput(inputs.primary, inputs.secondary, inputs.state, inputs.weight, inputs.captures, {}, {0: 2})
    assert [move.target for move in plan_drain(inputs, {0}, every(inputs))] == [2]
    assert [move.target for move in plan_drain(failed, {0}, every(inputs))] == [1]
    assert [move.target for move in plan_drain(failed, {0, 1}, every(inputs))] == [2, 2]
    assert list(plan_drain(failed, {0, 1, 2}, every(inputs))) == []


@ANY
@given(
    st.lists(st.tuples(st.sampled_from([1.0, 1.5, 7.0, 31.0]), st.integers(1, 60)), max_size=5),
    st.lists(st.floats(0, 100, width=32), min_size=1, max_size=6),
)
def test_many_spans_are_placed_as_one_after_the_other(runs: list[tuple[float, int]], loads: list[float]) -> None:
    """A run of equal weights as a whole has the result of single steps, and is level within one weight."""
    weights = np.array(sorted(itertools.chain(*([weight] * count for weight, count in runs)), reverse=True), np.float32)
    indexes, start = list(range(len(loads))), np.array(loads, np.float64)
    targets = LeastLoaded(indexes, start).take_all(weights)
    one_by_one = LeastLoaded(indexes, start)
    expected = [one_by_one.take(float(weight)) for weight in weights]
    for weight in set(weights.tolist()):
        assert sorted(targets[weights == weight].tolist()) == sorted(np.array(expected)[weights == weight].tolist())
    ends = start + np.bincount(targets, weights=weights, minlength=len(loads))
    for target in set(targets.tolist()):
        assert ends[target] - ends.min() <= weights[targets == target].max()


def test_a_capture_is_excluded_or_avoided() -> None:
    """An excluded one is never taken; one to avoid is taken when it is the only one left."""
    least_loaded = LeastLoaded([4, 7], np.arange(8.0))
    assert least_loaded.take(1) == 4
    assert least_loaded.take(1, avoid={4}) == 7
    assert least_loaded.take(1, exclude={4}) == 7
    assert least_loaded.take(1, exclude={4}, avoid={7}) == 7
    assert least_loaded.take(1, exclude={4, 7}) == NO_CAPTURE
    assert least_loaded.take(6) == 4
    assert least_loaded.take(1) == 7
    assert LeastLoaded([], np.empty(0)).take(1) == NO_CAPTURE


# ---------------------------------------------------------------------------------------------------------------------
# Moves


def test_a_move_names_the_spans_that_are_not_at_the_target() -> None:
    """A span that is on its way there is still to be moved."""
    inputs = by_capture([[1], [2], [3]])
    assert plan_move(inputs, [0, 1, 2], 1) == [Move(0, 0, 1, 1.0), Move(2, 2, 1, 3.0)]
    inputs.state[1] = PREPARE
    assert len(plan_move(inputs, [0, 1, 2], 1)) == 3


@pytest.mark.parametrize(
    ("state", "is_drained", "reason"),
    [
        (CaptureState.READY, False, None),
        (CaptureState.READY, True, JobReason.TARGET_DRAINED),
        (CaptureState.SILENT, False, JobReason.TARGET_SILENT),
        (CaptureState.STOPPING, False, JobReason.TARGET_STOPPING),
        (CaptureState.UNINITIALIZED, False, JobReason.TARGET_UNINITIALIZED),
        (None, False, JobReason.TARGET_UNKNOWN),
    ],
)
def test_a_target_that_cannot_take_spans_is_refused(
    state: CaptureState | None, is_drained: bool, reason: JobReason | None
) -> None:
    """With the reason."""
    refused = refuse_target("b", state, is_drained)
    assert (refused.code if isinstance(refused, Reason) else None) is reason
