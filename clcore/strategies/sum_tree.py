"""SumTree: sums of priorities in a binary tree, to draw a row by its share and to change one cheaply."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from clcore.engine.errors import ConfigError, DataError


class SumTree:
    """Priorities of rows, and their prefix sums in log2(capacity) steps."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ConfigError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self._num_leaves = 1 << math.ceil(math.log2(capacity))
        self._nodes = np.zeros(2 * self._num_leaves)  # node i has children 2i and 2i + 1; the root is 1

    @property
    def total(self) -> float:
        return float(self._nodes[1])

    @property
    def priorities(self) -> np.ndarray:
        """A copy of all priorities, (capacity,)."""
        return self._nodes[self._num_leaves : self._num_leaves + self.capacity].copy()

    def update(self, indices: Sequence[int] | np.ndarray, priorities: Sequence[float] | np.ndarray) -> None:
        """Set priorities by position. Raises DataError for a bad position or a negative or infinite value."""
        places, values = np.asarray(indices, dtype=np.int64), np.asarray(priorities, dtype=np.float64)
        if places.shape != values.shape:
            raise DataError(f"got {places.size} indices and {values.size} priorities")
        bad = places[(places < 0) | (places >= self.capacity)]
        if bad.size:
            raise DataError(f"positions are 0 .. {self.capacity - 1}, got {bad[0]}")
        if not (np.isfinite(values) & (values >= 0)).all():
            raise DataError(f"priorities must be finite and at least 0, got {values.tolist()}")
        nodes = places + self._num_leaves
        self._nodes[nodes] = values
        start = self._num_leaves  # the level's first node; sums are taken anew, so none drifts
        while start > 1:
            start, nodes = start // 2, nodes >> 1
            left, right = self._nodes[2 * start : 4 * start].reshape(-1, 2).T  # of the level's nodes
            if nodes.size > start:
                self._nodes[start : 2 * start] = left + right
            else:
                self._nodes[nodes] = left[nodes - start] + right[nodes - start]

    def find(self, sums: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return for each sum in [0, total) the row in whose part of the prefix sums it falls.

        A row of priority 0 is never found. Raises DataError for a sum outside [0, total).
        """
        left = np.array(sums, dtype=np.float64)
        bad = left[~((left >= 0) & (left < self.total))]
        if bad.size:
            raise DataError(f"sums must be in [0, {self.total}), got {bad[0]}")
        nodes = np.ones(left.shape, dtype=np.int64)
        while nodes.size and nodes[0] < self._num_leaves:
            nodes = 2 * nodes
            below = self._nodes[nodes]
            # Rounding may leave a sum beyond the last row that counts; then there is nothing on the right.
            is_right = (left >= below) & (self._nodes[nodes + 1] > 0)
            left -= below * is_right
            nodes += is_right
        return nodes - self._num_leaves
