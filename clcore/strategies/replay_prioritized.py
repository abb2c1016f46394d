"""Prioritised replay (Schaul et al. 2016, ICLR): rows that the model does worst on come back more often.

    priority_i = nats per label token of row i, when it was last trained on; at most the priority_cap quantile
    p_i = (1 - u) (priority_i + eps)^alpha / sum_j (priority_j + eps)^alpha + u / N          u: uniform_mix
    w_i = (N p_i)^-beta / max_j (N p_j)^-beta, over the rows j of the step; multiplies the row's loss

A long row counts as much as a short one. The cap and the uniform part bound what garbage can do: a row with a
wrong label has a high loss for ever. Priorities cost nothing: training computes these losses anyway.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor, nn

from clcore.engine import parallel
from clcore.engine.errors import ConfigError, DataError
from clcore.engine.params import Params
from clcore.engine.tasks import Example
from clcore.strategies.replay_experience import ExperienceReplay, ExperienceReplayConfig, check_weights
from clcore.strategies.sum_tree import SumTree

if TYPE_CHECKING:
    from clcore.strategies.replay_quality import QualityController

__all__ = ["PrioritizedExperienceReplay", "PrioritizedReplayConfig", "SumTree"]

EPSILON = 1e-6
"""Added to every priority, in nats per label token, so that a perfectly learnt row keeps a chance."""

DRAWS_AT_ONCE = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrioritizedReplayConfig(ExperienceReplayConfig):
    """Parameters of prioritised replay in a job."""

    quality_filter: bool = True
    """Let QualityController refuse broken and repeated rows: a high loss may mean a bad row."""
    alpha: float = 0.6
    """How strongly priorities count, in [0, 1]; 0 draws uniformly."""
    beta: float = 0.4
    """How much of the preference the weights take back at the start, in [0, 1]; 1 takes back all."""
    beta_annealing: bool = True
    """Let beta grow linearly to 1."""
    beta_annealing_steps: int = 1000
    """Replay steps, over all tasks, after which beta is 1."""
    uniform_mix: float = 0.1
    """Share of the draws that ignores priorities, in [0, 1]."""
    priority_cap: float = 0.95
    """Quantile of the stored priorities above which all count the same, in (0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta", "uniform_mix"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 < self.priority_cap <= 1:
            raise ConfigError(f"priority_cap must be in (0, 1], got {self.priority_cap}")
        if self.beta_annealing_steps < 1:
            raise ConfigError(f"beta_annealing_steps must be at least 1, got {self.beta_annealing_steps}")


class PrioritizedExperienceReplay(ExperienceReplay):
    """Experience replay that draws by priority and weights the loss of what it drew.

    A row enters the buffer with its last loss as a new row; one that was never trained on gets the highest
    priority known. sampling_strategy: how the share uniform_mix is drawn, "uniform", or "importance" for the
    scores given to update_importance_scores. In fit_task everything happens by itself. Alone, give
    outputs=RowLosses(...) to modify_loss; or take last_indices after get_replay_batch, weight each row by
    importance_weights(last_indices) and give its loss per label token to update_priorities.
    """

    name = "prioritized_replay"
    Config: ClassVar[type[Any]] = PrioritizedReplayConfig
    config: PrioritizedReplayConfig

    def __init__(
        self,
        model: nn.Module,
        buffer_size: int = 1000,
        replay_ratio: float = 0.3,
        replay_frequency: int = 10,
        alpha: float = 0.6,
        beta: float = 0.4,
        beta_annealing: bool = True,
        beta_annealing_steps: int = 1000,
        *,
        sampling_strategy: str = "uniform",
        uniform_mix: float = 0.1,
        priority_cap: float = 0.95,
        task_balanced: bool = True,
        quality_filter: bool = False,
        quality: QualityController | None = None,
    ) -> None:
        super().__init__(
            model,
            buffer_size,
            replay_ratio,
            replay_frequency,
            sampling_strategy,
            task_balanced=task_balanced,
            quality_filter=quality_filter,
            quality=quality,
        )
        self.config = PrioritizedReplayConfig(
            **dataclasses.asdict(self.config),
            alpha=alpha,
            beta=beta,
            beta_annealing=beta_annealing,
            beta_annealing_steps=beta_annealing_steps,
            uniform_mix=uniform_mix,
            priority_cap=priority_cap,
        )
        self.priorities = np.empty(0)
        """Of the rows in stored, in nats per label token, before the cap."""
        self._position: dict[str, int] = {}
        self._losses: dict[str, float] = {}  # last loss of every row trained on in this task
        self._steps_before = self._steps_here = 0  # replay steps of earlier tasks and of this one
        self._batch_refs: list[str] = []  # of the global step
        self._weight_of: dict[str, float] = {}
        self._pending: list[tuple[Sequence[str | None], Tensor, Tensor]] = []
        self._cached: np.ndarray | None = None

    # ------------------------------------------------------------------------------------------ what is drawn

    def load_stored(self) -> list[Example]:
        stored = super().load_stored()
        state = self.memory.read(self.name)
        self._position = {ref: i for i, ref in enumerate(state.get("refs", []))}
        stored_losses = dict(zip(self._position, state.get("losses", []), strict=True))
        losses = [self._losses.get(ref, stored_losses[ref]) for ref in self._position]
        highest = max((loss for loss in losses if loss is not None), default=1.0)
        self.priorities = np.array([highest if loss is None else loss for loss in losses], dtype=np.float64)
        self._steps_before = int(state.get("replay_steps", 0))
        self._cached = None
        return stored

    @property
    def beta(self) -> float:
        """The exponent of the weights at this step."""
        if not self.config.beta_annealing:
            return self.config.beta
        progress = min(1.0, (self._steps_before + self._steps_here) / self.config.beta_annealing_steps)
        return self.config.beta + (1 - self.config.beta) * progress

    def probabilities(self) -> np.ndarray:
        """Return p of every stored row, (N,); they sum to 1."""
        if self._cached is None:
            # "lower": an interpolated quantile of few rows would follow the one bad row.
            cap = np.quantile(self.priorities, self.config.priority_cap, method="lower")
            scaled = (np.minimum(self.priorities, cap) + EPSILON) ** self.config.alpha
            others = np.ones(len(scaled)) if self.sampling_strategy == "uniform" else self.importance_scores()
            mix = self.config.uniform_mix
            self._cached = (1 - mix) * scaled / scaled.sum() + mix * others / others.sum()
        return self._cached

    def importance_weights(self, indices: Sequence[int]) -> np.ndarray:
        """Return w of rows drawn together, by positions in stored: (len(indices),), the largest is 1."""
        if not len(indices):
            return np.empty(0)
        rarity = (len(self.stored) * self.probabilities()[list(indices)]) ** -self.beta
        return np.asarray(rarity / rarity.max())

    def draw(self, rng: np.random.Generator) -> Iterator[int]:
        """Yield positions in stored by priority, each once before any comes again; none of the batch's."""
        chances = self.probabilities().copy() if self.stored else np.empty(0)
        chances[[self._position[ref] for ref in self._batch_refs if ref in self._position]] = 0
        while chances.any():
            tree = SumTree(len(chances))
            tree.update(np.arange(len(chances)), chances)
            while tree.total > 0:
                drawn = tree.find(rng.random(DRAWS_AT_ONCE) * tree.total).tolist()
                drawn = list(dict.fromkeys(drawn))  # who drops repeats draws without replacement
                yield from drawn
                tree.update(drawn, np.zeros(len(drawn)))

    # -------------------------------------------------------------------------------------------------- hooks

    def before_training(self, task_id: str, train_dataset: Any = None) -> Any:
        dataset = super().before_training(task_id, train_dataset)
        if dataset is not train_dataset:  # alone: the task's replayed rows are drawn already
            self._weight_of = self._weights_of_last()
        return dataset

    def mix_batch(self, batch: list[Example], *, step: int) -> list[Example]:
        self._batch_refs = [example["ref"] for example in batch if "ref" in example]
        mixed = super().mix_batch(batch, step=step)
        drawn = mixed[len(batch) :]
        self._batch_refs += [example["ref"] for example in drawn]
        self._weight_of = self._weights_of_last() if drawn else {}
        self._steps_here += bool(drawn)
        return mixed

    def modify_loss(
        self,
        loss: Tensor,
        model: nn.Module | None = None,  # noqa: ARG002
        *,
        batch: Mapping[str, Tensor] | None = None,  # noqa: ARG002
        outputs: Any = None,
    ) -> Tensor:
        """Weight the replayed rows of a micro-batch; outputs: RowLosses. Without it the loss comes back."""
        if outputs is None:
            return loss
        # Read after the step: asking for numbers now would make the processor wait for the device.
        self._pending.append((outputs.refs, outputs.row_nll.detach(), outputs.num_labels))
        if not (self.is_bound or self.is_attached):  # nobody says when the step is over
            self._write_back()
        weights = [1.0 if ref is None else self._weight_of.get(ref, 1.0) for ref in outputs.refs]
        if all(weight == 1 for weight in weights):
            return loss
        excess_B = outputs.row_nll.new_tensor(weights) - 1
        weighted: Tensor = loss + (excess_B * outputs.row_nll).sum() * outputs.scale
        return weighted

    def modify_update(self, params: Params, before: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        """Write this step's losses back, those of all ranks on every rank."""
        self._write_back()

    def describe(self, kept: Sequence[str]) -> dict[str, Any]:
        self._write_back()
        old = {ref: float(self.priorities[i]) for ref, i in self._position.items()}
        losses = {**old, **self._losses}
        self._steps_before, self._steps_here = self._steps_before + self._steps_here, 0
        self._losses, self._batch_refs, self._weight_of = {}, [], {}
        return {"losses": [losses.get(ref) for ref in kept], "replay_steps": self._steps_before}

    def update_priorities(self, indices: Sequence[int], priorities: Sequence[float]) -> None:
        """Set priorities of stored rows by position, in nats per label token.

        Raises DataError for a position that is not stored, a priority that is not positive and finite, or
        lists of different length.
        """
        check_weights("priorities", indices, priorities)
        bad = [i for i in indices if not 0 <= i < len(self.stored)]
        if bad:
            raise DataError(f"positions of stored rows are 0 .. {len(self.stored) - 1}, got {bad[0]}")
        self._learn({self.stored[i]["ref"]: float(v) for i, v in zip(indices, priorities, strict=True)})

    def update_importance_scores(
        self, task_id: str, example_indices: Sequence[int], scores: Sequence[float]
    ) -> None:
        super().update_importance_scores(task_id, example_indices, scores)
        self._cached = None

    def metrics(self) -> Mapping[str, float]:
        """Return those of experience replay, and how uneven the last draw was: min and max of N p."""
        found = dict(super().metrics())
        if self.stored:
            shares = self.probabilities() * len(self.stored)
            found |= {"least_share": float(shares.min()), "largest_share": float(shares.max())}
        return {**found, "beta": self.beta}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "losses": dict(self._losses), "replay_steps": self._steps_here}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._losses = {ref: float(loss) for ref, loss in state.get("losses", {}).items()}
        self._steps_here = int(state.get("replay_steps", 0))
        self._learn(self._losses)

    # -------------------------------------------------------------------------------------------------- inner

    def _weights_of_last(self) -> dict[str, float]:
        weights = self.importance_weights(self.last_indices)
        return {self.stored[i]["ref"]: float(w) for i, w in zip(self.last_indices, weights, strict=True)}

    def _write_back(self) -> None:
        """Average the losses of the step's rows over where they were seen, on any rank."""
        if not self.is_bound:  # nobody mixed batches: this process's rows are all there are
            self._batch_refs = [ref for refs, _, _ in self._pending for ref in refs if ref is not None]
        refs = list(dict.fromkeys(self._batch_refs))
        place = {ref: i for i, ref in enumerate(refs)}
        sums, counts = [0.0] * len(refs), [0.0] * len(refs)
        for row_refs, nll, num_labels in self._pending:
            per_token = (nll.double() / num_labels.clamp(min=1)).tolist()
            for ref, loss, labels in zip(row_refs, per_token, num_labels.tolist(), strict=True):
                if ref in place and labels:
                    sums[place[ref]] += loss
                    counts[place[ref]] += 1
        self._pending, self._batch_refs = [], []
        if refs:
            totals = parallel.sum_over_ranks([*sums, *counts]) if self.is_bound else [*sums, *counts]
            seen = zip(refs, totals[: len(refs)], totals[len(refs) :], strict=True)
            self._learn({ref: loss / count for ref, loss, count in seen if count})

    def _learn(self, losses: Mapping[str, float]) -> None:
        self._losses.update(losses)
        for ref, loss in losses.items():
            if ref in self._position:
                self.priorities[self._position[ref]] = loss
        self._cached = None
