"""Synaptic Intelligence (Zenke, Poole, Ganguli 2017, ICML): importance from the path that training took.

    omega    += -g * (theta_after - theta_before)                    each step; g: gradient of the plain loss
    Omega     = relu(Omega + omega / ((theta - theta_prev)^2 + xi))  at the end of a task
    penalty   = lambda * sum_i Omega_i (theta_i - theta_prev,i)^2    without 1/2, as in the paper

theta_prev is where the last task ended. omega sums, over parameters, to the drop of the loss that a task's
steps explain. No pass over the data is needed: everything comes from gradients that training has anyway.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from clcore.engine.config import StrategyConfig
from clcore.engine.errors import ConfigError, StateError
from clcore.engine.memory import MemorySession
from clcore.engine.params import Params
from clcore.engine.strategy import OBSERVES, Strategy


@dataclasses.dataclass(frozen=True, kw_only=True)
class SynapticIntelligenceConfig(StrategyConfig):
    """Parameters of Synaptic Intelligence in a job; the defaults are tuned for LoRA with AdamW."""

    si_lambda: float = 3.0
    """Strength of the penalty; with normalize_importance the largest importance is 1."""
    xi: float = 1e-3
    """Damping of the importance of parameters that hardly moved, in squared parameter units. About the median
    squared displacement of LoRA factors: far above it, as 0.1 is, displacements no longer count; far below
    it, the parameters that moved least take all importance."""
    normalize_importance: bool = True
    """Divide the importance by its largest value over the whole model where the penalty uses it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.si_lambda) and self.si_lambda >= 0):
            raise ConfigError(f"si_lambda must be a finite number of at least 0, got {self.si_lambda}")
        if not (math.isfinite(self.xi) and self.xi > 0):
            raise ConfigError(f"xi must be a positive finite number, got {self.xi}")

    @property
    def needs_same_adapter(self) -> bool:
        """The penalty compares the factors with those of earlier tasks."""
        return True


