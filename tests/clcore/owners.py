"""Two tasks with a strategy that owns the adapter, and what the second one moved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clcore.engine.adapters import lora_layers, read_pair
from clcore.engine.loop import TrainConfig, fit_task
from clcore.engine.memory import MemorySession
from clcore.engine.registry import build_strategy
from clcore.engine.strategy import Strategy
from clcore.engine.tasks import collate
from tests.clcore.tiny import (
    new_session,
    tiny_dataset,
    tiny_gpt2_base,
    tiny_llama,
    tiny_llama_base,
    tiny_stream,
    with_lora,
)


def full_weights(model: nn.Module, *endings: str) -> nn.Module:
    """Let only the weights of these layers be trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(tuple(f"{ending}.weight" for ending in endings)))
    return model


def make_model(kind: str) -> nn.Module:
    """Return a tiny model: kind "lora", "lora_gpt2", "full" or "full_gpt2"."""
    if kind == "lora":
        return tiny_llama(targets=["q_proj", "v_proj", "down_proj"])
    if kind == "lora_gpt2":
        return with_lora(tiny_gpt2_base(), ["c_attn", "c_fc"])
    if kind == "full":
        return full_weights(tiny_llama_base(), "q_proj", "down_proj", "up_proj")
    return full_weights(tiny_gpt2_base(), "c_attn", "c_fc")


@torch.no_grad()
def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained layers' weights (out, in) in float64: the pairs' sum, or the full weight."""
    if any("lora_" in name for name, _ in model.named_parameters()):
        return {
            name: sum(
                layer.scaling[adapter]
                * (read_pair(layer, adapter)[1].double() @ read_pair(layer, adapter)[0].double())
                for adapter in layer.lora_A
            )
            for name, layer in lora_layers(model).items()
        }
    modules = dict(model.named_modules())
    return {
        (layer := name.removesuffix(".weight")): (p.T if isinstance(modules[layer], Conv1D) else p).double()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


@dataclasses.dataclass
class TwoTasks:
    """What two tasks left."""

    model: nn.Module
    strategy: Strategy
    state: Mapping[str, Any]
    """The strategy's memory after the first task."""
    moved: dict[str, Tensor]
    """Layer -> dW of the second task."""
    metrics: list[Mapping[str, float]]


def two_tasks(
    kind: str,
    name: str,
    params: Mapping[str, Any],
    *,
    num_steps: int = 200,
    first_rows: int = 8,
    **changes: Any,
) -> TwoTasks:
    """Train 10 steps on one task and num_steps on another; changes go to the second task's TrainConfig."""
    model, session = make_model(kind), new_session()
    strategy = build_strategy(name, params, model)
    first, second = (dataset for _, dataset in tiny_stream())
    config = TrainConfig(num_steps=10, learning_rate=1e-2)
    metrics = [
        fit_task(model, strategy, first[:first_rows], task_id="t0", config=config, memory=session).metrics
    ]
    state, start = session.read(name), {n: w.clone() for n, w in weights_of(model).items()}
    session = session.next_task(op_id="run/t1")
    config = TrainConfig(**{"num_steps": num_steps, "learning_rate": 3e-3, **changes})
    metrics.append(fit_task(model, strategy, second, task_id="t1", config=config, memory=session).metrics)
    moved = {n: w - start[n] for n, w in weights_of(model).items()}
    return TwoTasks(model, strategy, state, moved, metrics)


def share_inside(x_ND: Tensor, basis: Any) -> float:
    """Return ||X Q^T|| / ||X|| in float64; basis (k, d) with orthonormal rows."""
    basis_KD = (
        torch.as_tensor(basis).double() if not hasattr(basis, "flags") else torch.tensor(basis).double()
    )
    return float((x_ND.double() @ basis_KD.T).norm() / x_ND.double().norm())


BATCH = collate(tiny_dataset("t0", 4), 0)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits
    return found


def after_one_task(**params: Any) -> tuple[nn.Module, MemorySession]:
    model, session = tiny_llama(), new_session()
    config = TrainConfig(num_steps=5, learning_rate=1e-2)
    strategy = build_strategy("orthogonal_lora", params, model)
    fit_task(model, strategy, tiny_stream()[0][1], task_id="t0", config=config, memory=session)
    return model, session.next_task(op_id="run/t1")
