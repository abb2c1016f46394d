"""Strategies in a loop of one's own: what is misused is refused, not ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, get_type_hints

import pytest
import torch
from torch import nn

from clcore.engine.errors import ConfigError, StateError, StrategyError
from clcore.engine.loss import completion_nll
from clcore.engine.params import Params
from clcore.engine.registry import STRATEGIES, build_strategy, config_class, strategy_class
from clcore.engine.strategy import Strategy
from clcore.engine.tasks import collate
from clcore.strategies.ewc_base import BaseEWC
from clcore.strategies.replay_prioritized import PrioritizedExperienceReplay
from tests.clcore.fitting import fit
from tests.clcore.tiny import mean_nll, new_session, tiny_dataset, tiny_llama

every = pytest.mark.parametrize("name", STRATEGIES)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(Params.of(model).values(), lr=1e-2)


def step(model: nn.Module, strategy: Strategy, optimizer: torch.optim.Optimizer, dataset: Any) -> None:
    optimizer.zero_grad()
    nll, labels = completion_nll(model, collate(dataset, 0))
    strategy.modify_loss(nll.sum() / labels.sum()).backward()
    optimizer.step()


@every
def test_a_model_without_a_trainable_parameter_is_refused(name: str) -> None:
    model = tiny_llama().requires_grad_(False)
    with pytest.raises(StrategyError, match=f"{name!r} has nothing to work on"):
        build_strategy(name, {}, model)


@pytest.mark.parametrize(
    ("name", "parameter"),
    [(name, field.name) for name in STRATEGIES for field in dataclasses.fields(config_class(name))],
)
def test_an_argument_of_the_wrong_type_is_refused_by_name(name: str, parameter: str) -> None:
    kind = get_type_hints(config_class(name))[parameter]
    wrong: Any = {bool: "no", int: True, float: "much", str: 3}[kind]
    with pytest.raises(ConfigError, match=f"{parameter} must be .*, got {wrong!r}"):
        strategy_class(name)(tiny_llama(), **{parameter: wrong})


@every
def test_an_optimizer_of_another_model_is_refused_and_the_same_one_twice(name: str) -> None:
    model = tiny_llama()
    strategy = build_strategy(name, {}, model)
    strategy.before_training("t0", tiny_dataset("t0"))
    with pytest.raises(StrategyError, match=r"the optimizer does not hold '.*lora_A"):
        strategy.attach(adamw(tiny_llama()))
    optimizer = adamw(model)
    strategy.attach(optimizer)
    with pytest.raises(StrategyError, match=f"{name!r} is attached to this optimizer already"):
        strategy.attach(optimizer)


@every
def test_unknown_state_is_refused(name: str) -> None:
    with pytest.raises(StateError, match=f"{name!r} keeps no 'bogus' between steps"):
        build_strategy(name, {}, tiny_llama()).load_state_dict({"bogus": 1})


def test_a_new_optimizer_takes_the_hooks_of_the_one_before() -> None:
    model, calls = tiny_llama(), []

    class Watch(Strategy):
        name = "watch"

        def modify_gradients(self, params: Params | None = None) -> None:  # noqa: ARG002
            calls.append(1)

    strategy, dataset = Watch(model), tiny_dataset("t0")
    old, new = adamw(model), adamw(model)
    strategy.attach(old).attach(new)
    step(model, strategy, old, dataset)
    assert calls == []
    step(model, strategy, new, dataset)
    assert calls == [1]


def test_a_step_with_a_closure_is_refused_because_its_gradients_come_too_late() -> None:
    model = tiny_llama()
    optimizer = adamw(model)
    BaseEWC(model).attach(optimizer)
    for arguments in ((lambda: 0.0,), ()):
        with pytest.raises(StrategyError, match="without a closure"):
            optimizer.step(*arguments, **({} if arguments else {"closure": lambda: 0.0}))


def test_a_penalty_that_no_optimizer_applied_is_noticed() -> None:
    model, dataset = tiny_llama(with_b=True), tiny_dataset("t0")
    ewc = BaseEWC(model)
    first, second = adamw(model), adamw(model)
    ewc.attach(first)
    step(model, ewc, first, dataset)
    ewc.after_training("t0", dataset)
    step(model, ewc, second, dataset)  # attached to the first one still: no penalty
    with pytest.raises(StrategyError, match="saw no step of the optimizer it is attached to"):
        ewc.after_training("t1", dataset)


@pytest.mark.parametrize("space", ["factors", "delta_w"])
def test_a_task_counts_once_in_ewc(space: str) -> None:
    model, dataset = tiny_llama(with_b=True), tiny_dataset("t0")
    ewc = BaseEWC(model, space=space)
    for _ in range(2):  # the same task may be trained again later
        ewc.before_training("t0")
        ewc.after_training("t0", dataset)
        with pytest.raises(StrategyError, match=r"after_training\('t0'\) was called twice"):
            ewc.after_training("t0", dataset)


def one_row_tasks() -> Iterator[tuple[str, Any]]:
    for i in range(2):
        yield f"t{i}", tiny_dataset(f"t{i}", shift=1 + i)[:1]


@every
def test_tasks_of_one_row_train_in_the_loop(name: str) -> None:
    model, session = tiny_llama(), new_session()
    for task_id, dataset in one_row_tasks():
        before = mean_nll(model, dataset)
        fit(model, dataset, build_strategy(name, {}, model), task_id=task_id, memory=session, batch_size=1)
        session = session.next_task(op_id=f"run/{task_id}")
        assert mean_nll(model, dataset) < before


def test_prioritized_replay_alone_draws_nothing_where_the_share_rounds_to_no_row() -> None:
    model = tiny_llama()
    replay = PrioritizedExperienceReplay(model)
    for task_id, dataset in one_row_tasks():
        mixed = replay.before_training(task_id, dataset)
        assert len(mixed) == 1
        step(model, replay, adamw(model), list(mixed))
        replay.after_training(task_id, dataset)
