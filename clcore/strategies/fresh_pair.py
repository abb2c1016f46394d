"""Owners of adapter structure: each task trains a fresh LoRA pair beside the frozen ones of earlier tasks.

A continued pair cannot be protected by projection: dW = B dA + dB A + dB dA mixes what one factor's update
keeps clean with what the other factor holds from before. A fresh pair starts with B = 0, so dW = B A is
made of projected factors only. After a task all pairs are stacked to one plain LoRA of greater rank, which
computes the same and which any PEFT runtime can load.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clcore.engine.adapters import (
    freeze_pairs,
    has_frozen_pairs,
    join_pairs,
    lora_layers,
    read_pair,
    set_pairs,
)
from clcore.engine.errors import StrategyError
from clcore.engine.memory import MemorySession
from clcore.engine.params import Params
from clcore.engine.strategy import PROJECTS, Strategy
from clcore.engine.tasks import derive_seed
from clcore.strategies.subspace import Subspaces


class FreshPairStrategy(Strategy):
    """Train a fresh pair per task and keep its updates off protected subspaces.

    Subclasses call protect in before_training and stage their state, with "rank", after the task.
    Alone: build the optimizer after before_training, because that makes the fresh pair; attach(optimizer).
    Both once per task.
    """

    owns_adapter = True
    adapter_is_fresh = True
    edits_update = True
    gradient_order = PROJECTS
    needs_attach = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.protected = Subspaces({})
        self.strength = 1.0

    @property
    def rank(self) -> int:
        """Rank of the pair that a task trains."""
        return int(self.memory.read(self.name).get("rank", 0)) or read_pair(self._first_layer())[0].shape[0]

    def prepare_model(self, model: nn.Module, task_id: str, memory: MemorySession) -> nn.Module:
        """Freeze what was trained before and add a pair that starts at 0.

        The first task trains the pair that is there, if it starts at 0.
        """
        layers = lora_layers(model)
        rank = int(memory.read(self.name).get("rank", 0))
        if not rank and not any(bool(read_pair(layer)[1].any()) for layer in layers.values()):
            return model
        rank = rank or read_pair(next(iter(layers.values())))[0].shape[0]
        if not has_frozen_pairs(model):
            freeze_pairs(model)
        generator = torch.Generator().manual_seed(derive_seed(memory.seed, task_id, self.name, "pair"))
        pairs = {}
        for name, layer in layers.items():
            a, b = read_pair(layer)
            bound = 1 / math.sqrt(a.shape[1])  # as PEFT's own: kaiming_uniform with a = sqrt(5)
            values = torch.empty((rank, a.shape[1])).uniform_(-bound, bound, generator=generator)
            pairs[name] = (values, torch.zeros((b.shape[0], rank)))
        set_pairs(model, pairs)
        return model

    def release_model(self, model: nn.Module, task_id: str) -> nn.Module:  # noqa: ARG002
        """Stack all pairs to one adapter."""
        if has_frozen_pairs(model):
            join_pairs(model)
        return model

    def before_training(self, task_id: str, train_dataset: Any = None) -> Any:
        """Start a task; alone this adds the fresh pair, so build the optimizer after it."""
        if not self.is_bound:
            self._prepare_alone(task_id)
        return train_dataset

    def protect(self, protected: Subspaces) -> None:
        """Start to keep updates off these subspaces; a pair with B = 0 starts outside them."""
        self.protected = protected
        self.edits_update = self.strength > 0 and bool(protected.names)
        protected.bind({name: p.shape for name, p in self.params.items()})
        if self.adapter_is_fresh:
            protected.remove({name: p.data for name, p in self.params.items()}, self.strength)

    @torch.no_grad()
    def modify_gradients(self, params: Params | None = None) -> None:
        """Take the protected part out of the gradients."""
        params = self.params if params is None else params
        grads = {name: params[name].grad for name in self.protected.names}
        self.protected.remove({name: g for name, g in grads.items() if g is not None}, self.strength)

    @torch.no_grad()
    def modify_update(self, params: Params, before: Mapping[str, Tensor]) -> None:
        """Take the protected part out of what the optimizer applied: Adam turns a projected gradient."""
        if not self.edits_update:
            return
        moves = {name: params[name].detach() - before[name] for name in self.protected.names}
        self.protected.remove(moves, self.strength)
        for name, move in moves.items():
            params[name].copy_(before[name] + move)

    def finish_task(self) -> None:
        super().finish_task()
        self.edits_update = True  # a composition asks before the next task says what it protects
        if not self.is_bound and self.adapter_is_fresh:
            self.release_model(self.model, "")
            self.is_attached = False  # the next task has parameters of its own

    def _prepare_alone(self, task_id: str) -> None:
        if self.adapter_is_fresh and isinstance(self.model, DistributedDataParallel):
            raise StrategyError("give the unwrapped model: before_training changes which parameters it has")
        self.prepare_model(self.model, task_id, self.memory)
        params = Params.of(self.model)
        if self.is_attached and set(map(id, params.values())) != set(map(id, self.params.values())):
            raise StrategyError(
                f"attach the optimizer of task {task_id!r} after before_training made its pair"
            )
        self.params = params

    def _first_layer(self) -> Any:
        return next(iter(lora_layers(self.model).values()))

    def _layer_bases(self, key: str) -> dict[str, Tensor]:
        """Read name -> basis from memory."""
        device = next(iter(self.params.values())).device
        stored = self.memory.read(self.name).get(key, {})
        return {name: torch.tensor(value, device=device) for name, value in stored.items()}


def check_room(bases: Mapping[str, Tensor]) -> None:
    """Raise StrategyError when the basis of a layer holds every direction: a new task could not train it."""
    for name, basis in bases.items():
        if len(basis) == basis.shape[1]:
            raise StrategyError(
                f"no direction is left for a new task in {name!r}: all {len(basis)} are protected"
            )
