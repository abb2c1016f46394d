"""EWC in the space of the trainable parameters: LoRA's A and B, each number by itself.

Consolidated has the verbs of ewc_delta_w.DeltaW: check, estimate, first, add, value, add_gradient, means,
state and load. value is sum_k sum_i F_k,i (theta_i - theta*_k,i)^2 over earlier tasks k, without lambda/2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clcore.engine import parallel
from clcore.engine.errors import StateError
from clcore.engine.fisher import linear_modules, squared_gradients
from clcore.engine.params import Params

Tensors = Mapping[str, Tensor]


@dataclasses.dataclass
class Consolidated:
    """The sum of all earlier tasks' quadratic penalties as one: importance, anchor and a constant.

    Every trainable parameter by itself; memory is two float32 copies of them for any number of tasks.
    """

    importance: dict[str, Tensor]
    anchor: dict[str, Tensor]
    offset: float = 0.0
    """sum_k F_k (theta*_k - anchor)^2, summed over parameters: what the one-anchor form leaves out."""

    @staticmethod
    def check(model: nn.Module, params: Params) -> None:
        """Raise FisherError unless the Fisher of all params can be estimated."""
        linear_modules(model, params)

    @staticmethod
    def estimate(
        model: nn.Module, params: Params, batches: Iterable[Tensors], *, normalize: bool
    ) -> tuple[dict[str, Tensor], float, int]:
        """Return the diagonal Fisher over all ranks' rows, its largest value before normalising, and rows.

        normalize: divide by the largest value.
        """
        total, local_rows = squared_gradients(model, params, batches)
        parallel.all_reduce_sum(list(total.values()))
        num_rows = int(parallel.sum_over_ranks([local_rows])[0])
        fisher = {name: f / num_rows for name, f in total.items()}
        largest = max(float(f.max()) for f in fisher.values())
        divisor = largest if normalize and largest > 0 else 1.0
        return {name: f / divisor for name, f in fisher.items()}, largest, num_rows

    @classmethod
    def first(cls, fisher: Tensors, model: nn.Module, params: Params, *, is_fresh: bool) -> Consolidated:  # noqa: ARG003
        """Return the penalty of a first task, anchored at the present parameters."""
        return cls(dict(fisher), copies(params))

    @torch.no_grad()
    def add(self, fisher: Tensors, theta: Tensors, gamma: float | None = None) -> None:
        """Add a task's penalty.

        gamma None: exactly, for a sum of parabolas is a parabola around the weighted mean. Otherwise as
        Schwarz et al. 2018: the old importance fades by gamma, and all of it is anchored at theta.
        """
        if gamma is not None:
            self.importance = {name: gamma * self.importance[name] + f for name, f in fisher.items()}
            self.anchor, self.offset = copies(theta), 0.0
            return
        for name, f_new in fisher.items():
            f_old, anchor = self.importance[name], self.anchor[name]
            f_sum = f_old + f_new
            share = torch.where(f_sum > 0, f_new / f_sum, torch.zeros_like(f_sum))
            distance = theta[name].float() - anchor
            self.offset += float((f_old * share * distance.square()).sum(dtype=torch.float64))
            self.importance[name] = f_sum
            self.anchor[name] = anchor + share * distance

    def value(self, params: Tensors) -> Tensor:
        """Return the weighted squared distance, a scalar with its graph."""
        terms = [
            (self.importance[n] * (p.float() - self.anchor[n]).square()).sum() for n, p in params.items()
        ]
        return torch.stack(terms).sum() + self.offset

    @torch.no_grad()
    def add_gradient(self, params: Tensors, strength: float) -> None:
        """Add strength * F (theta - anchor), half the value's gradient for strength 1, to every .grad."""
        distances = torch._foreach_sub([p.float() for p in params.values()], [self.anchor[n] for n in params])
        torch._foreach_mul_(distances, [self.importance[n] for n in params])
        torch._foreach_add_(gradients(params.values()), distances, alpha=strength)

    def means(self) -> dict[str, float]:
        """Return each parameter's mean importance."""
        return {name: float(f.mean()) for name, f in self.importance.items()}

    def state(self) -> dict[str, Any]:
        importance, anchor = dict(self.importance), dict(self.anchor)
        return {"space": "factors", "importance": importance, "anchor": anchor, "offset": self.offset}

    @classmethod
    def load(
        cls,
        state: Mapping[str, Any],
        model: nn.Module,  # noqa: ARG003
        params: Params,
        *,
        is_fresh: bool,  # noqa: ARG003
    ) -> Consolidated:
        """Take what state returned. Raises StateError when it belongs to another adapter."""
        importance = load_like(params, state["importance"])
        return cls(importance, load_like(params, state["anchor"]), float(state["offset"]))


def copies(values: Tensors) -> dict[str, Tensor]:
    return {name: value.detach().float().clone() for name, value in values.items()}


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return every .grad, made of zeros where there is none yet."""
    found = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        found.append(parameter.grad)
    return found


def load_like(params: Params, stored: Mapping[str, Any]) -> dict[str, Tensor]:
    check_shapes(
        {name: tuple(np.shape(value)) for name, value in stored.items()},
        {name: tuple(p.shape) for name, p in params.items()},
    )
    return {name: torch.tensor(stored[name], device=p.device) for name, p in params.items()}


def check_shapes(stored: Mapping[str, tuple[int, ...]], present: Mapping[str, tuple[int, ...]]) -> None:
    if stored != present:
        name, shape = sorted({*stored.items()} ^ {*present.items()})[0]
        raise StateError(
            f"stored Fisher does not fit the adapter: {name!r} has shape {shape} on one side only"
        )
