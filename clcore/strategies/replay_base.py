"""Replay: train on a share of rows from earlier tasks beside the new ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

from clcore.engine.config import StrategyConfig
from clcore.engine.errors import ConfigError, StrategyError
from clcore.engine.memory import MemorySession
from clcore.engine.params import Params
from clcore.engine.strategy import Strategy
from clcore.engine.tasks import Example, collate, derive_seed, iter_examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayConfig(StrategyConfig):
    """Parameters that every replay method shares, with job defaults."""

    replay_ratio: float = 0.3
    """Share of the global batch's tokens that comes from earlier tasks, in [0, 1)."""
    replay_frequency: int = 1
    """Replay on every n-th step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.replay_ratio < 1:
            raise ConfigError(f"replay_ratio must be in [0, 1), got {self.replay_ratio}")
        if self.replay_frequency < 1:
            raise ConfigError(f"replay_frequency must be at least 1, got {self.replay_frequency}")


class MixedDataset(Dataset[Example]):
    """A data set followed by replayed examples; shuffle it as any other."""

    def __init__(self, original_dataset: Sequence[Example], replay_examples: Sequence[Example]) -> None:
        self.original_dataset, self.replay_examples = original_dataset, replay_examples

    def __len__(self) -> int:
        return len(self.original_dataset) + len(self.replay_examples)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a data set with {len(self)} rows")
        index %= len(self)
        split = len(self.original_dataset)
        return self.original_dataset[index] if index < split else self.replay_examples[index - split]


class ReplayStrategy(Strategy):
    """Mix stored rows into training; subclasses say which rows are stored and which are drawn.

    In fit_task, mix_batch adds rows to the global batch of every replay_frequency-th step until they make up
    replay_ratio of its tokens; what rounding leaves over is carried to the next step. Alone, before_training
    returns a MixedDataset with the same share over the whole task, or call get_replay_batch in a loop of your
    own.
    """

    def __init__(self, model: nn.Module, replay_ratio: float = 0.3, replay_frequency: int = 10) -> None:
        super().__init__(model)
        self.replay = ReplayConfig(replay_ratio=replay_ratio, replay_frequency=replay_frequency)
        self.stored: list[Example] = []
        self.last_indices: list[int] = []
        """Positions in stored of the rows that were drawn last."""
        self._task_id = ""
        self._owed_tokens = 0.0
        self._batches_drawn = 0

    # --------------------------------------------------------------------------------- for subclasses to fill

    def load_stored(self) -> list[Example]:
        """Return the stored examples that this task may replay, in a fixed order."""
        raise StrategyError(f"{type(self).__name__} does not say which rows it stores")

    def draw(self, rng: np.random.Generator) -> Iterator[int]:
        """Yield positions in self.stored for ever: uniform, each row once before any comes again."""
        while self.stored:
            yield from _permutation(len(self.stored), rng)

    # -------------------------------------------------------------------------------------------------- hooks

    def bind(self, model: nn.Module, params: Params, memory: MemorySession) -> None:
        super().bind(model, params, memory)
        self.stored = self.load_stored()

    def before_training(self, task_id: str, train_dataset: Any = None) -> Any:
        """Start a task. Alone, return the data set with replayed rows; fit_task mixes them in by step."""
        self._task_id = task_id
        if self.is_bound:
            return train_dataset
        self.stored = self.load_stored()
        if train_dataset is None or not self.stored:
            return train_dataset
        original = list(iter_examples(train_dataset, task_id))
        odds = self.replay.replay_ratio / (1 - self.replay.replay_ratio)  # on every n-th step
        target = sum(len(e["input_ids"]) for e in original) * odds / self.replay.replay_frequency
        return MixedDataset(original, self._take(target, self._rng("data set")))

    def mix_batch(self, batch: list[Example], *, step: int) -> list[Example]:
        """Add replayed rows to a global batch: from (seed, task, step) and the batch, never from the rank."""
        ratio = self.replay.replay_ratio
        if not self.stored or not ratio or step % self.replay.replay_frequency:
            return batch
        target = sum(len(e["input_ids"]) for e in batch) * ratio / (1 - ratio) + self._owed_tokens
        drawn = self._take(target, self._rng(step))
        self._owed_tokens = target - sum(len(e["input_ids"]) for e in drawn)
        return [*batch, *drawn]

    def get_replay_batch(self, batch_size: int) -> dict[str, Tensor]:
        """Return a collated batch of stored rows, (B, L) tensors on the model's device.

        Raises StrategyError while nothing is stored.
        """
        if not self.stored:
            raise StrategyError("nothing is stored yet: finish a task before asking for a replay batch")
        draws = self.draw(self._rng("batch", self._batches_drawn))
        self._batches_drawn += 1
        self.last_indices = [next(draws) for _ in range(batch_size)]
        device = next(iter(self.params.values())).device
        return collate([self.stored[i] for i in self.last_indices], 0, device)

    def state_dict(self) -> dict[str, Any]:
        return {"owed_tokens": self._owed_tokens, "batches_drawn": self._batches_drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.refuse_unknown(state)
        self._owed_tokens = float(state.get("owed_tokens", 0.0))
        self._batches_drawn = int(state.get("batches_drawn", 0))

    # -------------------------------------------------------------------------------------------------- inner

    def _rng(self, *parts: object) -> np.random.Generator:
        return np.random.default_rng(derive_seed(self.memory.seed, self._task_id, self.name, *parts))

    def _take(self, target_tokens: float, rng: np.random.Generator) -> list[Example]:
        """Draw rows until one more would end farther from the target than stopping."""
        self.last_indices = []
        missing = target_tokens
        for position in self.draw(rng):
            length = len(self.stored[position]["input_ids"])
            if abs(missing - length) >= abs(missing):
                break
            self.last_indices.append(position)
            missing -= length
        return [self.stored[i] for i in self.last_indices]


def _permutation(count: int, rng: np.random.Generator) -> Iterator[int]:
    """Yield 0 .. count - 1 in random order; k of them cost k steps (Fisher and Yates; the list is a dict)."""
    moved: dict[int, int] = {}
    for i in range(count):
        j = int(rng.integers(i, count))
        chosen = moved.get(j, j)
        moved[j] = moved.get(i, i)
        yield chosen
