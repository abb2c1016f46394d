"""Elastic weight consolidation (Kirkpatrick et al. 2017, PNAS) on the adapter's parameters.

    penalty = lambda/2 * sum_k sum_i F_k,i (theta_i - theta*_k,i)^2          over earlier tasks k

F_k is the exact empirical diagonal Fisher at the end of task k (per-row gradients, see engine/fisher.py). All
tasks collapse without loss into one importance F = sum F_k, one anchor = sum F_k theta*_k / F and one
constant, so cost and memory do not grow with the number of tasks. lambda here is twice Avalanche's and
mammoth's, which leave out the 1/2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from clcore.engine import parallel
from clcore.engine.errors import ConfigError, DataError, StateError
from clcore.engine.fisher import squared_gradients
from clcore.engine.loss import completion_nll
from clcore.engine.memory import MemorySession
from clcore.engine.params import Params
from clcore.engine.strategy import Strategy
from clcore.engine.tasks import Example, collate, derive_seed, iter_examples

FISHER_BATCH_ROWS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class EWCConfig:
    """Parameters of EWC in a job; the defaults are tuned for LoRA with AdamW."""

    ewc_lambda: float = 10.0
    """Strength of the penalty; with normalize_fisher the largest importance of each task is 1."""
    fisher_sample_size: int = 128
    """Rows of a task that the Fisher is estimated on; all rows when there are fewer."""
    fisher_estimation_method: str = "empirical"
    normalize_fisher: bool = True
    """Divide each task's Fisher by its largest value over the whole model."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ewc_lambda) and self.ewc_lambda >= 0):
            raise ConfigError(f"ewc_lambda must be a finite number of at least 0, got {self.ewc_lambda}")
        if self.fisher_sample_size < 1:
            raise ConfigError(f"fisher_sample_size must be at least 1, got {self.fisher_sample_size}")
        if self.fisher_estimation_method != "empirical":
            raise ConfigError(
                f"fisher_estimation_method must be 'empirical', got {self.fisher_estimation_method!r}"
            )


