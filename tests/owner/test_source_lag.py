"""The lag in seconds, computed from the positions of the source and their times."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from owner.changefeed.source_lag import SAMPLES_MAX, SourceLag


def test_the_lag_is_how_long_ago_the_source_was_there() -> None:
    """The lag grows while the checkpoint stands still, and is 0 when the checkpoint has caught up."""
    lag = SourceLag()
    lag.observe(100, 0, 10.0)
    lag.observe(200, 100, 11.0)
    lag.observe(300, 100, 12.0)
    assert lag.seconds(100, 12.0) == 1.0
    assert lag.seconds(100, 20.0) == 9.0
    assert lag.seconds(250, 20.0) == 8.0
    assert lag.seconds(300, 20.0) == 0.0


def test_an_idle_source_has_no_lag() -> None:
    """A source that does not move has no lag, for any length of time."""
    lag = SourceLag()
    for second in range(100):
        lag.observe(500, 500, float(second))
    assert lag.seconds(500, 100.0) == 0.0


@given(st.integers(1, 3 * SAMPLES_MAX))
def test_a_long_lag_is_remembered_in_bounds(samples: int) -> None:
    """If the checkpoint never moves, the oldest sample is kept, and memory is bounded."""
    lag = SourceLag()
    for at in range(1, samples + 1):
        lag.observe(at, 0, float(at))
    assert len(lag._samples) <= SAMPLES_MAX
    assert lag.seconds(0, samples + 1.0) == samples
