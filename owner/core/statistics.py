"""What executors tell of their spans beside progress, by row: columns that are made only when
somebody first tells anything.

A span weighs 1 until its rates say otherwise; the weight that placement uses moves slowly towards
what was told, so that a burst is not taken for a habit. Only `Tables` and `inbox.apply_stats` write
here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tablewire.model.columns import F64, I64, U64

F32 = npt.NDArray[np.float32]

WEIGHT_CLOSE = 0.01
"""A weight that is nearer than this share to what was told takes its place."""


class Statistics:
    """Columns of `capacity` rows, None before they are needed."""

    def __init__(self, capacity: int) -> None:
        self.puller_resolved_ts: U64 | None = None  # 0 = not given
        self.rates: F32 | None = None  # rows/s and bytes/s, shape (2, capacity)
        self.reported_weight: F32 | None = None
        self.have_changed = False  # rates or weights, since they were published
        self._is_settled = True  # the weights are what was told
        self._capacity = capacity

    def grow(self, capacity: int) -> None:
        more = capacity - self._capacity
        if self.puller_resolved_ts is not None:
            self.puller_resolved_ts = np.concatenate([self.puller_resolved_ts, np.zeros(more, np.uint64)])
        if self.rates is not None:
            self.rates = np.concatenate([self.rates, np.zeros((2, more), np.float32)], axis=1)
        if self.reported_weight is not None:
            self.reported_weight = np.concatenate([self.reported_weight, np.ones(more, np.float32)])
        self._capacity = capacity

    def forget(self, rows: I64) -> None:
        """These rows are somebody else's, or nobody's, from now on."""
        if self.puller_resolved_ts is not None:
            self.puller_resolved_ts[rows] = 0
        if self.rates is not None:
            self.rates[:, rows] = 0
        if self.reported_weight is not None:
            self.reported_weight[rows] = 1

    def set_puller(self, rows: I64, resolved_ts: U64) -> None:
        """How far the stage "puller" of these rows is; 0 = not given."""
        if self.puller_resolved_ts is None:
            if not resolved_ts.any():
                return
            self.puller_resolved_ts = np.zeros(self._capacity, np.uint64)
        self.puller_resolved_ts[rows] = np.maximum(self.puller_resolved_ts[rows], resolved_ts)

    def set_rates(self, rows: I64, rows_per_s: F64, bytes_per_s: F64) -> None:
        if self.rates is None:
            if not (rows_per_s.any() or bytes_per_s.any()):
                return
            self.rates = np.zeros((2, self._capacity), np.float32)
        self.rates[0, rows] = rows_per_s
        self.rates[1, rows] = bytes_per_s
        self.have_changed = True

    def set_weights(self, rows: I64, weights: F64) -> None:
        """What these rows should weigh by their last statistics."""
        if self.reported_weight is None:
            if (weights == 1).all():
                return
            self.reported_weight = np.ones(self._capacity, np.float32)
        self.reported_weight[rows] = weights
        self._is_settled = False

    def smooth(self, weight: F32, share: float) -> None:
        """Moves the weights, those of the rows in use, by this share towards what was told."""
        if self._is_settled or self.reported_weight is None:
            return
        told = self.reported_weight[: len(weight)]
        weight += np.float32(share) * (told - weight)
        close = np.abs(told - weight) < WEIGHT_CLOSE * told
        weight[close] = told[close]
        self._is_settled = bool(close.all())
        self.have_changed = True
