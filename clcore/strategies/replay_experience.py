"""Experience replay: a sample of earlier tasks' rows, replayed beside the new ones.

Each row gets a random key from (seed, reference), and the buffer keeps rows with the smallest keys: of every
task equally many (task_balanced), or the smallest of all. Either way it is a uniform sample without
replacement at every moment, within each task or over all rows, as Vitter's algorithm R gives it. But it
depends neither on the order of the rows nor on ranks, and offering a row twice changes nothing.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import nn

from clcore.engine.errors import ConfigError, DataError
from clcore.engine.tasks import Example, derive_seed, iter_examples
from clcore.strategies.replay_base import ReplayConfig, ReplayStrategy

if TYPE_CHECKING:
    from clcore.strategies.replay_quality import QualityController

SAMPLING = ("uniform", "importance")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperienceReplayConfig(ReplayConfig):
    """Parameters of experience replay in a job."""

    buffer_size: int = 1000
    """Rows kept over all earlier tasks."""
    task_balanced: bool = True
    """Split the buffer evenly between the tasks; otherwise a task's share follows its number of rows. On by
    default, because forgetting is averaged over tasks and limited per task: a small task counts as much."""
    quality_filter: bool = False
    """Let QualityController refuse broken and repeated rows before they enter the buffer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buffer_size < 1:
            raise ConfigError(f"buffer_size must be at least 1, got {self.buffer_size}")


class ExperienceReplay(ReplayStrategy):
    """A sample of earlier rows. The buffer lives in memory as references; the store holds the rows.

    sampling_strategy: "uniform", or "importance" to draw by the scores given to update_importance_scores.
    quality: judges a task's rows before they enter; quality_filter=True uses one that judges text and
    repetition only, whatever the length.
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
        *,
        task_balanced: bool = True,
        quality_filter: bool = False,
        quality: QualityController | None = None,
    ) -> None:
        super().__init__(model, replay_ratio, replay_frequency)
        if sampling_strategy not in SAMPLING:
            raise ConfigError(
                f"sampling_strategy must be one of {', '.join(SAMPLING)}, got {sampling_strategy!r}"
            )
        self.config = ExperienceReplayConfig(
            buffer_size=buffer_size,
            replay_ratio=replay_ratio,
            replay_frequency=replay_frequency,
            task_balanced=task_balanced,
            quality_filter=quality_filter,
        )
        self.sampling_strategy = sampling_strategy
        self.quality = quality or (_default_quality() if quality_filter else None)
        self._scores: dict[str, float] = {}
        self._cumulative: np.ndarray | None = None
        self._num_refused = 0

    def load_stored(self) -> list[Example]:
        examples: list[Example] = self.memory.examples(self.memory.read(self.name).get("refs", []))
        self._cumulative = None
        return examples

    def draw(self, rng: np.random.Generator) -> Iterator[int]:
        if self.sampling_strategy == "uniform":
            yield from super().draw(rng)
            return
        if self._cumulative is None:
            self._cumulative = np.cumsum(self.importance_scores())
        while self.stored:
            yield int(np.searchsorted(self._cumulative, rng.random() * self._cumulative[-1], side="right"))

    def importance_scores(self) -> np.ndarray:
        """Return the score of every stored row, (N,); 1 where none was given."""
        return np.array([self._scores.get(str(example.get("ref")), 1.0) for example in self.stored])

    def after_training(self, task_id: str, train_dataset: Any = None) -> None:
        """Offer the task's rows to the buffer. Raises DataError without a data set."""
        if train_dataset is None:
            raise DataError(
                f"experience replay needs train_dataset in after_training({task_id!r}) to keep rows of it"
            )
        state = self.memory.read(self.name)
        old = dict(zip(state.get("refs", []), state.get("tasks", []), strict=True))
        originals = getattr(train_dataset, "original_dataset", train_dataset)
        new = {example["ref"]: example for example in iter_examples(originals, task_id)}
        offered = self._passing([example for ref, example in new.items() if ref not in old])
        task_of = {**dict.fromkeys(offered, task_id), **old}
        order = list(dict.fromkeys([*state.get("task_order", old.values()), task_id]))
        kept = keep_rows(task_of, order, self.config.buffer_size, self.memory.seed, self.config.task_balanced)
        stage = {
            "refs": kept,
            "tasks": [task_of[ref] for ref in kept],
            "task_order": order,
            "seen": {**state.get("seen", {}), task_id: len(new)},
            **self.describe(kept),
        }
        self.memory.stage(self.name, stage, rows={ref: dict(new.get(ref, {})) for ref in kept})
        self.finish_task()
        self._owed_tokens = 0.0  # the next task starts as it would with a new object
        if not self.is_bound:
            self.stored = self.load_stored()

    def describe(self, kept: Sequence[str]) -> dict[str, Any]:  # noqa: ARG002
        """Return what a subclass stores about the rows that stay in the buffer."""
        return {}

    def update_importance_scores(
        self, task_id: str, example_indices: Sequence[int], scores: Sequence[float]
    ) -> None:
        """Set the scores of a task's rows by their position in its training data set.

        Raises DataError for a score that is not positive and finite, or lists of different length.
        """
        check_weights("importance scores", example_indices, scores)
        self._scores.update(
            {f"{task_id}:{i}": float(s) for i, s in zip(example_indices, scores, strict=True)}
        )
        self._cumulative = None

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
        """Return how many rows of earlier tasks this task could replay, and how many of its own failed."""
        return {"stored_rows": float(len(self.stored)), "refused_rows": float(self._num_refused)}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scores": dict(self._scores)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._scores = {ref: float(score) for ref, score in state.get("scores", {}).items()}
        self._cumulative = None

    def _passing(self, examples: Sequence[Example]) -> list[str]:
        """Return the references of the rows that pass the quality control, if there is one.

        It judges at most twice as many rows as the buffer holds, those with the smallest keys: the buffer
        takes them first, so the cost goes with the buffer and not with the task. Rows are compared within
        their task, because two tasks may answer the same prompts differently.
        """
        self._num_refused = 0
        if self.quality is None:
            return [example["ref"] for example in examples]
        count, seed = 2 * self.config.buffer_size, self.memory.seed
        first = set(reservoir((example["ref"] for example in examples), count, seed))
        judged = [example for example in examples if example["ref"] in first]
        passed = self.quality.filter_examples(judged)
        self._num_refused = len(judged) - len(passed)
        return [example["ref"] for example in passed]


