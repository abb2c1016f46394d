"""Orthogonal LoRA: its penalty and capacity; what owners of the adapter compose with and refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from clcore.engine.adapters import lora_layers, parameter_names, read_pair
from clcore.engine.errors import CompositionError, ConfigError, StrategyError
from clcore.engine.loop import TrainConfig, fit_task
from clcore.engine.params import Params
from clcore.engine.registry import build_strategy, check_composition, make_config
from clcore.engine.strategy import compose
from clcore.strategies.orthogonal_base import OrthogonalLoRA
from tests.clcore.owners import after_one_task, share_inside, two_tasks
from tests.clcore.tiny import (
    assert_close,
    new_session,
    tiny_dataset,
    tiny_gpt2,
    tiny_llama,
    tiny_llama_base,
    tiny_stream,
    trainable,
)

# ------------------------------------------------------------------------------------------------ penalty


def test_the_penalty_is_the_squared_overlap_and_its_gradient_that_of_autograd() -> None:
    model, session = after_one_task()
    strategy = OrthogonalLoRA(model, orthogonal_constraint_lambda=0.7, use_gradient_projection=False)
    strategy.prepare_model(model, "t1", session)
    strategy.bind(model, params := Params.of(model), session)
    strategy.before_training("t1")
    basis = session.read("orthogonal_lora")["basis"]
    wanted = 0.0
    for name in lora_layers(model):
        a = params[parameter_names(name)[0]].detach().double()
        wanted += 0.7 * float((a @ torch.tensor(basis[name]).double().T).square().sum())
    assert wanted > 0.1
    assert float(strategy.penalty().detach()) == pytest.approx(wanted, rel=1e-5)

    names = [name for name in params if "lora_A" in name]
    gradients = torch.autograd.grad(strategy.penalty(), [params[name] for name in names])
    for p in params.values():
        p.grad = torch.ones_like(p)
    params[names[0]].grad = None
    strategy.modify_gradients(params)
    for name, gradient in zip(names, gradients, strict=True):
        start = 0.0 if name == names[0] else 1.0
        torch.testing.assert_close(params[name].grad, start + gradient, rtol=1e-4, atol=1e-6)
    assert all(bool((p.grad == 1).all()) for name, p in params.items() if "lora_B" in name)


def test_the_penalty_pulls_rows_apart_and_its_strength_counts() -> None:
    overlaps = []
    for strength in (0.0, 0.01, 1.0):
        params = {
            "use_gradient_projection": False,
            "use_loss_regularization": True,
            "orthogonal_constraint_lambda": strength,
        }
        overlaps.append(two_tasks("lora", "orthogonal_lora", params, num_steps=60).metrics[1]["overlap_max"])
    assert overlaps[0] > 1.2 * overlaps[1] > 1.2 * overlaps[2]


def test_the_penalty_does_not_grow_with_accumulation() -> None:
    adapters = []
    for size in (6, 2):
        params = {"use_gradient_projection": False, "use_loss_regularization": True}
        changes: dict[str, Any] = {"num_steps": 8, "batch_size": 6, "micro_batch_size": size}
        adapters.append(trainable(two_tasks("lora", "orthogonal_lora", params, **changes).model))
    assert_close(adapters[0], adapters[1], atol=1e-5)


def test_the_penalty_is_zero_in_the_first_task() -> None:
    strategy = OrthogonalLoRA(tiny_llama(with_b=True))
    strategy.before_training("t0")
    assert float(strategy.penalty()) == 0
    loss = torch.ones((), requires_grad=True)
    assert float(strategy.modify_loss(loss).detach()) == 1


# ------------------------------------------------------------------------------------ capacity, composition


def test_capacity_grows_by_the_rank_per_task_until_no_direction_is_left() -> None:
    model, session = tiny_llama(r=12), new_session()
    config = TrainConfig(num_steps=2, learning_rate=1e-2)
    used = []
    for i in range(3):
        strategy = build_strategy("orthogonal_lora", {}, model)
        result = fit_task(
            model, strategy, tiny_dataset(f"t{i}", 8), task_id=f"t{i}", config=config, memory=session
        )
        used.append(result.metrics["capacity_used_max"])
        assert result.metrics["capacity_used_mean"] == used[-1]
        basis = session.read("orthogonal_lora")["basis"]
        assert {len(q) for q in basis.values()} == {min(12 * (i + 1), 32)}
        for q in basis.values():
            np.testing.assert_allclose(q @ q.T, np.eye(len(q)), atol=1e-6)
        session = session.next_task(op_id=f"run/t{i + 1}")
    assert used == [12 / 32, 24 / 32, 1.0]
    with pytest.raises(
        StrategyError, match=r"no direction is left .* 'base_model.*q_proj': all 32 are protected"
    ):
        fit_task(
            model,
            build_strategy("orthogonal_lora", {}, model),
            tiny_dataset("t3", 8),
            task_id="t3",
            config=config,
            memory=session,
        )


@pytest.mark.parametrize("owner", ["orthogonal_lora", "adaptive_svd"])
def test_owners_refuse_strategies_that_need_the_factors_of_the_task_before(owner: str) -> None:
    model = tiny_llama()
    for other in ("ewc", "ewc_online", "si"):
        with pytest.raises(CompositionError, match=f"'{owner}' trains a new pair .* so '{other}'"):
            check_composition([(owner, make_config(owner, {})), (other, make_config(other, {}))])
        with pytest.raises(CompositionError, match=f"'{owner}' trains a new pair .* so '{other}'"):
            compose([build_strategy(owner, {}, model), build_strategy(other, {}, model)])
    two = ["adaptive_svd", "orthogonal_lora"]
    with pytest.raises(CompositionError, match="only one strategy may own the adapter"):
        compose([build_strategy(name, {}, model) for name in two])
    with pytest.raises(CompositionError, match="only one strategy may own the adapter"):
        check_composition([(name, None) for name in two])


@pytest.mark.parametrize("owner", ["orthogonal_lora", "adaptive_svd"])
def test_owners_work_beside_ewc_on_delta_w_and_replay_and_stay_projected(owner: str) -> None:
    model, session = tiny_llama(), new_session()
    config = TrainConfig(num_steps=10, learning_rate=1e-2)
    kept = build_strategy(owner, {}, model)
    for i, (_, dataset) in enumerate(tiny_stream()):
        parts = [
            build_strategy("ewc", {"space": "delta_w"}, model),
            kept,
            build_strategy("experience_replay", {}, model),
        ]
        result = fit_task(model, compose(parts), dataset, task_id=f"t{i}", config=config, memory=session)
        assert result.replay_tokens * i > 0 or i == 0
        state = session.read(owner)
        session = session.next_task(op_id=f"run/t{i + 1}")
        if i == 0:
            first = state["basis" if owner == "orthogonal_lora" else "inputs"]
    for name, layer in lora_layers(model).items():
        assert share_inside(read_pair(layer)[0][4:], first[name]) < 1e-5


@pytest.mark.parametrize("name", ["orthogonal_lora", "adaptive_svd"])
def test_a_bias_beside_the_pairs_is_refused_before_anything_trains(name: str) -> None:
    """It would change what earlier tasks compute, and nothing would keep it from doing so."""
    with pytest.raises(StrategyError, match="bias='lora_only' is not supported here"):
        build_strategy(name, {}, tiny_gpt2(bias="lora_only"))


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(StrategyError, match="a PEFT model is needed"):
        OrthogonalLoRA(tiny_llama_base())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"orthogonal_constraint_lambda": -1.0}, "at least 0, got -1.0"),
        ({"orthogonal_constraint_lambda": float("nan")}, "finite number of at least 0, got nan"),
        ({"orthogonal_projection_alpha": 1.5}, r"in \[0, 1\], got 1.5"),
        ({"orthogonal_projection_alpha": -0.1}, r"in \[0, 1\], got -0.1"),
    ],
)
def test_bad_parameters_are_named(params: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config("orthogonal_lora", params)
