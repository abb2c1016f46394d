"""Synaptic Intelligence: what the path integral holds, and what the penalty makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clcore.engine.errors import CompositionError, ConfigError, StateError, StrategyError
from clcore.engine.loss import completion_nll
from clcore.engine.params import Params
from clcore.engine.registry import check_composition, make_config
from clcore.engine.strategy import OBSERVES, PROJECTS, Strategy, compose
from clcore.engine.tasks import collate
from clcore.strategies.ewc_base import BaseEWC
from clcore.strategies.ewc_synaptic import SynapticIntelligence
from tests.clcore.fitting import fit
from tests.clcore.tiny import assert_close, mean_nll, new_session, tiny_dataset, tiny_llama


def toy(**params: Any) -> tuple[nn.Linear, SynapticIntelligence, torch.optim.Optimizer]:
    """Return theta = (1, 2), its strategy attached to SGD with rate 0.1."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    si = SynapticIntelligence(model, **params)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    si.attach(optimizer)
    return model, si, optimizer


def step(model: nn.Linear, optimizer: torch.optim.Optimizer, *gradient: float) -> None:
    model.weight.grad = torch.tensor([gradient])
    optimizer.step()


def empty_step(model: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
    """Step without a gradient: nothing moves and nothing is gained, but the strategy has seen a step."""
    model.weight.grad = None
    optimizer.step()


def after_two_steps(**params: Any) -> tuple[nn.Linear, SynapticIntelligence, torch.optim.Optimizer]:
    model, si, optimizer = toy(**params)
    si.before_training("t0")
    step(model, optimizer, 1.0, -2.0)  # moves by (-0.1, 0.2): omega = (0.1, 0.4)
    step(model, optimizer, 2.0, 1.0)  # moves by (-0.2, -0.1): omega = (0.1, 0.4) + (0.4, 0.1)
    return model, si, optimizer


def test_two_steps_of_two_parameters_give_the_numbers_on_paper() -> None:
    model, si, _ = after_two_steps(si_lambda=2.0, xi=0.01, normalize_importance=False)
    torch.testing.assert_close(si.omega["weight"], torch.tensor([[0.5, 0.5]]))
    si.after_training("t0")
    # moved by (-0.3, 0.1): Omega = (0.5 / (0.09 + 0.01), 0.5 / (0.01 + 0.01))
    torch.testing.assert_close(si.importance["weight"], torch.tensor([[5.0, 25.0]]))
    torch.testing.assert_close(si.anchor["weight"], torch.tensor([[0.7, 2.1]]))
    assert si.penalty().item() == 0
    with torch.no_grad():
        model.weight.add_(torch.tensor([[0.1, -0.2]]))
    # 2 * (5 * 0.1^2 + 25 * 0.2^2) = 2.1, without 1/2
    torch.testing.assert_close(si.penalty(), torch.tensor(2.1))
    model.weight.grad = None
    si.modify_gradients()
    # 2 * 2 * Omega * (0.1, -0.2)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[2.0, -20.0]]))


def test_normalised_importance_is_divided_by_its_largest_value_when_used_and_stored_raw() -> None:
    model, si, _ = after_two_steps(si_lambda=2.0, xi=0.01)
    si.after_training("t0")
    torch.testing.assert_close(si.importance["weight"], torch.tensor([[5.0, 25.0]]))
    with torch.no_grad():
        model.weight.add_(torch.tensor([[0.1, -0.2]]))
    # 2 * (5/25 * 0.1^2 + 1 * 0.2^2)
    torch.testing.assert_close(si.penalty(), torch.tensor(0.084))


def test_a_second_task_adds_its_own_path_only_and_importance_never_falls_below_0() -> None:
    model, si, optimizer = after_two_steps(si_lambda=2.0, xi=0.01, normalize_importance=False)
    si.after_training("t0")
    si.before_training("t1")
    empty_step(model, optimizer)
    torch.testing.assert_close(si.omega["weight"], torch.zeros(1, 2))
    before = {"weight": model.weight.detach().clone()}
    model.weight.grad = torch.tensor([[1.0, -1.0]])
    si.modify_gradients()
    with torch.no_grad():
        model.weight.add_(torch.tensor([[0.2, 0.3]]))  # up the slope on the first, down on the second
    si.modify_update(si.params, before)
    torch.testing.assert_close(si.omega["weight"], torch.tensor([[-0.2, 0.3]]))
    si.after_training("t1")
    # relu(5 - 0.2 / (0.04 + 0.01)), 25 + 0.3 / (0.09 + 0.01)
    torch.testing.assert_close(si.importance["weight"], torch.tensor([[1.0, 28.0]]))
    empty_step(model, optimizer)
    before = {"weight": model.weight.detach().clone()}
    model.weight.grad = torch.tensor([[9.0, 0.0]])
    si.modify_gradients()
    with torch.no_grad():
        model.weight.add_(torch.tensor([[0.2, 0.0]]))
    si.modify_update(si.params, before)
    si.after_training("t2")
    assert float(si.importance["weight"][0, 0]) == 0  # relu(1 - 1.8 / 0.05)


def test_the_penaltys_gradient_is_autograds_and_stays_out_of_the_path_integral() -> None:
    model, si, _ = after_two_steps(si_lambda=2.0, xi=0.01)
    si.after_training("t0")
    with torch.no_grad():
        model.weight.add_(torch.tensor([[0.1, -0.2]]))
    (expected,) = torch.autograd.grad(si.penalty(), [model.weight])
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    before = si.params.copies()
    si.modify_gradients()
    torch.testing.assert_close(model.weight.grad, torch.tensor([[3.0, 4.0]]) + expected)
    with torch.no_grad():
        model.weight.add_(torch.tensor([[-1.0, 1.0]]))
    si.modify_update(si.params, before)
    torch.testing.assert_close(si.omega["weight"], torch.tensor([[3.0, -4.0]]))  # of the loss's (3, 4) alone


def test_under_small_steps_the_path_integral_is_the_loss_drop() -> None:
    model, dataset = tiny_llama(with_b=True), tiny_dataset("t0")
    si = SynapticIntelligence(model)
    optimizer = torch.optim.SGD(Params.of(model).values(), lr=0.05)
    si.attach(optimizer)
    start = mean_nll(model, dataset)
    for _ in range(25):
        optimizer.zero_grad()
        nll, labels = completion_nll(model, collate(dataset, 0))
        si.modify_loss(nll.sum() / labels.sum()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    drop = start - mean_nll(model, dataset)
    si.after_training("t0")
    assert drop > 0.05
    assert si.metrics()["path_integral"] == pytest.approx(drop, rel=0.01)
    assert all(bool((omega >= 0).all()) for omega in si.importance.values())


class Recorder(Strategy):
    """Sums -g * step by itself, from the gradients at the end of backward and from the final parameters."""

    gradient_order = OBSERVES
    edits_update = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.sums = {name: torch.zeros_like(p) for name, p in self.params.items()}

    def modify_gradients(self, params: Params | None = None) -> None:
        self.gradients = {n: p.grad.clone() for n, p in (params or self.params).items() if p.grad is not None}

    def modify_update(self, params: Params, before: Mapping[str, Tensor]) -> None:
        for name, p in params.items():
            self.sums[name] -= self.gradients[name] * (p.detach() - before[name])


class Halve(Strategy):
    """Takes back half of every step."""

    gradient_order = PROJECTS
    edits_update = True

    def modify_update(self, params: Params, before: Mapping[str, Tensor]) -> None:
        for name, p in params.items():
            p.add_(before[name] - p, alpha=0.5)


@pytest.mark.parametrize("reverse", [False, True], ids=["si_first", "si_last"])
def test_beside_a_penalty_a_projection_adam_and_clipping_the_loss_gradient_meets_the_applied_step(
    reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clcore.engine.registry.check_composition", lambda _: None)
    model, session = tiny_llama(), new_session()
    for task in range(2):
        si, recorder = SynapticIntelligence(model, si_lambda=5.0, xi=1e-3), Recorder(model)
        parts = [si, BaseEWC(model, ewc_lambda=50.0), Halve(model)]
        parts = [recorder, *reversed(parts)] if reverse else [*parts, recorder]
        staged: dict[str, Tensor] = {}
        monkeypatch.setattr(si, "after_training", lambda *_, si=si, staged=staged: staged.update(si.omega))
        dataset = tiny_dataset(f"t{task}", shift=1 + 4 * task)
        fit(model, dataset, compose(parts), task_id=f"t{task}", memory=session, max_grad_norm=0.05)
        assert_close(staged, recorder.sums, atol=1e-7)
        assert max(float(omega.abs().max()) for omega in staged.values()) > 1e-5
        SynapticIntelligence.after_training(si, f"t{task}")
        session.commit()
        session = session.next_task(op_id=f"run/t{task + 1}")


def test_only_three_copies_of_the_parameters_stay_between_steps_in_float32() -> None:
    model, si, optimizer = after_two_steps()
    model.to(torch.bfloat16)
    si = SynapticIntelligence(model)
    for task in ("t0", "t1"):
        model.weight.grad = torch.ones_like(model.weight)
        si.modify_gradients()
        si.modify_update(si.params, {"weight": model.weight.detach() + 0.25})
        if task == "t0":
            si.attach(optimizer)
            empty_step(model, optimizer)
            si.after_training(task)
    held = [v for d in vars(si).values() if isinstance(d, dict) for v in d.values() if isinstance(v, Tensor)]
    assert len(held) == 3
    assert {tensor.dtype for tensor in held} == {torch.float32}
    assert si._loss_gradients == []
    torch.testing.assert_close(si.omega["weight"], torch.full((1, 2), 0.25))


def test_a_parameter_without_gradient_gains_nothing() -> None:
    model, si, optimizer = toy()
    step(model, optimizer, 1.0, 1.0)
    model.weight.grad = None
    optimizer.step()
    torch.testing.assert_close(si.omega["weight"], torch.full((1, 2), 0.1))


def test_without_attach_the_end_of_a_task_alone_is_refused() -> None:
    with pytest.raises(StrategyError, match="'si' saw no optimizer step; call attach"):
        SynapticIntelligence(nn.Linear(2, 1)).after_training("t0")


def test_state_of_another_adapter_is_refused() -> None:
    model, other, session = tiny_llama(r=4), tiny_llama(r=2), new_session()
    fit(model, strategy=SynapticIntelligence(model), memory=session)
    with pytest.raises(StateError, match=r"stored importance does not fit the adapter: .*lora_A"):
        fit(other, strategy=SynapticIntelligence(other), memory=session.next_task(op_id="x"))


def test_it_is_refused_beside_a_strategy_that_trains_a_new_pair_per_task() -> None:
    config = make_config("si", {})
    assert config.needs_same_adapter
    for owner in ("orthogonal_lora", "adaptive_svd"):
        with pytest.raises(CompositionError, match=f"'{owner}' trains a new pair .* 'si'"):
            check_composition([("si", config), (owner, make_config(owner, {}))])


def test_bad_parameters_are_refused_with_their_value() -> None:
    for params, said in [
        ({"si_lambda": -1.0}, "si_lambda must be .* at least 0, got -1.0"),
        ({"si_lambda": float("nan")}, "si_lambda .* got nan"),
        ({"xi": 0.0}, "xi must be a positive finite number, got 0.0"),
    ]:
        with pytest.raises(ConfigError, match=said):
            SynapticIntelligence(nn.Linear(2, 1), **params)  # type: ignore[arg-type]
