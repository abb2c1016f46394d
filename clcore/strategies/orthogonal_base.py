"""Orthogonal LoRA (Wang et al. 2023, O-LoRA, Findings of EMNLP): a task's pair avoids the rows of earlier A.

The basis Q of a layer spans the rows of every earlier task's A. The fresh A starts outside it and each
applied update is projected, A <- A - (A Q^T) Q, so that A_new A_old^T = 0 holds to float rounding without a
strength to tune. The published form, a penalty on that product, is there as an option, in squared form and
on the basis, where it does not grow with the size of old weights:

    penalty = lambda * sum over layers ||A Q^T||_F^2

Only row spaces are kept apart. Inputs of old tasks need not be orthogonal to the new A, so this reduces
interference and does not exclude forgetting; adaptive_svd with source="activations" does that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clcore.engine.adapters import check_pairs, lora_layers, parameter_names, read_pair
from clcore.engine.config import StrategyConfig
from clcore.engine.errors import ConfigError
from clcore.engine.params import Params
from clcore.strategies.fresh_pair import FreshPairStrategy, check_room
from clcore.strategies.subspace import Subspaces, empty_basis, grow


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrthogonalLoRAConfig(StrategyConfig):
    """Parameters of orthogonal LoRA in a job."""

    orthogonal_constraint_lambda: float = 1.0
    """Strength of the penalty; without effect unless use_loss_regularization."""
    orthogonal_projection_alpha: float = 1.0
    """Share of the overlap that projection removes, in [0, 1]; 1 keeps the rows exactly orthogonal."""
    use_gradient_projection: bool = True
    """Project gradients and applied updates. False leaves the penalty alone, as published."""
    use_loss_regularization: bool = False
    """Add the penalty. It is 0 as long as the projection is complete."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.orthogonal_constraint_lambda) and self.orthogonal_constraint_lambda >= 0):
            raise ConfigError(
                "orthogonal_constraint_lambda must be a finite number of at least 0, "
                f"got {self.orthogonal_constraint_lambda}"
            )
        if not 0 <= self.orthogonal_projection_alpha <= 1:
            raise ConfigError(
                f"orthogonal_projection_alpha must be in [0, 1], got {self.orthogonal_projection_alpha}"
            )


class OrthogonalLoRA(FreshPairStrategy):
    """A fresh LoRA pair per task whose A stays orthogonal to every earlier A.

    Alone: before_training, then build the optimizer and attach(optimizer); without projection modify_loss
    does for the penalty. The pairs must be all that is trained: a bias would know no earlier task.
    """

    name = "orthogonal_lora"
    Config: ClassVar[type[Any]] = OrthogonalLoRAConfig

    def __init__(
        self,
        model: nn.Module,
        orthogonal_constraint_lambda: float = 1.0,
        orthogonal_projection_alpha: float = 1.0,
        use_gradient_projection: bool = True,
        use_loss_regularization: bool = True,
    ) -> None:
        super().__init__(model)
        check_pairs(model)
        self.config = OrthogonalLoRAConfig(
            orthogonal_constraint_lambda=orthogonal_constraint_lambda,
            orthogonal_projection_alpha=orthogonal_projection_alpha,
            use_gradient_projection=use_gradient_projection,
            use_loss_regularization=use_loss_regularization,
        )
        self.strength = orthogonal_projection_alpha if use_gradient_projection else 0.0
        self._metrics: dict[str, float] = {}

    @property
    def needs_attach(self) -> bool:  # type: ignore[override]
        """Projection needs the optimizer; the penalty alone can be part of the loss."""
        return self.strength > 0

    # -------------------------------------------------------------------------------------------------- hooks

    def before_training(self, task_id: str, train_dataset: Any = None) -> Any:
        """Start a task; alone this adds the fresh pair, so build the optimizer after it.

        Raises StrategyError when earlier tasks took every direction of a layer.
        """
        super().before_training(task_id, train_dataset)
        bases = self._layer_bases("basis")
        check_room(bases)
        self.protect(Subspaces({parameter_names(name)[0]: basis for name, basis in bases.items()}))
        return train_dataset

    def modify_loss(
        self,
        loss: Tensor,
        model: nn.Module | None = None,  # noqa: ARG002
        *,
        batch: Mapping[str, Tensor] | None = None,  # noqa: ARG002
        outputs: Any = None,  # noqa: ARG002
    ) -> Tensor:
        """Add the penalty to a loss; inside fit_task or after attach() the gradient carries it instead."""
        if self.is_bound or self.is_attached or not self.config.use_loss_regularization:
            return loss
        return loss + self.penalty().to(loss.dtype)

    def penalty(self) -> Tensor:
        """Return lambda * sum ||A Q^T||_F^2 as a scalar; 0 in the first task."""
        parts = [inside.square().sum() for inside in self.protected.coefficients(self.params)]
        zero = torch.zeros((), device=next(iter(self.params.values())).device)
        return self.config.orthogonal_constraint_lambda * sum(parts, start=zero)

    @torch.no_grad()
    def modify_gradients(self, params: Params | None = None) -> None:
        """Add the penalty's gradient, 2 lambda (A Q^T) Q, and project what comes out."""
        params = self.params if params is None else params
        if self.config.use_loss_regularization:
            for name, inside in self.protected.protected_parts(params):
                pull = (2 * self.config.orthogonal_constraint_lambda * inside).to(params[name].dtype)
                params[name].grad = pull if params[name].grad is None else params[name].grad.add_(pull)  # type: ignore[union-attr]
        if self.strength:
            super().modify_gradients(params)

    def after_training(self, task_id: str, train_dataset: Any = None) -> None:  # noqa: ARG002
        """Add the rows of the task's A to what later tasks avoid."""
        overlap = self.get_orthogonality_visualization()
        rank, bases, used = self.rank, self._layer_bases("basis"), []
        for name, layer in lora_layers(self.model).items():
            a, _ = read_pair(layer)
            bases[name] = grow(bases.get(name, empty_basis(a.shape[1], a.device)), a)
            used.append(len(bases[name]) / a.shape[1])
        self._metrics = {
            "overlap_max": max(overlap.values()),
            "capacity_used_max": max(used),
            "capacity_used_mean": sum(used) / len(used),
        }
        self.memory.stage(self.name, {"rank": rank, "basis": bases})
        self.finish_task()

    def metrics(self) -> Mapping[str, float]:
        """Return the largest overlap with earlier rows and the share of directions that are taken."""
        return dict(self._metrics)

    # --------------------------------------------------------------------------------------------- inspection

    def get_orthogonality_visualization(self) -> dict[str, float]:
        """Return per layer ||A Q^T||_F / ||A||_F: 0 orthogonal to every earlier task, 1 inside their span."""
        shares = self.protected.inside_share({name: p.detach() for name, p in self.params.items()})
        return {name: shares.get(parameter_names(name)[0], 0.0) for name in lora_layers(self.model)}
