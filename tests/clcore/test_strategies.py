"""The contract that every row of the strategy table fulfils."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clcore.engine.loop import FitResult, TrainConfig, fit_task
from clcore.engine.memory import InProcessMemory, MemorySession
from clcore.engine.registry import STRATEGIES, build_strategy, config_class, strategy_class
from clcore.engine.state import as_arrays, load_state, save_state
from clcore.engine.strategy import Strategy
from tests.clcore.tiny import (
    assert_close,
    mean_nll,
    new_session,
    tiny_learner,
    tiny_llama,
    tiny_stream,
    trainable,
)
from tests.strategy_table import ROWS, StrategyRow

by_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
SHORT = TrainConfig(num_steps=6, learning_rate=1e-2, batch_size=5, micro_batch_size=3)


def build(row: StrategyRow, model: nn.Module) -> Strategy:
    return build_strategy(row.name, row.params, model)


def train(
    model: nn.Module,
    strategy: Strategy,
    session: MemorySession,
    task: int,
    config: TrainConfig = SHORT,
    **calls: Any,
) -> FitResult:
    dataset = tiny_stream()[task][1]
    return fit_task(model, strategy, dataset, task_id=f"t{task}", config=config, memory=session, **calls)


def after_first_task(row: StrategyRow) -> tuple[nn.Module, Strategy, MemorySession]:
    model, session = tiny_llama(), new_session()
    strategy = build(row, model)
    train(model, strategy, session, 0)
    return model, strategy, session.next_task(op_id="run/t1")


def test_every_strategy_of_the_registry_has_a_row_and_a_file_in_the_catalogue() -> None:
    assert {row.name for row in ROWS} == set(STRATEGIES)
    assert len({row.id for row in ROWS}) == len(ROWS)
    for name, target in STRATEGIES.items():
        module = target.partition(":")[0]
        assert module.startswith("clcore.strategies."), name
        assert importlib.util.find_spec(module) is not None, name
        assert strategy_class(name).name == name


@by_row
def test_parameters_of_the_row_and_of_the_class_exist(row: StrategyRow) -> None:
    known = {field.name for field in dataclasses.fields(config_class(row.name))}
    assert set(row.params) <= known
    config_class(row.name)()  # job defaults are valid


@by_row
def test_state_between_steps_survives_files_and_loads_weights_only(row: StrategyRow, tmp_path: Path) -> None:
    model, strategy, session = after_first_task(row)
    states: list[dict[str, Any]] = []
    config = dataclasses.replace(SHORT, checkpoint_every_steps=3)
    train(model, strategy, session, 1, config, on_checkpoint=states.append)
    state = states[0]["strategy"]
    save_state(tmp_path, "state", state, generation="g")
    torch.save(state, tmp_path / "state.pt")
    for loaded in (
        load_state(tmp_path, "state", generation="g"),
        torch.load(tmp_path / "state.pt", weights_only=True),
    ):
        fresh = build(row, tiny_llama())
        fresh.load_state_dict(loaded)
        np.testing.assert_equal(as_arrays(fresh.state_dict()), as_arrays(state))


@by_row
@pytest.mark.parametrize("how", ["checkpoint", "stop"])
def test_a_resumed_task_equals_the_straight_one_bit_for_bit(
    row: StrategyRow, how: str, tmp_path: Path
) -> None:
    model, strategy, session = after_first_task(row)
    states: list[dict[str, Any]] = []
    train(model, strategy, session, 1)
    straight = trainable(model)

    model, strategy, session = after_first_task(row)
    if how == "stop":
        answers = iter([False, False, True])
        train(model, strategy, session, 1, should_stop=lambda: next(answers), on_checkpoint=states.append)
    else:
        config = dataclasses.replace(SHORT, checkpoint_every_steps=2)
        train(model, strategy, session, 1, config, on_checkpoint=states.append)
    save_state(tmp_path, "training", states[0], generation="g")

    model, _, session = after_first_task(row)
    resume = load_state(tmp_path, "training", generation="g")
    train(model, build(row, model), session, 1, resume=resume)
    assert_close(trainable(model), straight)


@by_row
def test_a_new_object_per_task_trains_as_one_kept_over_all_tasks(row: StrategyRow) -> None:
    model, kept, session = after_first_task(row)
    train(model, kept, session, 1)
    expected = trainable(model)
    model, _, session = after_first_task(row)
    train(model, build(row, model), session, 1)
    assert_close(trainable(model), expected)


@by_row
def test_memory_survives_a_snapshot_between_tasks(row: StrategyRow, tmp_path: Path) -> None:
    model, strategy, session = after_first_task(row)
    train(model, strategy, session, 1)
    expected = trainable(model)
    model, _, session = after_first_task(row)
    session.store.snapshot(session.version, tmp_path)
    rows = {example["ref"]: example for _, dataset in tiny_stream() for example in dataset}
    store = InProcessMemory(load_row=rows.__getitem__)
    version = store.restore(tmp_path)
    train(model, build(row, model), new_session(store=store, version=version, op_id="run/t1"), 1)
    assert_close(trainable(model), expected)


@dataclasses.dataclass(frozen=True)
class Outcome:
    forgetting: float
    new_loss: float


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """Train every row on the two-task stream."""
    found = {}
    for row in ROWS:
        model, session = tiny_learner(), new_session()
        strategy = build(row, model)
        old = [dataset for _, dataset in tiny_stream()]
        config = TrainConfig(num_steps=60, learning_rate=1e-2)
        train(model, strategy, session, 0, config)
        learnt = mean_nll(model, old[0])
        train(model, strategy, session.next_task(op_id="run/t1"), 1, config)
        found[row.id] = Outcome(mean_nll(model, old[0]) - learnt, mean_nll(model, old[1]))
    return found


@by_row
def test_forgetting_is_below_the_rows_bound_and_below_none_while_the_new_task_is_learnt(
    row: StrategyRow, outcomes: dict[str, Outcome]
) -> None:
    outcome = outcomes[row.id]
    assert outcome.forgetting < row.max_forgetting
    assert outcome.new_loss < row.max_new_loss
    if row.name != "none":
        assert outcome.forgetting < outcomes["none"].forgetting * row.max_share_of_none


def test_without_a_strategy_the_stream_really_forgets(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["none"].forgetting > 0.8
