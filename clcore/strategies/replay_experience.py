"""Experience replay: a uniform sample of all earlier rows (reservoir), replayed beside the new ones.

Each row gets a random key from (seed, reference), and the buffer keeps the rows with the smallest keys. That
is a uniform sample without replacement at every moment, as Vitter's algorithm R gives it, but it depends
neither on the order of the rows nor on ranks, and offering a row twice changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import nn

from clcore.engine.errors import ConfigError, DataError
from clcore.engine.tasks import Example, derive_seed, iter_examples
from clcore.strategies.replay_base import ReplayConfig, ReplayStrategy

SAMPLING = ("uniform", "importance")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperienceReplayConfig(ReplayConfig):
    """Parameters of experience replay in a job."""

    buffer_size: int = 1000
    """Rows kept over all earlier tasks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buffer_size < 1:
            raise ConfigError(f"buffer_size must be at least 1, got {self.buffer_size}")


class ExperienceReplay(ReplayStrategy):
    """Reservoir of earlier rows. The buffer lives in memory as references; the store holds the rows.

    sampling_strategy: "uniform", or "importance" to draw by the scores given to update_importance_scores.
    """

    name = "experience_replay"
    Config: ClassVar[type[Any]] = ExperienceReplayConfig

    def __init__(
        self,
        model: nn.Module,
        buffer_size: int = 1000,
        replay_ratio: float = 0.3,
        replay_frequency: int = 10,
        sampling_strategy: str = "uniform",
    ) -> None:
        super().__init__(model, replay_ratio, replay_frequency)
        if sampling_strategy not in SAMPLING:
            raise ConfigError(
                f"sampling_strategy must be one of {', '.join(SAMPLING)}, got {sampling_strategy!r}"
            )
        self.config = ExperienceReplayConfig(
            buffer_size=buffer_size, replay_ratio=replay_ratio, replay_frequency=replay_frequency
        )
        self.sampling_strategy = sampling_strategy
        self._scores: dict[str, float] = {}

    def load_stored(self) -> list[Example]:
        examples: list[Example] = self.memory.examples(self.memory.read(self.name).get("refs", []))
        return examples

    def draw(self, rng: np.random.Generator) -> Iterator[int]:
        if self.sampling_strategy == "uniform":
            yield from super().draw(rng)
            return
        weights = np.array([self._scores.get(str(example.get("ref")), 1.0) for example in self.stored])
        while self.stored:
            yield int(rng.choice(len(weights), p=weights / weights.sum()))

    def after_training(self, task_id: str, train_dataset: Any = None) -> None:
        """Offer the task's rows to the reservoir. Raises DataError without a data set."""
        if train_dataset is None:
            raise DataError(
                f"experience replay needs train_dataset in after_training({task_id!r}) to keep rows of it"
            )
        state = self.memory.read(self.name)
        old: list[str] = state.get("refs", [])
        task_of: dict[str, str] = dict(zip(old, state.get("tasks", []), strict=True))
        originals = (
            train_dataset.original_dataset if hasattr(train_dataset, "original_dataset") else train_dataset
        )
        new: dict[str, Example] = {}
        for example in iter_examples(originals, task_id):
            new[example["ref"]] = example
            task_of.setdefault(example["ref"], task_id)
        kept = reservoir(task_of, self.config.buffer_size, self.memory.seed)
        seen = {**state.get("seen", {}), task_id: len(new)}
        stage = {"refs": kept, "tasks": [task_of[ref] for ref in kept], "seen": seen}
        self.memory.stage(self.name, stage, rows={ref: dict(new.get(ref, {})) for ref in kept})
        self.finish_task()
        self._owed_tokens = 0.0  # the next task starts as it would with a new object
        if not self.is_bound:
            self.stored = self.load_stored()

    def update_importance_scores(
        self, task_id: str, example_indices: Sequence[int], scores: Sequence[float]
    ) -> None:
        """Set the scores of a task's rows by their position in its training data set.

        Raises DataError for a score that is not positive and finite, or lists of different length.
        """
        if len(example_indices) != len(scores):
            raise DataError(f"got {len(example_indices)} indices and {len(scores)} scores")
        bad = [score for score in scores if not 0 < score < float("inf")]
        if bad:
            raise DataError(f"importance scores must be positive and finite, got {bad[0]}")
        self._scores.update(
            {f"{task_id}:{i}": float(s) for i, s in zip(example_indices, scores, strict=True)}
        )

    def get_buffer_statistics(self) -> dict[str, Any]:
        """Return size, capacity, rows seen and rows kept per task."""
        state = self.memory.read(self.name)
        return {
            "size": len(state.get("refs", [])),
            "capacity": self.config.buffer_size,
            "seen": sum(state.get("seen", {}).values()),
            "per_task": dict(Counter(state.get("tasks", []))),
        }

    def metrics(self) -> Mapping[str, float]:
        """Return how many rows of earlier tasks this task could replay."""
        return {"stored_rows": float(len(self.stored))}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scores": dict(self._scores)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._scores = {ref: float(score) for ref, score in state.get("scores", {}).items()}


def reservoir(refs: Mapping[str, object], capacity: int, seed: int) -> list[str]:
    """Return at most capacity references, a uniform sample of all, ordered by their random keys."""
    return sorted(refs, key=lambda ref: (derive_seed(seed, "reservoir", ref), ref))[:capacity]
