"""Stopping, checkpoints and going on: a resumed run equals the straight one bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from clcore.engine.errors import StateError
from clcore.engine.loop import FitResult
from clcore.engine.memory import MemorySession
from clcore.engine.registry import STRATEGIES, build_strategy
from clcore.engine.state import load_state, save_state
from clcore.engine.strategy import Strategy, compose
from clcore.strategies.ewc_base import BaseEWC
from clcore.strategies.replay_experience import ExperienceReplay
from tests.clcore.fitting import fit
from tests.clcore.tiny import assert_close, differ, new_session, tiny_dataset, tiny_llama, trainable


def ewc_and_replay(model: nn.Module) -> Strategy:
    return compose([BaseEWC(model, ewc_lambda=20.0), ExperienceReplay(model, replay_frequency=1)])


def after_first_task(**changes: Any) -> tuple[nn.Module, MemorySession]:
    """Return a model and the memory session that a second task starts from, with EWC and replay state."""
    model, session = tiny_llama(dropout=changes.pop("dropout", 0.0)), new_session()
    fit(model, strategy=ewc_and_replay(model), memory=session, learning_rate=1e-2, **changes)
    return model, session.next_task(op_id="run/t1")


def second_task(model: nn.Module, session: MemorySession, **changes: Any) -> FitResult:
    dataset = tiny_dataset("t1", 10, shift=5)
    values: dict[str, Any] = {"num_steps": 6, "batch_size": 5, "micro_batch_size": 4, **changes}
    return fit(model, dataset, ewc_and_replay(model), memory=session, task_id="t1", **values)


@pytest.mark.parametrize("how", ["periodic_checkpoint", "stop_request"])
def test_resuming_from_files_equals_the_straight_run_bit_for_bit_with_ewc_and_replay(
    how: str, tmp_path: Path
) -> None:
    model, session = after_first_task(dropout=0.2)
    whole = second_task(model, session)
    straight, straight_memory = trainable(model), session.read("ewc")["importance"]

    model, session = after_first_task(dropout=0.2)
    states: list[dict[str, Any]] = []
    if how == "stop_request":
        answers = iter([False, False, False, True])
        stopped = second_task(model, session, should_stop=lambda: next(answers), on_checkpoint=states.append)
        assert stopped.is_stopped
        assert session.version == 1  # nothing was committed
    else:
        second_task(model, session, checkpoint_every_steps=3, on_checkpoint=states.append)
    assert [state["step"] for state in states] == [3]
    assert states[0]["strategy"]["experience_replay"]["owed_tokens"] != 0
    save_state(tmp_path, "training", states[0], generation="g")

    model, session = after_first_task(dropout=0.2)
    state = load_state(tmp_path, "training", generation="g")
    resumed_task = second_task(model, session, resume=state)
    assert_close(trainable(model), straight)
    for name in ("label_tokens", "total_tokens", "replay_tokens", "final_loss"):
        assert getattr(resumed_task, name) == getattr(whole, name), name
    assert whole.replay_tokens > 0
    assert resumed_task.train_s > state["train_s"] > 0
    assert resumed_task.strategy_s > state["strategy_s"] > 0
    resumed = session.read("ewc")["importance"]
    assert all((resumed[name] == value).all() for name, value in straight_memory.items())


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_half_trained_model_cannot_be_resumed_in(name: str) -> None:
    """A strategy would take what the task has done for what stood before it."""
    model = tiny_llama()
    states: list[dict[str, Any]] = []
    answers = iter([False, False, True])
    stop: dict[str, Any] = {"should_stop": lambda: next(answers), "on_checkpoint": states.append}
    fit(model, strategy=build_strategy(name, {}, model), **stop)
    with pytest.raises(StateError, match="resume with the model as it was before the task"):
        fit(model, strategy=build_strategy(name, {}, model), resume=states[0])
    fresh, reference = tiny_llama(), tiny_llama()
    fit(fresh, strategy=build_strategy(name, {}, fresh), resume=states[0])
    fit(reference, strategy=build_strategy(name, {}, reference))
    assert_close(trainable(fresh), trainable(reference))


def test_a_stop_before_the_first_step_can_be_resumed() -> None:
    model, reference = tiny_llama(), tiny_llama()
    fit(reference)
    states: list[dict[str, Any]] = []
    result = fit(model, should_stop=lambda: True, on_checkpoint=states.append)
    assert result.is_stopped
    assert [state["step"] for state in states] == [0]
    fit(model, resume=states[0])
    assert_close(trainable(model), trainable(reference))


def test_checkpoints_come_every_n_steps_but_not_after_the_last() -> None:
    states: list[dict[str, Any]] = []
    fit(tiny_llama(), num_steps=6, checkpoint_every_steps=2, on_checkpoint=states.append)
    assert [state["step"] for state in states] == [2, 4]


def test_a_checkpoint_is_a_copy_that_training_does_not_change() -> None:
    states: list[dict[str, Any]] = []
    model = tiny_llama()
    fit(model, num_steps=4, checkpoint_every_steps=2, on_checkpoint=states.append)
    moved = trainable(model)
    assert differ(states[0]["params"], moved)
    assert float(states[0]["optimizer"][0]["step"]) == 2


def test_a_finished_task_is_committed_once_and_the_same_operation_gives_the_same_version() -> None:
    session = new_session()
    model = tiny_llama()
    result = fit(model, strategy=ExperienceReplay(model), memory=session)
    assert result.memory_version == session.version == 1
    again = new_session(store=session.store)  # the same op_id, from version 0: the attempt is repeated
    model = tiny_llama()
    assert fit(model, strategy=ExperienceReplay(model), memory=again).memory_version == 1
