"""Several changefeeds on the same processors: the cluster is balanced with few moves, and stays
balanced."""

from __future__ import annotations

from collections.abc import Mapping

from owner.changefeed.cluster_load import ClusterLoad
from owner.core.scheduler_config import SchedulerConfig
from tablewire.model.states import QueryState
from tests.owner.world import World


class Cluster:
    """Worlds that tick one after another, as the changefeeds of one owner do."""

    def __init__(self, *sizes: int, config: SchedulerConfig | None = None) -> None:
        """sizes: tables of each changefeed, all of them on capture a."""
        self.worlds = [World(captures=("a",), tables=range(1, size + 1)) for size in sizes]
        self.loads: list[Mapping[str, float]] = [{} for _ in sizes]
        self.elsewhere: list[Mapping[str, float]] = [{} for _ in sizes]
        for at, world in enumerate(self.worlds):
            world.config = config or world.config
            world.scheduler = world.new_scheduler(cluster_load=lambda at=at: self.elsewhere[at])
            world.settle()
            world.join("b")
            world.run(10)

    def step(self) -> None:
        cluster = ClusterLoad(self.loads)
        for at, world in enumerate(self.worlds):
            self.elsewhere[at] = cluster.without(self.loads[at])
            world.step()
            after = world.snapshot.loads_to_come()
            cluster.replace(self.loads[at], after)
            self.loads[at] = after

    def run(self, rounds: int) -> int:
        """Run this many rounds, and return how many spans changed their writer."""
        moves, before = 0, self.places()
        for _ in range(rounds):
            self.step()
            after = self.places()
            moves += sum(one != other for one, other in zip(before, after, strict=True))
            before = after
        return moves

    def total(self) -> dict[str, float]:
        return {capture: sum(load.get(capture, 0.0) for load in self.loads) for capture in "ab"}

    def places(self) -> list[str]:
        return [world.primary(table) for world in self.worlds for table in world.tables]


def test_scenario_26_two_changefeeds_that_rebalance_at_once_do_not_swing() -> None:
    """Each alone would move half of the difference; together they would move too much, and then
    move it back."""
    cluster = Cluster(20, 20)
    queries = [world.scheduler.rebalance() for world in cluster.worlds]
    assert cluster.run(100) == 19
    assert [query.state for query in queries] == [QueryState.DONE, QueryState.DONE]
    assert cluster.total() == {"a": 21.0, "b": 19.0}  # within balance_stop_percent of the mean


def test_scenario_26_two_changefeeds_that_balance_by_themselves_do_not_swing() -> None:
    """Both find the cluster unbalanced in the same round, and only one of them moves spans."""
    cluster = Cluster(20, 20, config=SchedulerConfig(balance_interval_ms=2_000, move_cooldown_ms=1))
    assert cluster.run(300) == 19
    assert cluster.total() == {"a": 21.0, "b": 19.0}
