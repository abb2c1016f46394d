"""The sum tree: it finds what a walk over prefix sums finds."""

from __future__ import annotations

import numpy as np
import pytest

from clcore.engine.errors import ConfigError, DataError
from clcore.strategies.replay_prioritized import SumTree


@pytest.mark.parametrize("capacity", [1, 2, 3, 8, 13, 100])
def test_the_tree_finds_what_a_walk_over_the_prefix_sums_finds(capacity: int) -> None:
    rng = np.random.default_rng(capacity)
    tree, values = SumTree(capacity), np.zeros(capacity)
    assert tree.total == 0
    for _ in range(20):
        indices = rng.choice(capacity, rng.integers(1, capacity + 1), replace=False)
        values[indices] = rng.integers(0, 5, len(indices))  # whole numbers: sums are exact, borders are hit
        tree.update(indices, values[indices])
        assert tree.total == values.sum()
        assert tree.priorities.tolist() == values.tolist()
        sums = np.arange(0, values.sum(), 0.5)
        brute = [next(i for i in range(capacity) if s < values[: i + 1].sum()) for s in sums]
        assert tree.find(sums).tolist() == brute
    tree.update(range(capacity), np.zeros(capacity))
    assert tree.total == 0


def test_the_tree_never_finds_a_row_of_priority_0_whatever_rounding_does() -> None:
    # Less than the total by one rounding; 0.3 subtracted, it rounds up to all that the right half holds.
    tree = SumTree(4)
    tree.update(range(4), [0.3, 0.0, 0.5823818349426018, 0.0])
    assert tree.find([np.nextafter(tree.total, 0)]).tolist() == [2]


def test_the_tree_refuses_what_it_cannot_hold_or_find() -> None:
    tree = SumTree(3)
    tree.update([0, 2], [1.0, 2.0])
    for indices, values, said in [
        ([3], [1.0], r"0 \.\. 2, got 3"),
        ([-1], [1.0], r"0 \.\. 2, got -1"),
        ([0], [-1.0], "at least 0"),
        ([0], [float("nan")], "finite"),
        ([0], [1.0, 2.0], "1 indices and 2 priorities"),
    ]:
        with pytest.raises(DataError, match=said):
            tree.update(indices, values)
    for value in (3.0, -0.1, float("nan")):
        with pytest.raises(DataError, match=rf"sums must be in \[0, 3.0\), got {value}"):
            tree.find([value])
    with pytest.raises(ConfigError, match="capacity must be at least 1, got 0"):
        SumTree(0)
