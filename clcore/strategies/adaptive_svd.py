"""Adaptive SVD: keep each task's update off the directions that earlier knowledge lives in.

Three sources of protected directions, chosen by source:

"gradients"    the leading singular directions of the gradients of earlier tasks, per factor
"activations"  the leading directions of a layer's inputs on earlier tasks (GPM, Saha et al. 2021): their
               outputs stay as they were, dW x = 0 for every x in the span
"weights"      the leading singular directions of the weights themselves, on both sides, with a rank per layer
               (Nayak et al. 2025, "Sculpting Subspaces"); needs no data of earlier tasks

With LoRA, A loses the protected input directions and B the protected output directions, so that
dW = (I - P_U) B A (I - P_V). That projects each side by itself, stronger than taking P_U dW P_V out.
Gradients and applied updates are projected: Adam's scaling turns a projected gradient back into the subspace.
The same class protects full weights of Linear layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from clcore.engine.adapters import check_pairs
from clcore.engine.config import StrategyConfig
from clcore.engine.errors import ConfigError, DataError
from clcore.engine.fisher import unwrapped
from clcore.engine.params import Params
from clcore.engine.tasks import Example, derive_seed, iter_examples
from clcore.strategies.fresh_pair import FreshPairStrategy, check_room
from clcore.strategies.subspace import Subspaces, empty_basis, grow
from clcore.strategies.svd_sources import (
    Layer,
    adaptive_ranks,
    current_weight,
    sample_inputs,
    strongest_rows,
    trained_layers,
    weight_directions,
)

SOURCES = ("gradients", "activations", "weights")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveSVDConfig(StrategyConfig):
    """Parameters of adaptive SVD in a job."""

    svd_rank: int = 64
    """Directions that one task protects per layer and side, at most, from 1; not for source "weights"."""
    importance_threshold: float = 0.01
    """Share of the energy of gradients or inputs left unprotected, in [0, 1); not for source "weights"."""
    projection_strength: float = 1.0
    """Share of the protected part that is taken out of updates, in [0, 1]."""
    update_frequency: int = 5
    """Source "gradients": look at the gradient on every n-th step."""
    use_incremental_svd: bool = True
    """Source "gradients": keep svd_rank summed-up directions instead of every gradient looked at."""
    source: str = "activations"
    """Where protected directions come from: "gradients" or "activations" of earlier tasks, or "weights"."""
    min_rank_ratio: float = 0.1
    """Source "weights": share of a layer's directions that is protected whatever its importance."""
    target_rank_ratio: float = 0.8
    """Source "weights": share in a layer of average importance, at least min_rank_ratio and below 1."""
    sample_rows: int = 128
    """Rows of a task whose inputs are looked at, from 1; not for source "gradients"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("svd_rank", "update_frequency", "sample_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.importance_threshold < 1:
            raise ConfigError(f"importance_threshold must be in [0, 1), got {self.importance_threshold}")
        if not 0 <= self.projection_strength <= 1:
            raise ConfigError(f"projection_strength must be in [0, 1], got {self.projection_strength}")
        if self.source not in SOURCES:
            raise ConfigError(f"source must be one of {', '.join(SOURCES)}, got {self.source!r}")
        if not 0 <= self.min_rank_ratio <= self.target_rank_ratio < 1:
            raise ConfigError(
                "0 <= min_rank_ratio <= target_rank_ratio < 1 must hold, "
                f"got {self.min_rank_ratio} and {self.target_rank_ratio}"
            )


class AdaptiveSVD(FreshPairStrategy):
    """Keep updates off directions of old gradients or inputs, or of the weights; see the module's text.

    Alone: before_training (with the task's rows for source "weights"), build the optimizer,
    attach(optimizer), train, after_training (with the task's rows for source "activations").
    """

    name = "adaptive_svd"
    Config: ClassVar[type[Any]] = AdaptiveSVDConfig

    def __init__(
        self,
        model: nn.Module,
        svd_rank: int = 10,
        importance_threshold: float = 0.01,
        projection_strength: float = 1.0,
        update_frequency: int = 50,
        use_incremental_svd: bool = False,
        *,
        source: str = "gradients",
        min_rank_ratio: float = 0.1,
        target_rank_ratio: float = 0.8,
        sample_rows: int = 128,
    ) -> None:
        super().__init__(model)
        self.config = AdaptiveSVDConfig(
            svd_rank=svd_rank,
            importance_threshold=importance_threshold,
            projection_strength=projection_strength,
            update_frequency=update_frequency,
            use_incremental_svd=use_incremental_svd,
            source=source,
            min_rank_ratio=min_rank_ratio,
            target_rank_ratio=target_rank_ratio,
            sample_rows=sample_rows,
        )
        self.strength = projection_strength
        self.is_full = not isinstance(unwrapped(model), PeftModel)
        if not self.is_full:
            check_pairs(model)
        self.adapter_is_fresh = not self.is_full
        self.ranks: dict[str, int] = {}
        """Source "weights": directions protected per layer."""
        self._layers: dict[str, Layer] = {}
        self._collected: dict[str, Tensor] = {}
        self._num_steps = 0
        self._metrics: dict[str, float] = {}

    # -------------------------------------------------------------------------------------------------- hooks

    def prepare_model(self, model: nn.Module, task_id: str, memory: Any) -> nn.Module:
        """Freeze what was trained before and add a pair that starts at 0; full weights stay as they are."""
        return model if self.is_full else super().prepare_model(model, task_id, memory)

    def release_model(self, model: nn.Module, task_id: str) -> nn.Module:
        """Stack all pairs to one adapter."""
        return model if self.is_full else super().release_model(model, task_id)

    def before_training(self, task_id: str, train_dataset: Any = None) -> Any:
        """Start a task: find out what to protect in it.

        Raises DataError when source "weights" gets no rows, StrategyError when no direction is left.
        """
        super().before_training(task_id, train_dataset)
        self._layers = trained_layers(self.model, self.params)
        if self.config.source == "weights":
            inputs, outputs = self._from_weights(task_id, train_dataset)
        else:
            inputs, outputs = self._layer_bases("inputs"), self._layer_bases("outputs")
        check_room(inputs)
        check_room(outputs)
        self.protect(_subspaces(self._layers, inputs, outputs))
        return train_dataset

    @torch.no_grad()
    def modify_gradients(self, params: Params | None = None) -> None:
        """Look at the gradient when its turn has come, then take the protected part out."""
        params = self.params if params is None else params
        # The second step as well: on the first, B is 0 and A has no gradient.
        due = self._num_steps % self.config.update_frequency == 0 or self._num_steps == 1
        if self.config.source == "gradients" and due:
            self._collect(params)
        self._num_steps += 1
        super().modify_gradients(params)

    def after_training(self, task_id: str, train_dataset: Any = None) -> None:
        """Add the task's directions to what later tasks leave alone.

        Raises DataError when source "activations" gets no rows.
        """
        inputs, outputs = self._layer_bases("inputs"), self._layer_bases("outputs")
        limits = {"max_new": self.config.svd_rank, "lost_energy": self.config.importance_threshold}
        if self.config.source == "activations":
            found = sample_inputs(self.model, self._layers, self._rows(task_id, train_dataset))
            inputs = {
                name: grow(inputs.get(name, empty_basis(x.shape[1], x.device)), x, **limits)  # type: ignore[arg-type]
                for name, x in found.items()
            }
        elif self.config.source == "gradients":
            for name, rows in self._collected.items():
                bases = inputs if name.endswith("/in") else outputs
                layer = name.rpartition("/")[0]
                old = bases.get(layer, empty_basis(rows.shape[1], rows.device))
                bases[layer] = grow(old, rows, **limits)  # type: ignore[arg-type]
        self._metrics = _shares(self.protected)
        state: dict[str, Any] = {"inputs": inputs, "outputs": outputs}
        self.memory.stage(self.name, state if self.is_full else {"rank": self.rank, **state})
        self._collected, self._num_steps = {}, 0
        self.finish_task()

    def metrics(self) -> Mapping[str, float]:
        """Return the largest and the mean share of directions that were protected in this task."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"collected": dict(self._collected), "num_steps": self._num_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.refuse_unknown(state)
        device = next(iter(self.params.values())).device
        self._collected = {n: torch.as_tensor(v).to(device) for n, v in state.get("collected", {}).items()}
        self._num_steps = int(state.get("num_steps", 0))

    # -------------------------------------------------------------------------------------------------- inner

    def _from_weights(self, task_id: str, dataset: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        inputs = sample_inputs(self.model, self._layers, self._rows(task_id, dataset))
        weights = {name: current_weight(layer) for name, layer in self._layers.items()}
        least, target = self.config.min_rank_ratio, self.config.target_rank_ratio
        self.ranks = adaptive_ranks(weights, inputs, least=least, target=target)
        found = {name: weight_directions(weight, self.ranks[name]) for name, weight in weights.items()}
        return {n: right for n, (right, _) in found.items()}, {n: left for n, (_, left) in found.items()}

    def _rows(self, task_id: str, dataset: Any) -> list[Example]:
        if dataset is None:
            raise DataError(f"source {self.config.source!r} needs the rows of task {task_id!r}")
        rows = list(iter_examples(dataset, task_id))
        if not rows:
            raise DataError(f"task {task_id!r} has no rows to look at")
        seed = derive_seed(self.memory.seed, task_id, self.name, "rows")
        count = min(self.config.sample_rows, len(rows))
        return [rows[i] for i in np.random.default_rng(seed).choice(len(rows), count, replace=False)]

    def _collect(self, params: Params) -> None:
        for name, layer in self._layers.items():
            sides = {"in": (layer.input_parameter, not layer.is_transposed)}
            if layer.output_parameter != layer.input_parameter:
                sides["out"] = (layer.output_parameter, False)
            for side, (parameter, is_right) in sides.items():
                gradient = params[parameter].grad
                if gradient is None:
                    continue
                rows = (gradient if is_right else gradient.T).detach().float()
                key = f"{name}/{side}"
                rows = torch.cat([self._collected[key], rows]) if key in self._collected else rows.clone()
                # As many rows as there are directions hold everything.
                most = self.config.svd_rank if self.config.use_incremental_svd else rows.shape[1]
                self._collected[key] = strongest_rows(rows, most) if len(rows) > most else rows


def _subspaces(
    layers: Mapping[str, Layer], inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
) -> Subspaces:
    right: dict[str, Tensor] = {}
    left: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if name in inputs:
            (left if layer.is_transposed else right)[layer.input_parameter] = inputs[name]
        if name in outputs:
            (right if layer.is_transposed else left)[layer.output_parameter] = outputs[name]
    return Subspaces(right, left)


def _shares(protected: Subspaces) -> dict[str, float]:
    shares = [len(b) / b.shape[1] for side in (protected.right, protected.left) for b in side.values()]
    return {
        "protected_share_max": max(shares, default=0.0),
        "protected_share_mean": sum(shares) / len(shares) if shares else 0.0,
    }