@dataclasses.dataclass
class Consolidated:
    """The sum of all earlier tasks' quadratic penalties as one: importance, anchor and a constant."""

    importance: dict[str, Tensor]
    anchor: dict[str, Tensor]
    offset: float = 0.0
    """sum_k F_k (theta*_k - anchor)^2, summed over parameters: what the one-anchor form leaves out."""

    def add(self, fisher: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> None:
        """Add a task's penalty exactly: a sum of parabolas is a parabola around the weighted mean."""
        for name, f_new in fisher.items():
            f_old, anchor = self.importance[name], self.anchor[name]
            f_sum = f_old + f_new
            share = torch.where(f_sum > 0, f_new / f_sum, torch.zeros_like(f_sum))
            distance = theta[name].float() - anchor
            self.offset += float((f_old * share * distance.square()).sum(dtype=torch.float64))
            self.importance[name] = f_sum
            self.anchor[name] = anchor + share * distance


class BaseEWC(Strategy):
    """EWC in the space of the adapter's factors.

    Alone: before_training, then train with modify_loss on the loss (or attach(optimizer), which adds the same
    penalty to the gradients instead), then after_training with the task's data set. In fit_task the penalty
    is a gradient.
    """

    name = "ewc"
    Config: ClassVar[type[Any]] = EWCConfig

    def __init__(
        self,
        model: nn.Module,
        ewc_lambda: float = 5000.0,
        fisher_sample_size: int = 200,
        fisher_estimation_method: str = "empirical",
        normalize_fisher: bool = True,
    ) -> None:
        super().__init__(model)
        self.config = EWCConfig(
            ewc_lambda=ewc_lambda,
            fisher_sample_size=fisher_sample_size,
            fisher_estimation_method=fisher_estimation_method,
            normalize_fisher=normalize_fisher,
        )
        self.consolidated: Consolidated | None = None
        self._first_scores: dict[str, float] = {}
        self._metrics: dict[str, float] = {}

    # -------------------------------------------------------------------------------------------------- hooks

    def bind(self, model: nn.Module, params: Params, memory: MemorySession) -> None:
        super().bind(model, params, memory)
        self.consolidated = self._read()

    def modify_loss(
        self,
        loss: Tensor,
        model: nn.Module | None = None,
        *,
        batch: Mapping[str, Tensor] | None = None,  # noqa: ARG002
        outputs: Any = None,  # noqa: ARG002
    ) -> Tensor:
        """Add the penalty to a loss; inside fit_task or after attach() the gradient carries it instead."""
        if self.is_bound or self.is_attached or self.consolidated is None:
            return loss
        return loss + self.penalty(Params.of(model) if model is not None else self.params).to(loss.dtype)

    def penalty(self, params: Params | None = None) -> Tensor:
        """Return lambda/2 * sum_k F_k (theta - theta*_k)^2 as a scalar; 0 before the first task ends."""
        params = self.params if params is None else params
        if self.consolidated is None:
            return torch.zeros((), device=next(iter(params.values())).device)
        terms = [
            (self.consolidated.importance[name] * (p.float() - self.consolidated.anchor[name]).square()).sum()
            for name, p in params.items()
        ]
        return self.config.ewc_lambda / 2 * (torch.stack(terms).sum() + self.consolidated.offset)

    @torch.no_grad()
    def modify_gradients(self, params: Params | None = None) -> None:
        """Add the penalty's gradient, lambda * F (theta - anchor)."""
        if self.consolidated is None:
            return
        for name, p in (self.params if params is None else params).items():
            pull = self.consolidated.importance[name] * (p.float() - self.consolidated.anchor[name])
            pull = (self.config.ewc_lambda * pull).to(p.dtype)
            p.grad = pull if p.grad is None else p.grad.add_(pull)

    def after_training(self, task_id: str, train_dataset: Any = None) -> None:
        """Estimate the task's Fisher on its rows and add it to what is protected.

        Raises ConfigError without a data set, DataError for an empty one, FisherError for an untrained
        adapter.
        """
        if train_dataset is None:
            raise ConfigError(
                f"EWC needs train_dataset in after_training({task_id!r}) to estimate the Fisher"
            )
        examples = list(iter_examples(train_dataset, task_id))
        if not examples:
            raise DataError(f"task {task_id!r} has no rows to estimate the Fisher on")
        fisher, num_rows = self._fisher(task_id, examples)
        largest = max(float(f.max()) for f in fisher.values())
        if self.config.normalize_fisher and largest > 0:
            fisher = {name: f / largest for name, f in fisher.items()}
        theta = {name: p.detach().float().clone() for name, p in self.params.items()}
        if self.consolidated is None:
            self.consolidated = Consolidated(fisher, theta)
        else:
            self.consolidated.add(fisher, theta)
        untrained = sum(1.0 for n, p in self.params.items() if "lora_B" in n and not bool(p.detach().any()))
        self._metrics = {"fisher_rows": float(num_rows), "fisher_max": largest, "modules_with_B_0": untrained}
        self.memory.stage(self.name, dataclasses.asdict(self.consolidated))
        self.finish_task()

    def metrics(self) -> Mapping[str, float]:
        return dict(self._metrics)

    # --------------------------------------------------------------------------------------------- inspection

    def compute_forgetting(
        self, task_id: str, eval_dataset: Any, eval_fn: Callable[[nn.Module, Any], float] | None = None
    ) -> dict[str, float]:
        """Compare a task's score with the first time this was called for it.

        Call once right after the task is trained and again later. eval_fn(model, data set) -> score, higher
        is better; the default is minus the mean negative log-likelihood per label token. forgetting =
        first - now.
        """
        now = float(eval_fn(self.model, eval_dataset) if eval_fn else -_mean_nll(self.model, eval_dataset))
        first = self._first_scores.setdefault(task_id, now)
        return {"first": first, "now": now, "forgetting": first - now}

    def get_importance_visualization(self, top_k: int = 10) -> dict[str, float]:
        """Return the top_k parameters by mean importance, largest first: name -> mean Fisher."""
        if self.consolidated is None:
            return {}
        means = {name: float(f.mean()) for name, f in self.consolidated.importance.items()}
        return dict(sorted(means.items(), key=lambda item: -item[1])[:top_k])

    # -------------------------------------------------------------------------------------------------- inner

    def _fisher(self, task_id: str, examples: Sequence[Example]) -> tuple[dict[str, Tensor], int]:
        """Average squared per-row gradients over sampled rows of all ranks."""
        seed = derive_seed(self.memory.seed, task_id, "fisher")
        count = min(self.config.fisher_sample_size, len(examples))
        chosen = np.random.default_rng(seed).choice(len(examples), count, replace=False)
        mine = [examples[i] for i in chosen[parallel.rank() :: parallel.world_size()]]
        total, num_rows = squared_gradients(self.model, self.params, self._batches(mine))
        parallel.all_reduce_sum(list(total.values()))
        rows = int(parallel.sum_over_ranks([num_rows])[0])
        return {name: f / rows for name, f in total.items()}, rows

    def _batches(self, examples: Sequence[Example]) -> Iterator[dict[str, Tensor]]:
        device = next(iter(self.params.values())).device
        by_length = sorted(examples, key=lambda example: len(example["input_ids"]))  # little padding
        for start in range(0, len(by_length), FISHER_BATCH_ROWS):
            yield collate(by_length[start : start + FISHER_BATCH_ROWS], 0, device)

    def _read(self) -> Consolidated | None:
        state = self.memory.read(self.name)
        if not state:
            return None
        shapes = {name: tuple(p.shape) for name, p in self.params.items()}
        stored = {name: tuple(np.shape(value)) for name, value in state["importance"].items()}
        if stored != shapes:
            odd = sorted({*stored.items()} ^ {*shapes.items()})[0]
            raise StateError(
                f"stored Fisher does not fit the adapter: {odd[0]!r} has shape {odd[1]} on one side only"
            )

        def load(key: str) -> dict[str, Tensor]:
            return {n: torch.tensor(v, device=self.params[n].device) for n, v in state[key].items()}

        return Consolidated(load("importance"), load("anchor"), float(state["offset"]))


@torch.no_grad()
def _mean_nll(model: nn.Module, dataset: Any) -> float:
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for example in iter_examples(dataset):
        nll, labels = completion_nll(model, collate([example], 0, device))
        total, count = total + float(nll.sum()), count + int(labels.sum())
    return total / max(count, 1)
