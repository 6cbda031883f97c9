"""Statistics of spans, by row: columns that are made when an executor first reports any.

A span weighs 1 until its rates are known. The weight that placement uses moves slowly towards the
weight by the last rates, so that a burst does not move spans.
"""

from __future__ import annotations

import numpy as np

from tablewire.model.columns import F32, F64, I64, U64

_EMPTY = {"puller_resolved_ts": 0, "rates": 0, "reported_weight": 1}
WEIGHT_CLOSE = 0.01
"""A weight within this share of its target is set to the target."""


class Statistics:
    """Columns of `capacity` rows, None before they are needed."""

    def __init__(self, capacity: int) -> None:
        self.puller_resolved_ts: U64 | None = None  # 0 = not reported
        self.rates: F32 | None = None  # rows/s and bytes/s, shape (2, capacity)
        self.reported_weight: F32 | None = None  # by the last rates
        self.has_rates = False  # an executor has reported rates, maybe 0
        self.have_changed = False  # rates or weights have, since they were published
        self._is_settled = True  # every weight is the reported one
        self._capacity = capacity

    def grow(self, capacity: int) -> None:
        for name, empty in _EMPTY.items():
            column = getattr(self, name)
            if column is not None:
                wider = np.full((*column.shape[:-1], capacity), empty, column.dtype)
                wider[..., : self._capacity] = column
                setattr(self, name, wider)
        self._capacity = capacity

    def forget(self, rows: I64) -> None:
        """Reset rows that are dropped."""
        for name, empty in _EMPTY.items():
            column = getattr(self, name)
            if column is not None:
                column[..., rows] = empty

    def set_puller(self, rows: I64, resolved_ts: U64) -> None:
        """Set resolved_ts of the stage "puller"; 0 = not reported."""
        if self.puller_resolved_ts is None:
            if not resolved_ts.any():
                return
            self.puller_resolved_ts = np.zeros(self._capacity, np.uint64)
        self.puller_resolved_ts[rows] = np.maximum(self.puller_resolved_ts[rows], resolved_ts)

    def set_rates(self, rows: I64, rows_per_s: F64, bytes_per_s: F64) -> None:
        self.has_rates = True
        if self.rates is None:
            if not (rows_per_s.any() or bytes_per_s.any()):
                return
            self.rates = np.zeros((2, self._capacity), np.float32)
        self.rates[0, rows] = rows_per_s
        self.rates[1, rows] = bytes_per_s
        self.have_changed = True

    def set_weights(self, rows: I64, weights: F64) -> None:
        """Set the weights by the last rates."""
        if self.reported_weight is None:
            if (weights == 1).all():
                return
            self.reported_weight = np.ones(self._capacity, np.float32)
        self.reported_weight[rows] = weights
        self._is_settled = False

    def smooth(self, weight: F32, share: float) -> None:
        """Move the weights of the rows in use by this share towards the reported ones."""
        if self._is_settled or self.reported_weight is None:
            return
        target = self.reported_weight[: len(weight)]
        weight += np.float32(share) * (target - weight)
        close = np.abs(target - weight) < WEIGHT_CLOSE * target
        weight[close] = target[close]
        self._is_settled = bool(close.all())
        self.have_changed = True