class SynapticIntelligence(Strategy):
    """Penalise changes of parameters along which earlier tasks gained the most.

    g is read after synchronisation, before clipping and before any penalty; the step is what the optimizer
    and projections really applied, so Adam's scaling and clipping count. Decoupled weight decay is part of
    that step: train with weight_decay 0 (the job default), or omega holds decay's share too. State is
    float32: theta_prev, omega and Omega, three copies of the trainable parameters; g and the copy from before
    the step live only while the optimizer steps. Alone, attach(optimizer) is needed; the penalty then acts
    through the gradients and modify_loss changes nothing.
    """

    name = "si"
    Config: ClassVar[type[Any]] = SynapticIntelligenceConfig
    edits_update = True
    gradient_order = OBSERVES
    needs_attach = True

    def __init__(
        self, model: nn.Module, si_lambda: float = 1.0, xi: float = 0.1, normalize_importance: bool = True
    ) -> None:
        super().__init__(model)
        self.config = SynapticIntelligenceConfig(
            si_lambda=si_lambda, xi=xi, normalize_importance=normalize_importance
        )
        self.omega: dict[str, Tensor] = {}
        """This task's path integral, in nats per label token."""
        self.importance: dict[str, Tensor] = {}
        """Omega as summed over earlier tasks, before normalisation; empty in the first task."""
        self.anchor: dict[str, Tensor] = {}
        """theta_prev."""
        self._strength = 0.0
        self._loss_gradients: list[Tensor] = []
        self._metrics: dict[str, float] = {}

    # -------------------------------------------------------------------------------------------------- hooks

    def bind(self, model: nn.Module, params: Params, memory: MemorySession) -> None:
        super().bind(model, params, memory)
        self._start_task()

    def before_training(self, task_id: str, train_dataset: Any = None) -> Any:  # noqa: ARG002
        if not self.is_bound:
            self._start_task()
        return train_dataset

    def penalty(self, params: Params | None = None) -> Tensor:
        """Return lambda * sum Omega (theta - theta_prev)^2 as a scalar; 0 before the first task ends."""
        params = self.params if params is None else params
        terms = [
            (f * (params[n].float() - self.anchor[n]).square()).sum() for n, f in self.importance.items()
        ]
        return self._strength * torch.stack(terms).sum() if terms else torch.zeros(())

    @torch.no_grad()
    def modify_gradients(self, params: Params | None = None) -> None:
        """Keep the loss's gradient for the update, then add the penalty's, 2 lambda Omega (theta - prev)."""
        if not self.omega:
            self._start_task()
        parameters = list((self.params if params is None else params).values())
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._loss_gradients = [g.to(torch.float32, copy=True) for g in gradients]
        if not self.importance:
            return
        pull = torch._foreach_sub(_float32(parameters), list(self.anchor.values()))
        torch._foreach_mul_(pull, list(self.importance.values()))
        torch._foreach_mul_(pull, 2 * self._strength)
        torch._foreach_add_(gradients, [t.to(g.dtype) for t, g in zip(pull, gradients, strict=True)])

    @torch.no_grad()
    def modify_update(self, params: Params, before: Mapping[str, Tensor]) -> None:
        """Add what this step gained, -g * (theta_after - theta_before), to the path integral."""
        step = torch._foreach_sub(_float32(params.values()), _float32(before[name] for name in params))
        torch._foreach_addcmul_(list(self.omega.values()), self._loss_gradients, step, value=-1.0)
        self._loss_gradients = []

    @torch.no_grad()
    def after_training(self, task_id: str, train_dataset: Any = None) -> None:  # noqa: ARG002
        """Turn the path integral into importance and move the anchor here; needs no data set."""
        theta = {name: p.detach().to(torch.float32, copy=True) for name, p in self.params.items()}
        importance: dict[str, Tensor] = dict(self.importance)
        for name, omega in self.omega.items():
            gained = omega / ((theta[name] - self.anchor[name]).square() + self.config.xi)
            importance[name] = (gained + importance.get(name, 0.0)).relu()
        self.memory.stage(self.name, {"importance": importance, "anchor": theta})
        self._metrics = {
            "path_integral": sum(float(omega.sum()) for omega in self.omega.values()),
            "importance_max": max((float(f.max()) for f in importance.values()), default=0.0),
        }
        self.finish_task()
        self.omega = {}  # the next task starts as it would with a new object
        if not self.is_bound:
            self._start_task()

    def metrics(self) -> Mapping[str, float]:
        """Return the loss drop that the task's steps explain, in nats per label token, and max Omega."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"omega": {name: omega.clone() for name, omega in self.omega.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.refuse_unknown(state)
        omega = state.get("omega", {})
        self.omega = {n: v.clone() if isinstance(v, Tensor) else torch.tensor(v) for n, v in omega.items()}

    # -------------------------------------------------------------------------------------------------- inner

    @torch.no_grad()
    def _start_task(self) -> None:
        """Take theta_prev and Omega from memory, or the present parameters before the first task."""
        state = self.memory.read(self.name)
        self.importance, self.anchor = (self._fitted(state.get(k, {}), k) for k in ("importance", "anchor"))
        if not self.anchor:
            self.anchor = {n: p.detach().to(torch.float32, copy=True) for n, p in self.params.items()}
        self.omega = self._fitted(self.omega, "omega") or {
            name: torch.zeros_like(value) for name, value in self.anchor.items()
        }
        largest = max((float(f.max()) for f in self.importance.values()), default=0.0)
        unit = largest if self.config.normalize_importance else 1.0
        self._strength = self.config.si_lambda / unit if largest > 0 else 0.0

    def _fitted(self, values: Mapping[str, Any], what: str) -> dict[str, Tensor]:
        """Return values as tensors beside the parameters and in their order; {} stays {}."""
        shapes = {name: tuple(p.shape) for name, p in self.params.items()}
        stored = {name: tuple(np.shape(value)) for name, value in values.items()}
        if stored and stored != shapes:
            name, shape = sorted({*stored.items()} ^ {*shapes.items()})[0]
            raise StateError(f"stored {what} does not fit the adapter: {name!r} has {shape} on one side only")
        return {
            n: torch.tensor(np.asarray(values[n]), device=self.params[n].device) for n in shapes if stored
        }


def _float32(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.float() for tensor in tensors]
