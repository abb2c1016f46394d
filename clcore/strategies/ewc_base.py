"""Elastic weight consolidation (Kirkpatrick et al. 2017, PNAS) on the adapter's parameters.

    penalty = lambda/2 * sum_k sum_i F_k,i (theta_i - theta*_k,i)^2          over earlier tasks k

In space "factors" theta are the trainable parameters and F_k is the exact diagonal Fisher at the end of task
k (per-row gradients, see engine/fisher.py). All tasks collapse without loss into one importance F = sum F_k,
one anchor = sum F_k theta*_k / F and one constant, so cost and memory do not grow with the number of tasks.
In space "delta_w" theta is the change of each LoRA layer's weight and F_k a rank-1 approximation (see
ewc_delta_w.py). lambda here is twice Avalanche's and mammoth's, which leave out the 1/2.
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
from clcore.engine.config import StrategyConfig
from clcore.engine.errors import ConfigError, DataError, StateError, StrategyError
from clcore.engine.loss import completion_nll
from clcore.engine.memory import MemorySession
from clcore.engine.params import Params
from clcore.engine.strategy import Strategy
from clcore.engine.tasks import Example, collate, derive_seed, iter_examples
from clcore.strategies.ewc_delta_w import DeltaW
from clcore.strategies.ewc_factors import Consolidated

FISHER_BATCH_ROWS = 8
METHODS = ("empirical", "sample")
SPACES: dict[str, type[Consolidated] | type[DeltaW]] = {"factors": Consolidated, "delta_w": DeltaW}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EWCConfig(StrategyConfig):
    """Parameters of EWC in a job; the defaults are tuned for LoRA with AdamW."""

    ewc_lambda: float = 30.0
    """Strength of the penalty; with normalize_fisher the largest importance of each task is 1."""
    fisher_sample_size: int = 128
    """Rows of a task that the Fisher is estimated on; all rows when there are fewer."""
    fisher_estimation_method: str = "empirical"
    """"empirical": the labels of the data; "sample": each label drawn once from the model's prediction."""
    normalize_fisher: bool = True
    """Divide each task's Fisher by its largest value over the whole model."""
    space: str = "factors"
    """"factors": LoRA's A and B each by itself; "delta_w": their product, the change of a layer's weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.ewc_lambda) and self.ewc_lambda >= 0):
            raise ConfigError(f"ewc_lambda must be a finite number of at least 0, got {self.ewc_lambda}")
        if self.fisher_sample_size < 1:
            raise ConfigError(f"fisher_sample_size must be at least 1, got {self.fisher_sample_size}")
        for name, allowed in (("fisher_estimation_method", METHODS), ("space", tuple(SPACES))):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name} must be {' or '.join(map(repr, allowed))}, got {getattr(self, name)!r}"
                )

    @property
    def needs_same_adapter(self) -> bool:
        """Whether a task must go on training the factors of the task before."""
        return self.space == "factors"


class BaseEWC(Strategy):
    """Elastic weight consolidation on the factors of the adapter, or on their product.

    Alone: before_training, then train with modify_loss on the loss (or attach(optimizer), which adds the same
    penalty to the gradients instead), then after_training with the task's data set. In fit_task the penalty
    is a gradient.
    """

    name = "ewc"
    Config: ClassVar[type[Any]] = EWCConfig
    online_gamma: float | None = None
    """How earlier tasks fade when one is added; None: they do not."""

    def __init__(
        self,
        model: nn.Module,
        ewc_lambda: float = 5000.0,
        fisher_sample_size: int = 200,
        fisher_estimation_method: str = "empirical",
        normalize_fisher: bool = True,
        *,
        space: str = "factors",
    ) -> None:
        super().__init__(model)
        self.config = EWCConfig(
            ewc_lambda=ewc_lambda,
            fisher_sample_size=fisher_sample_size,
            fisher_estimation_method=fisher_estimation_method,
            normalize_fisher=normalize_fisher,
            space=space,
        )
        self.consolidated: Consolidated | DeltaW | None = None
        self._ended: str | None = None
        self._first_scores: dict[str, float] = {}
        self._metrics: dict[str, float] = {}

    # -------------------------------------------------------------------------------------------------- hooks

    def bind(self, model: nn.Module, params: Params, memory: MemorySession) -> None:
        super().bind(model, params, memory)
        self.consolidated = self._read()

    def before_training(self, task_id: str, train_dataset: Any = None) -> Any:
        """Start a task. Raises FisherError for an adapter whose Fisher cannot be estimated at its end."""
        SPACES[self.config.space].check(self.model, self.params)
        self._ended = None
        return super().before_training(task_id, train_dataset)

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
        return self.config.ewc_lambda / 2 * self.consolidated.value(params)

    def modify_gradients(self, params: Params | None = None) -> None:
        """Add the penalty's gradient, in factor space lambda * F (theta - anchor)."""
        if self.consolidated is not None:
            self.consolidated.add_gradient(self.params if params is None else params, self.config.ewc_lambda)

    def after_training(self, task_id: str, train_dataset: Any = None) -> None:
        """Estimate the task's Fisher on its rows and add it to what is protected.

        Raises ConfigError without a data set, DataError for an empty one, FisherError in factor space for an
        untrained adapter: where B is 0, A's Fisher is 0. The Fisher of dW is not, so "delta_w" takes it.
        StrategyError for a second call, which would count the task twice.
        """
        if self._ended == task_id:
            raise StrategyError(f"after_training({task_id!r}) was called twice; call before_training between")
        if train_dataset is None:
            raise ConfigError(
                f"EWC needs train_dataset in after_training({task_id!r}) to estimate the Fisher"
            )
        examples = list(iter_examples(train_dataset, task_id))
        if not examples:
            raise DataError(f"task {task_id!r} has no rows to estimate the Fisher on")
        space = SPACES[self.config.space]
        fisher: Any
        fisher, largest, num_rows = space.estimate(
            self.model, self.params, self._batches(task_id, examples), normalize=self.config.normalize_fisher
        )
        if self.consolidated is None:
            self.consolidated = space.first(fisher, self.model, self.params, is_fresh=self.adapter_is_fresh)
        else:
            self.consolidated.add(fisher, self.params, self.online_gamma)
        untrained = sum(1.0 for n, p in self.params.items() if "lora_B" in n and not bool(p.detach().any()))
        self._metrics = {"fisher_rows": float(num_rows), "fisher_max": largest, "modules_with_B_0": untrained}
        self.memory.stage(self.name, self.consolidated.state())
        self._ended = task_id
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
        """Return the top_k parameters (in delta_w: layers) by mean importance: name -> mean Fisher."""
        if self.consolidated is None:
            return {}
        means = self.consolidated.means()
        return dict(sorted(means.items(), key=lambda item: -item[1])[:top_k])

    # -------------------------------------------------------------------------------------------------- inner

    def _batches(self, task_id: str, examples: Sequence[Example]) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's share of the sampled rows; which rows depends on seed and task alone."""
        seed = derive_seed(self.memory.seed, task_id, "fisher")
        count = min(self.config.fisher_sample_size, len(examples))
        chosen = np.random.default_rng(seed).choice(len(examples), count, replace=False)
        mine = [int(i) for i in chosen[parallel.rank() :: parallel.world_size()]]
        mine.sort(key=lambda i: len(examples[i]["input_ids"]))  # little padding
        device = next(iter(self.params.values())).device
        for start in range(0, len(mine), FISHER_BATCH_ROWS):
            rows = mine[start : start + FISHER_BATCH_ROWS]
            batch = collate([examples[i] for i in rows], 0, device)
            if self.config.fisher_estimation_method == "sample":
                batch["row_seeds"] = torch.tensor([derive_seed(seed, "label", i) for i in rows])
            yield batch

    def _read(self) -> Consolidated | DeltaW | None:
        state = self.memory.read(self.name)
        if not state:
            return None
        if state.get("space") != self.config.space:
            raise StateError(
                f"stored state is of space {state.get('space')!r}, "
                f"this strategy has space={self.config.space!r}"
            )
        return SPACES[self.config.space].load(state, self.model, self.params, is_fresh=self.adapter_is_fresh)


@torch.no_grad()
def _mean_nll(model: nn.Module, dataset: Any) -> float:
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for example in iter_examples(dataset):
        nll, labels = completion_nll(model, collate([example], 0, device))
        total, count = total + float(nll.sum()), count + int(labels.sum())
    return total / max(count, 1)
