"""Statistics of paired measurements."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Ratio:
    """The median of ratios of pairs, with their quartiles."""

    median: float
    q25: float
    q75: float
    num_pairs: int


def median_of_ratios(pairs: Sequence[tuple[float, float]]) -> Ratio:
    """Summarise (baseline, other) pairs by other / baseline, each pair by itself.

    Not the ratio of medians: what slows the machine down for a while hits both halves of a pair.
    Raises ValueError without pairs or for a baseline that is not positive.
    """
    if not pairs:
        raise ValueError("no pairs to compare")
    if min(baseline for baseline, _ in pairs) <= 0:
        raise ValueError("baselines must be positive")
    q25, median, q75 = np.quantile([other / baseline for baseline, other in pairs], [0.25, 0.5, 0.75])
    return Ratio(float(median), float(q25), float(q75), len(pairs))


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference of average accuracies with its 95 % interval."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], *, draws: int = 10_000, seed: int = 0
) -> Difference:
    """Bootstrap the difference of average accuracy, ours - theirs, over the same test rows.

    ours, theirs: task -> score of each row, rows in the same order. Every draw resamples the rows of each
    task with replacement, one choice for both sides, and averages the tasks (macro). The interval covers the
    choice of test rows only: not of training rows, not of the training seed.
    Raises ValueError when the two sides do not have the same tasks and rows.
    Source: Efron 1979; percentile interval.
    """
    shapes = [[len(task) for task in side] for side in (ours, theirs)]
    if shapes[0] != shapes[1] or not shapes[0] or 0 in shapes[0]:
        raise ValueError(f"both sides need the same rows of the same tasks, got {shapes[0]} and {shapes[1]}")
    rng = np.random.default_rng(seed)
    of_task = []
    means = []
    for mine, other in zip(ours, theirs, strict=True):
        difference = np.asarray(mine, dtype=float) - np.asarray(other, dtype=float)
        chosen = rng.integers(len(difference), size=(draws, len(difference)))
        of_task.append(difference[chosen].mean(axis=1))
        means.append(difference.mean())
    low, high = np.quantile(np.mean(of_task, axis=0), [0.025, 0.975])
    return Difference(float(np.mean(means)), float(low), float(high))
