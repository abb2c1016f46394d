"""The side-by-side measurement: it must train as fit_task does and count bytes once."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.arms import Arm
from benchmarks.overhead import candidate_of_arm, candidate_of_peer, measure
from benchmarks.overhead_report import table, targets_of
from benchmarks.peers import PEERS, PREVIOUS, ReleasedOLoRA
from benchmarks.side_by_side import StandingTraining, held_bytes, race
from benchmarks.small_llama import QUICK, lora_model
from benchmarks.stats import Ratio
from clcore.engine.errors import DataError
from clcore.engine.strategy import Strategy
from clcore.strategies.none import NoStrategy
from tests.clcore.fitting import config, fit
from tests.clcore.tiny import assert_close, new_session, tiny_dataset, tiny_llama, trainable

FAST = dataclasses.replace(QUICK, pairs_at={1: 2, 3: 2})


def standing(model: Any, strategy: Strategy, dataset: Any, num_steps: int) -> StandingTraining:
    return StandingTraining(
        model, strategy, dataset, task_id="t0", config=config(num_steps=num_steps), memory=new_session()
    )


def test_two_trainings_side_by_side_end_as_each_alone() -> None:
    alone = tiny_llama(0)
    fit(alone, num_steps=4)
    models = [tiny_llama(0), tiny_llama(0)]
    plain, other = (standing(m, NoStrategy(m), tiny_dataset("t0"), 4) for m in models)
    steps = race(plain, other, num_pairs=3, num_warmups=1)
    assert plain.finish().num_steps == other.finish().num_steps == 4
    assert len(steps) == 3
    for model in models:
        assert_close(trainable(model), trainable(alone))


def test_who_steps_first_changes_with_every_pair() -> None:
    order: list[str] = []

    class Fake:
        def __init__(self, name: str, tokens: int) -> None:
            self.name, self.tokens = name, tokens

        def step(self) -> tuple[float, int]:
            order.append(self.name)
            return float(len(order)), self.tokens

    plain: Any = Fake("plain", 8)
    other: Any = Fake("other", 12)
    steps = race(plain, other, num_pairs=2, num_warmups=1)
    assert order == ["plain", "other", "other", "plain", "plain", "other"]
    assert [(s.plain_s, s.strategy_s, s.plain_tokens, s.strategy_tokens) for s in steps] == [
        (4.0, 3.0, 8, 12),
        (5.0, 6.0, 8, 12),
    ]


def test_an_error_of_the_training_reaches_who_steps_it() -> None:
    model = tiny_llama(0)
    with pytest.raises(DataError, match="has no rows"):
        standing(model, NoStrategy(model), [], 1).step()


def test_hooks_that_run_once_per_task_are_timed_apart_from_steps() -> None:
    class Slow(NoStrategy):
        def before_training(self, task_id: str, train_dataset: Any = None) -> Any:  # noqa: ARG002
            time.sleep(0.02)
            return train_dataset

        def after_training(self, task_id: str, train_dataset: Any = None) -> None:  # noqa: ARG002
            time.sleep(0.03)

        def modify_gradients(self, params: Any = None) -> None:  # noqa: ARG002
            time.sleep(10 * (self.model is None))

    model = tiny_llama(0)
    training = standing(model, Slow(model), tiny_dataset("t0"), 1)
    training.step()
    assert training.once_s["before_s"] >= 0.02
    assert training.once_s["after_s"] == 0
    training.finish()
    assert training.once_s["after_s"] >= 0.03


def test_bytes_count_each_buffer_once_and_the_model_never() -> None:
    model = tiny_llama(0)
    strategy = NoStrategy(model)
    assert held_bytes(strategy, model) == 0
    ten = torch.zeros(10)
    strategy.state = {
        "a": ten,
        "view": ten[:3],
        "list": [np.zeros(4)],
        "of_model": list(strategy.params.values()),
    }  # type: ignore[attr-defined]
    assert held_bytes(strategy, model) == 10 * 4 + 4 * 8


def test_ewc_holds_importance_and_anchor_and_replay_costs_tokens() -> None:
    ewc = measure(candidate_of_arm(Arm("ewc"), FAST), FAST)
    assert 2.0 <= ewc["copies"] <= 3.0
    assert ewc["once_per_task"]["after_s"] > 0
    replay = measure(candidate_of_arm(Arm("experience_replay"), FAST), FAST)
    assert replay["steps"]["3"]["token_ratio"] > 1.2
    assert replay["steps"]["3"]["num_pairs"] == 2
    assert replay["held_bytes"] > 0
    assert ewc["model_bytes"] == replay["model_bytes"] == 0


def test_frozen_pairs_and_base_weights_that_stand_aside_count_as_held() -> None:
    owner = measure(candidate_of_arm(Arm("orthogonal_lora"), FAST), FAST)
    base = sum(p.nbytes for n, p in lora_model(FAST).named_parameters() if "base_layer" in n)
    assert owner["model_bytes"] == 3 * owner["trainable_bytes"] + base
    assert owner["copies"] * owner["trainable_bytes"] == owner["model_bytes"] + owner["held_bytes"]


def test_the_released_form_of_o_lora_sums_overlaps_within_modules() -> None:
    model = lora_model(QUICK)
    strategy = ReleasedOLoRA(model, 2)
    named = dict(model.named_parameters())
    expected = sum(
        (p @ named[name.replace(PREVIOUS, "lora_A.default.weight")].T).abs().sum()
        for name, p in named.items()
        if PREVIOUS in name
    )
    assert sum(PREVIOUS in name for name in named) == 2 * QUICK.layers
    loss = strategy.modify_loss(torch.tensor(1.0))
    torch.testing.assert_close(loss, 1.0 + 0.5 * torch.as_tensor(expected))


def test_every_peer_runs_or_says_why_not() -> None:
    for peer in PEERS:
        missing = peer.missing()
        if missing is not None:
            assert missing.startswith("not installed: ")
        else:
            assert measure(candidate_of_peer(peer, FAST), FAST)["steps"]["3"]["ratio"] > 0


def row(what: str, ratios: dict[str, float], tokens: float = 1.0, copies: float = 2.0) -> dict[str, Any]:
    steps = {k: {"ratio": r, "token_ratio": tokens, "ratio_per_token": r / tokens} for k, r in ratios.items()}
    return {
        "what": what,
        "config": {},
        "steps": steps,
        "copies": copies,
        "once_per_task": {"after_in_passes": 1},
    }


def test_targets_take_the_last_count_and_replay_per_token() -> None:
    rows = [
        row("ewc", {"1": 1.2, "15": 1.04}, copies=3.5),
        row("ewc:space=delta_w", {"1": 1.0, "15": 1.06}, copies=9.0),
        row("experience_replay", {"1": 1.4, "15": 1.5}, tokens=1.5),
        row("orthogonal_lora", {"1": 1.0, "15": 1.08}),
    ]
    found = {t["what"]: t["ok"] for t in targets_of(rows, Ratio(1.2, 1.1, 1.3, 5))}
    assert found == {
        "Fisher pass, in plain forward and backward passes over the same rows": True,
        "ewc: step with 15 earlier tasks, in plain steps": True,
        "ewc: end of a task, in plain forward and backward passes over its rows": True,
        "ewc:space=delta_w: end of a task, in plain forward and backward passes over its rows": True,
        "ewc: bytes held, in copies of the trainable parameters": False,
        "ewc:space=delta_w: step with 15 earlier tasks, in plain steps": False,
        "experience_replay: step with 15 earlier tasks, in plain steps per token": True,
        "orthogonal_lora: step with 15 earlier tasks, in plain steps": True,
        "orthogonal_lora: ratio with 15 earlier tasks to that with 1": False,
    }
    missing = {"what": "peer", "steps": {}, "not_measured": "not installed: x"}
    lines = table([*rows, missing]).splitlines()
    assert len(lines) == 2 + len(rows) + 1
    assert len({line.count("|") for line in lines}) == 1
