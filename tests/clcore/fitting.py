"""A short way to run fit_task on a tiny task."""

from __future__ import annotations

from typing import Any

from torch import nn

from clcore.engine.loop import FitResult, TrainConfig, fit_task
from clcore.engine.strategy import Strategy
from clcore.engine.tasks import Example
from clcore.strategies.none import NoStrategy
from tests.clcore.tiny import new_session, tiny_dataset


def config(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {"num_steps": 5, "learning_rate": 1e-3, "batch_size": 6, "micro_batch_size": 6}
    return TrainConfig(**{**values, **changes})


def fit(
    model: nn.Module, dataset: list[Example] | None = None, strategy: Strategy | None = None, **changes: Any
) -> FitResult:
    """Train on one task with no strategy unless told otherwise; changes go to TrainConfig or to fit_task."""
    names = ("task_id", "memory", "resume", "on_step", "should_stop", "on_checkpoint")
    calls = {name: changes.pop(name) for name in names if name in changes}
    calls = {"task_id": "t0", "memory": new_session(), **calls}
    dataset = tiny_dataset("t0") if dataset is None else dataset
    return fit_task(model, strategy or NoStrategy(model), dataset, config=config(**changes), **calls)