def keep_rows(
    task_of: Mapping[str, str], order: Sequence[str], capacity: int, seed: int, balanced: bool
) -> list[str]:
    """Return the references to keep, ordered by their random keys.

    task_of: reference -> task, of all rows at hand; order: tasks, oldest first.
    """
    ranked = reservoir(task_of, len(task_of), seed)
    if not balanced:
        return ranked[:capacity]
    sizes = Counter(task_of.values())
    left = task_quotas({task: sizes[task] for task in order}, capacity)
    kept = []
    for ref in ranked:
        if left[task_of[ref]] > 0:
            left[task_of[ref]] -= 1
            kept.append(ref)
    return kept


def task_quotas(sizes: Mapping[str, int], capacity: int) -> dict[str, int]:
    """Split a capacity evenly over tasks, oldest first; no task gets more than it has.

    All tasks are filled to one level, the highest that fits; what remains goes to the oldest larger ones, a
    row each. One more task never raises another's quota, so no row is missed that was given up before.
    """
    top = max(sizes.values(), default=0)
    levels = range(min(capacity, top) + 1)
    level = bisect.bisect(levels, capacity, key=lambda x: sum(min(size, x) for size in sizes.values())) - 1
    quotas = {task: min(size, level) for task, size in sizes.items()}
    spare = capacity - sum(quotas.values())
    for task in itertools.islice((task for task, size in sizes.items() if size > level), spare):
        quotas[task] += 1
    return quotas


def reservoir(refs: Iterable[str], capacity: int, seed: int) -> list[str]:
    """Return at most capacity references, a uniform sample of all, ordered by their random keys."""
    return sorted(refs, key=lambda ref: (derive_seed(seed, "reservoir", ref), ref))[:capacity]


def check_weights(what: str, indices: Sequence[int], values: Sequence[float]) -> None:
    """Raise DataError unless there is one positive finite value per index."""
    if len(indices) != len(values):
        raise DataError(f"got {len(indices)} indices and {len(values)} {what.split()[-1]}")
    bad = [value for value in values if not 0 < value < float("inf")]
    if bad:
        raise DataError(f"{what} must be positive and finite, got {bad[0]}")


def _default_quality() -> QualityController:
    # Not at the top: most jobs train without it.
    from clcore.strategies.replay_quality import QualityController

    return QualityController(skip=("too_short", "too_long"))
