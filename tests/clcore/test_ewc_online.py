"""Online EWC: fading importance and the latest anchor."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from clcore.engine.errors import ConfigError
from clcore.engine.params import Params
from clcore.engine.registry import build_strategy
from clcore.strategies.ewc_base import BaseEWC
from clcore.strategies.ewc_factors import Consolidated
from clcore.strategies.ewc_online import OnlineEWC, OnlineEWCConfig
from tests.clcore.test_ewc import move
from tests.clcore.tiny import assert_close, new_session, tiny_dataset, tiny_llama, trainable


def test_importance_fades_and_the_anchor_jumps_as_worked_out_by_hand() -> None:
    model = nn.Linear(2, 1, bias=False)
    first, second = torch.tensor([[4.0, 0.0]]), torch.tensor([[1.0, 3.0]])
    held = Consolidated({"weight": first}, {"weight": torch.tensor([[9.0, 9.0]])})
    held.add({"weight": second}, {"weight": torch.tensor([[1.0, -1.0]])}, 0.5)
    assert held.importance["weight"].tolist() == [[3.0, 3.0]]  # 0.5 * 4 + 1, 0.5 * 0 + 3
    ewc = OnlineEWC(model, ewc_lambda=2.0)
    ewc.consolidated = held
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 1.0]]))
    # 2/2 * (3 * (2-1)^2 + 3 * (1+1)^2) = 15; gradient 2 * 3 * (1, 2)
    assert float(ewc.penalty().detach()) == 15
    ewc.modify_gradients()
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[6.0, 12.0]]


def importance_of(ewc: BaseEWC) -> dict[str, Tensor]:
    assert isinstance(ewc.consolidated, Consolidated)
    return ewc.consolidated.importance


def test_three_tasks_weigh_gamma_squared_gamma_and_1_and_are_anchored_at_the_last() -> None:
    model, gamma = tiny_llama(with_b=True), 0.25
    online = OnlineEWC(model, online_gamma=gamma)
    expected = {name: torch.zeros_like(p) for name, p in Params.of(model).items()}
    for t in range(3):
        dataset = tiny_dataset(f"t{t}", 6, shift=1 + t)
        alone = BaseEWC(move(model))
        alone.after_training(f"t{t}", dataset)
        for name, fisher in importance_of(alone).items():
            expected[name] = gamma * expected[name] + fisher
        online.after_training(f"t{t}", dataset)
    for name, value in expected.items():
        torch.testing.assert_close(importance_of(online)[name], value)
    assert isinstance(online.consolidated, Consolidated)
    assert_close(online.consolidated.anchor, trainable(model))
    assert online.consolidated.offset == 0
    assert float(online.penalty().detach()) == 0


def test_with_gamma_0_only_the_latest_task_counts() -> None:
    model, last = tiny_llama(with_b=True), tiny_dataset("t1", 6, shift=4)
    online, alone = OnlineEWC(model, online_gamma=0.0), BaseEWC(model)
    online.after_training("t0", tiny_dataset("t0", 6))
    online.after_training("t1", last)
    alone.after_training("t1", last)
    assert_close(importance_of(online), importance_of(alone))


def test_a_new_object_reads_the_same_penalty_back_from_its_own_memory() -> None:
    model = tiny_llama(with_b=True)
    online = OnlineEWC(model)
    online.after_training("t0", tiny_dataset("t0", 6))
    online.after_training("t1", tiny_dataset("t1", 6, shift=4))
    move(model)
    other, plain = OnlineEWC(model), BaseEWC(model)
    for strategy in (other, plain):
        strategy.bind(model, Params.of(model), new_session(store=online.memory.store, version=2))
    torch.testing.assert_close(other.penalty(), online.penalty(), rtol=0, atol=0)
    assert float(other.penalty().detach()) > 0
    assert plain.consolidated is None


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_gamma_outside_0_and_1_is_refused(gamma: float) -> None:
    with pytest.raises(ConfigError, match=rf"online_gamma must be in \[0, 1\], got {gamma}"):
        OnlineEWC(tiny_llama(), online_gamma=gamma)


def test_every_parameter_reaches_the_configuration() -> None:
    given = OnlineEWCConfig(
        ewc_lambda=3.0,
        fisher_sample_size=7,
        fisher_estimation_method="sample",
        normalize_fisher=False,
        space="delta_w",
        online_gamma=0.5,
    )
    built = build_strategy("ewc_online", dataclasses.asdict(given), tiny_llama())
    assert isinstance(built, OnlineEWC)
    assert built.config == given
    assert built.online_gamma == 0.5
    assert OnlineEWC(tiny_llama()).config == OnlineEWCConfig(ewc_lambda=5000.0, fisher_sample_size=200)
