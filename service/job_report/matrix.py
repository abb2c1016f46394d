"""The accuracy matrix of a job's versions, with what follows from it and how sure that is."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clcore.evaluation.bootstrap import (
    Interval,
    interval,
    inverse_perplexity,
    matrix_intervals,
    mean,
)
from clcore.evaluation.scalars import matrix_scalars
from service.adapters.manifest import PREDICTIONS, Manifest, ManifestFile
from service.adapters.storage import Storage
from service.adapters.version_files import read_file


def matrix_of(
    storage: Storage,
    task_dirs: Sequence[str],
    manifests: Sequence[Manifest],
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return tasks, matrix, versions, base_scores, the scalars and intervals_95 (scalar -> low and high).

    names: all tasks of the job; None takes the trained ones. What was not measured is None. The scalars
    cover the trained tasks.
    """
    trained = [manifest.task_name for manifest in manifests]
    names = list(trained if names is None else names)
    by_task = {manifest.task_name: manifest for manifest in manifests}
    base: dict[str, float] = {}
    for manifest in manifests:
        base.update(manifest.base_scores)
    matrix: list[list[float | None]] = [
        [by_task[after].scores.get(name) if after in by_task else None for name in names] for after in names
    ]
    for i, manifest in enumerate(manifests):
        for name, score in manifest.before_scores.items():  # the version before, on the task that came next
            if i and name in names:
                matrix[names.index(trained[i - 1])][names.index(name)] = score
    base_scores = [base.get(name) for name in names]
    scalars: dict[str, float | None] = dict.fromkeys(
        ("average_accuracy", "forgetting", "bwt", "fwt", "learning_accuracy")
    )
    intervals: dict[str, Interval | None] = {}
    if manifests:
        columns = [names.index(name) for name in trained]
        scalars = matrix_scalars(
            [[matrix[i][j] for j in columns] for i in columns], [base_scores[j] for j in columns]
        )
        versions = tuple(
            (key, m.task_name, frozenset(m.files.items()))
            for key, m in zip(task_dirs, manifests, strict=True)
        )
        intervals = _intervals(storage, versions, manifests[-1].evaluation.get("metric") == "perplexity")
    return {
        "tasks": names,
        "matrix": matrix,
        "versions": [trained.index(name) + 1 if name in by_task else None for name in names],
        "base_scores": base_scores,
        **scalars,
        "intervals_95": intervals,
    }


@functools.lru_cache(maxsize=256)
def _intervals(
    storage: Storage,
    versions: tuple[tuple[str, str, frozenset[tuple[str, ManifestFile]]], ...],
    is_perplexity: bool,
) -> dict[str, Interval | None]:
    """Resample the rows behind the matrix; empty when a version left no rows. Stored rows never change.

    versions: task folder, task name and the files that the manifest lists.
    """
    rows: dict[tuple[int, int], Any] = {}
    base: dict[int, Any] = {}
    for i, (key, _, entries) in enumerate(versions):
        files = dict(entries)
        for j, (_, name, _) in enumerate(versions):
            after, before, bare = (f"{PREDICTIONS}/{kind}{name}.jsonl" for kind in ("", "before/", "base/"))
            if after in files:
                rows[i, j] = _row_values(storage, key, files, after, is_perplexity)
            if before in files:
                rows[i - 1, j] = _row_values(storage, key, files, before, is_perplexity)
            if bare in files:
                base[j] = _row_values(storage, key, files, bare, is_perplexity)
    if not rows:
        return {}
    return matrix_intervals(rows, base, statistic=inverse_perplexity if is_perplexity else mean)


def general_interval(storage: Storage, task_dir: str, manifest: Manifest) -> Interval | None:
    """Return the 95 % interval of the relative drop of general ability; None when the version left no rows.

    The same texts were scored before and after, so a resample draws both together.
    """
    files = [f"{PREDICTIONS}/general/{when}.jsonl" for when in ("before", "after")]
    if not set(files) <= set(manifest.files):
        return None
    before, after = (_row_values(storage, task_dir, manifest.files, file, True) for file in files)
    return interval(np.column_stack([after[:, 0] - before[:, 0], before[:, 1]]), _relative_drop)


def _relative_drop(samples: np.ndarray) -> np.ndarray:
    """Return 1 - after / before of 1/perplexity from samples (S, N, 2) of (rise of the nll, tokens)."""
    drops: np.ndarray = 1 - inverse_perplexity(samples)
    return drops


def _row_values(
    storage: Storage, task_dir: str, files: Mapping[str, ManifestFile], name: str, is_perplexity: bool
) -> np.ndarray:
    """Return what each row puts into the score: its score (N,), or its nll and tokens (N, 2)."""
    rows = [json.loads(line) for line in read_file(storage, task_dir, files, name).splitlines()]
    values = [(row["nll"], row["num_tokens"]) if is_perplexity else row["score"] for row in rows]
    return np.array(values, dtype=float)
