"""Interference: the estimate against a loss whose change is known, and a trial that leaves no trace."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from clcore.engine.errors import ConfigError, DataError, StateError
from clcore.engine.loop import TrainConfig, fit_task
from clcore.engine.loss import completion_nll
from clcore.engine.params import Params
from clcore.engine.tasks import collate
from clcore.evaluation import predict_interference, record_task
from clcore.evaluation.interference import trial_rows, trial_steps
from clcore.evaluation.task_vectors import label_loss
from clcore.strategies.none import NoStrategy
from tests.clcore.tiny import (
    assert_close,
    differ,
    new_session,
    tiny_dataset,
    tiny_learner,
    tiny_llama,
    tiny_stream,
    trainable,
)


@pytest.fixture(scope="module")
def learnt() -> tuple[Any, list[Any]]:
    """A model that has learnt the first of two tasks, and the rows of both."""
    rows = [rows for _, rows in tiny_stream(2)]
    model = tiny_learner()
    config = TrainConfig(num_steps=20, learning_rate=1e-2)
    fit_task(model, NoStrategy(model), rows[0], task_id="t0", config=config, memory=new_session())
    return model, rows


def test_a_record_holds_the_gradient_and_the_squared_gradients_row_by_row() -> None:
    model, rows = tiny_llama(with_b=True), tiny_dataset("t", 5)
    record = record_task(model, rows, batch_size=2)
    params = Params.of(model)
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    squares = {name: torch.zeros_like(p) for name, p in params.items()}
    num_labels = 0
    for row in rows:  # one backward pass per row
        nll, labels = completion_nll(model, collate([row], 0))
        for name, g in zip(params, torch.autograd.grad(nll.sum(), list(params.values())), strict=True):
            total[name] += g
            squares[name] += g.square()
        num_labels += int(labels.sum())
    assert_close(dict(record.gradient), {name: g / num_labels for name, g in total.items()}, atol=1e-6)
    assert_close(dict(record.fisher), {name: f / num_labels for name, f in squares.items()}, atol=1e-6)
    assert_close(dict(record.anchor), trainable(model))
    assert len(record.rows) == 5
    assert record_task(model, rows, keep_rows=False).rows == ()


def test_the_lookahead_is_the_rise_of_the_loss_that_the_trial_steps_cause(learnt: Any) -> None:
    model, (old, new) = learnt
    found = predict_interference(model, new, {"t0": old}, learning_rate=1e-2, num_steps=3)["t0"]
    before = label_loss(model, old)
    with trial_steps(model, trial_rows(new, 3 * 8, seed=0), learning_rate=1e-2):
        rise = label_loss(model, old) - before
    assert found.predicted == found.lookahead == pytest.approx(rise)
    assert rise > 0


def test_for_a_small_step_the_taylor_terms_give_the_rise_of_the_loss() -> None:
    model, old = tiny_llama(with_b=True), tiny_dataset("old")
    found = predict_interference(
        model, tiny_dataset("new", shift=5), {"old": old}, learning_rate=1e-4, num_steps=1
    )["old"]
    assert found.lookahead is not None
    assert found.taylor == pytest.approx(found.lookahead, rel=0.05)
    assert abs(found.second_order) < 0.1 * abs(found.first_order)


def test_every_estimate_against_its_formula(learnt: Any) -> None:
    model, (old, new) = learnt
    record = record_task(model, old)
    moved = {name: value + 0.01 for name, value in record.anchor.items()}  # the record is from other weights
    record = dataclasses.replace(record, anchor=moved, rows=())
    found = predict_interference(model, new, {"t0": record}, learning_rate=1e-2, num_steps=2)["t0"]
    rows = trial_rows(new, 16, seed=0)
    with trial_steps(model, rows, learning_rate=1e-2) as update:
        pass
    d, f = (torch.cat([x[name].flatten() for name in x]).double() for x in (update, record.fisher))
    g_old = torch.cat([(record.gradient[n] - 0.01 * record.fisher[n]).flatten() for n in update]).double()
    new_record = record_task(model, rows)
    g_new = torch.cat([new_record.gradient[name].flatten() for name in update]).double()
    assert found.lookahead is None
    assert found.first_order == pytest.approx(float(g_old @ d), rel=1e-4)
    assert found.second_order == pytest.approx(float(d @ (f * d)) / 2, rel=1e-4)
    assert found.predicted == found.taylor == found.first_order + found.second_order
    plain = g_old @ g_new / (g_old.norm() * g_new.norm())
    assert found.gradient_conflict == pytest.approx(-float(plain), abs=1e-5)
    weighted = g_old @ (f * g_new) / ((g_old @ (f * g_old)) * (g_new @ (f * g_new))).sqrt()
    assert found.fisher_conflict == pytest.approx(-float(weighted), abs=1e-5)
    assert found.subspace_overlap is not None
    assert 0 < found.subspace_overlap < 1


def test_training_on_a_task_itself_does_not_hurt_it_and_the_worst_comes_first() -> None:
    streams = [rows for _, rows in tiny_stream(2)]
    model = tiny_learner()
    config = TrainConfig(num_steps=20, learning_rate=1e-2)
    both = [row for rows in streams for row in rows]
    fit_task(model, NoStrategy(model), both, task_id="both", config=config, memory=new_session())
    old = {"same": streams[1], "other": streams[0]}
    found = predict_interference(model, streams[1], old, learning_rate=1e-2)
    assert list(found) == ["other", "same"]
    assert found["same"].predicted < 0 < found["other"].predicted
    same = found["same"]
    assert same.gradient_conflict == pytest.approx(-1.0, abs=1e-4)
    assert same.fisher_conflict == pytest.approx(-1.0, abs=1e-4)
    assert same.subspace_overlap == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_a_trial_leaves_weights_gradients_modes_and_generators_as_they_were(fails: bool) -> None:
    model, rows = tiny_llama(with_b=True, dropout=0.3), tiny_dataset("t")
    model.train()
    params = Params.of(model)
    first = next(iter(params.values()))
    first.grad = torch.full_like(first, 2.0)
    before, state = trainable(model), torch.get_rng_state()

    def trial() -> None:
        with trial_steps(model, rows, learning_rate=1e-2):
            assert differ(trainable(model), before)
            if fails:
                raise RuntimeError("inside")

    if fails:
        with pytest.raises(RuntimeError, match="inside"):
            trial()
    else:
        trial()
        predict_interference(model, rows, {"t": rows}, learning_rate=1e-2, num_steps=1)
    assert_close(trainable(model), before)
    assert torch.equal(first.grad, torch.full_like(first, 2.0))
    assert all(p.grad is None for p in list(params.values())[1:])
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_trial_rows_come_once_each_before_any_comes_twice() -> None:
    rows = tiny_dataset("t", 5)
    refs = [row["ref"] for row in trial_rows(rows, 12, seed=1)]
    assert sorted(refs[:5]) == sorted(refs[5:10]) == sorted(row["ref"] for row in rows)
    assert len(refs) == 12
    assert refs != [row["ref"] for row in trial_rows(rows, 12, seed=2)]


def test_wrong_calls_are_named() -> None:
    model, rows = tiny_llama(with_b=True), tiny_dataset("t", 4)
    with pytest.raises(DataError, match="no earlier task"):
        predict_interference(model, rows, {}, learning_rate=1e-2)
    with pytest.raises(DataError, match="the new task has no rows"):
        predict_interference(model, [], {"t": rows}, learning_rate=1e-2)
    with pytest.raises(ConfigError, match="got 0 and 8"):
        predict_interference(model, rows, {"t": rows}, learning_rate=1e-2, num_steps=0)
    with pytest.raises(ConfigError, match="got -1"):
        predict_interference(model, rows, {"t": rows}, learning_rate=-1)
    other = record_task(tiny_llama(r=2, with_b=True), rows)
    with pytest.raises(StateError, match="task 't' was made for another adapter"):
        predict_interference(model, rows, {"t": other}, learning_rate=1e-2)
