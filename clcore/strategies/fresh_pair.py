"""Owners of adapter structure: each task trains a fresh LoRA pair beside the frozen ones of earlier tasks.

A continued pair cannot be protected by projection: dW = B dA + dB A + dB dA mixes what one factor's update
keeps clean with what the other factor holds from before. A fresh pair starts with B = 0, so dW = B A is made
of projected factors only. After a task all pairs are stacked to one plain LoRA of greater rank, which computes
the same and which any PEFT runtime can load.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clcore.engine.adapters import (
    freeze_pairs,
    has_frozen_pairs,
    join_pairs,
    lora_layers,
    read_pair,
    set_pairs,
)
from clcore.engine.memory import MemorySession
from clcore.engine.params import Params
from clcore.engine.strategy import PROJECTS, Strategy
from clcore.engine.tasks import derive_seed
from clcore.strategies.subspace import Subspaces


class FreshPairStrategy(Strategy):
    """Train a fresh pair per task and keep its updates off protected subspaces.

    Subclasses set self.protected before the first step and stage their state, with "rank", after the task.
    Alone: build the optimizer after before_training, because that makes the fresh pair; attach(optimizer).
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
        """Freeze what earlier tasks trained and add a pair that starts at 0."""
        rank = int(memory.read(self.name).get("rank", 0))
        if not rank:  # the first task trains the pair that is there
            return model
        if not has_frozen_pairs(model):
            freeze_pairs(model)
        generator = torch.Generator().manual_seed(derive_seed(memory.seed, task_id, self.name, "pair"))
        pairs = {}
        for name, layer in lora_layers(model).items():
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
            self.prepare_model(self.model, task_id, self.memory)
            self.params = Params.of(self.model)
        return train_dataset

    def protect(self, protected: Subspaces) -> None:
        """Start to keep updates off these subspaces; a pair with B = 0 starts outside them."""
        self.protected = protected
        protected.bind({name: p.shape for name, p in self.params.items()})
        if self.adapter_is_fresh:
            protected.remove({name: p.data for name, p in self.params.items()}, self.strength)

    @torch.no_grad()
    def modify_gradients(self, params: Params | None = None) -> None:
        """Take the protected part out of the gradients."""
        params = self.params if params is None else params
        self.protected.remove({n: p.grad for n, p in params.items() if p.grad is not None}, self.strength)

    @torch.no_grad()
    def modify_update(self, params: Params, before: Mapping[str, Tensor]) -> None:
        """Take the protected part out of what the optimizer applied: Adam turns a projected gradient."""
        moves = {name: p.detach() - before[name] for name, p in params.items()}
        self.protected.remove(moves, self.strength)
        for name, p in params.items():
            p.copy_(before[name] + moves[name])

    def finish_task(self) -> None:
        super().finish_task()
        if not self.is_bound:
            self.release_model(self.model, "")

    def _first_layer(self) -> Any:
        return next(iter(lora_layers(self.model).values()))

    def _layer_bases(self, key: str) -> dict[str, Tensor]:
        """Read name -> basis from memory."""
        device = next(iter(self.params.values())).device
        stored = self.memory.read(self.name).get(key, {})
        return {name: torch.tensor(value, device=device) for name, value in stored.items()}
