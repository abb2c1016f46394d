"""EWC: the penalty's numbers, its two forms, and the state it keeps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clcore.engine.errors import ConfigError, DataError, FisherError, StateError, StrategyError
from clcore.engine.loss import completion_nll
from clcore.engine.params import Params
from clcore.engine.tasks import Example, collate
from clcore.strategies.ewc_base import BaseEWC
from clcore.strategies.ewc_factors import Consolidated
from tests.clcore.fitting import fit
from tests.clcore.tiny import (
    assert_close,
    mean_nll,
    new_session,
    tiny_dataset,
    tiny_gpt2,
    tiny_llama,
    trainable,
)


def move(model: nn.Module, by: float = 0.05) -> nn.Module:
    """Shift every trainable parameter a little, each value differently."""
    torch.manual_seed(11)
    with torch.no_grad():
        for p in Params.of(model).values():
            p.add_(by * torch.randn_like(p))
    return model


def toy_ewc(lam: float, tasks: Iterable[tuple[Tensor, Tensor]]) -> tuple[nn.Linear, BaseEWC]:
    """Return a 2x2 model and an EWC that has consolidated (Fisher, theta*) pairs."""
    model = nn.Linear(2, 2, bias=False)
    ewc = BaseEWC(model, ewc_lambda=lam)
    for fisher, theta in tasks:
        if ewc.consolidated is None:
            ewc.consolidated = Consolidated({"weight": fisher.clone()}, {"weight": theta.clone()})
        else:
            ewc.consolidated.add({"weight": fisher}, {"weight": theta})
    return model, ewc


def test_the_penalty_is_lambda_over_2_times_the_weighted_squares() -> None:
    fisher, anchor = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    model, ewc = toy_ewc(0.5, [(fisher, anchor)])
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1.5], [1.0, -1.0]]))
    # 0.5/2 * (1*1^2 + 2*0.5^2 + 3*0^2 + 4*1^2) = 0.25 * 5.5 = 1.375
    torch.testing.assert_close(ewc.penalty(), torch.tensor(1.375))
    ewc.modify_gradients()
    # 0.5 * F * (theta - anchor)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.5, 0.5], [0.0, -2.0]]))


def test_a_gradient_that_is_there_is_added_to() -> None:
    model, ewc = toy_ewc(1.0, [(torch.ones(2, 2), torch.zeros(2, 2))])
    nn.init.ones_(model.weight)
    model.weight.grad = torch.full((2, 2), 10.0)
    ewc.modify_gradients()
    assert model.weight.grad.tolist() == [[11.0, 11.0], [11.0, 11.0]]


@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_many_tasks_collapse_exactly_in_value_and_gradient(num_tasks: int) -> None:
    torch.manual_seed(num_tasks)
    tasks = []
    for k in range(num_tasks):
        fisher = torch.rand(2, 2) * 10**k
        fisher[0, 0] = 0  # never important
        fisher[0, 1] *= k % 2  # important to some
        tasks.append((fisher, torch.randn(2, 2)))
    model, ewc = toy_ewc(3.0, tasks)
    brute = 3.0 / 2 * sum((f * (model.weight - theta) ** 2).sum() for f, theta in tasks)
    expected = torch.autograd.grad(brute, model.weight)[0]
    torch.testing.assert_close(ewc.penalty(), brute.detach(), rtol=1e-5, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(
        torch.autograd.grad(ewc.penalty(), model.weight)[0], expected, rtol=1e-5, atol=1e-5
    )
    ewc.modify_gradients()
    torch.testing.assert_close(model.weight.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def learnt() -> tuple[nn.Module, BaseEWC, list[Example]]:
    """A model with B other than 0, and an EWC that has seen one task on it; tests must not move the model."""
    model, dataset = tiny_llama(with_b=True), tiny_dataset("t0", 12)
    ewc = BaseEWC(model, ewc_lambda=50.0)
    ewc.before_training("t0")
    ewc.after_training("t0", dataset)
    return model, ewc, dataset


def test_there_is_no_penalty_before_the_first_task_ends() -> None:
    model = tiny_llama(with_b=True)
    ewc, loss = BaseEWC(model), torch.tensor(2.5)
    assert ewc.modify_loss(loss) is loss
    assert float(ewc.penalty()) == 0
    ewc.modify_gradients()
    assert all(p.grad is None for p in Params.of(model).values())
    assert ewc.get_importance_visualization() == {}


def test_the_penalty_is_zero_at_the_anchor_and_positive_elsewhere(learnt: Any) -> None:
    _, ewc, _ = learnt
    assert float(ewc.penalty().detach()) == 0
    elsewhere = Params.of(move(tiny_llama(with_b=True)))
    assert float(ewc.penalty(elsewhere).detach()) > 0


def test_the_gradient_form_equals_the_loss_form(learnt: Any) -> None:
    _, ewc, _ = learnt
    model = move(tiny_llama(with_b=True))
    loss = ewc.modify_loss(torch.zeros(()), model)
    by_loss = torch.autograd.grad(loss, list(Params.of(model).values()))
    ewc.modify_gradients(Params.of(model))
    for expected, p in zip(by_loss, Params.of(model).values(), strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-6, atol=1e-9)


def test_the_importance_is_the_mean_squared_gradient_of_single_rows() -> None:
    model, dataset = tiny_llama(with_b=True).eval(), tiny_dataset("t0", 10)
    ewc = BaseEWC(model, normalize_fisher=False)
    ewc.after_training("t0", dataset)
    params = Params.of(model)
    mean = {name: torch.zeros_like(p) for name, p in params.items()}
    for row in dataset:
        nll = completion_nll(model, collate([row], 0))[0].sum()
        for name, g in zip(params, torch.autograd.grad(nll, list(params.values())), strict=True):
            mean[name] += g.square() / len(dataset)
    assert ewc.consolidated is not None
    for name, value in mean.items():
        torch.testing.assert_close(ewc.consolidated.importance[name], value, rtol=1e-4, atol=1e-7)
    assert ewc.metrics()["fisher_rows"] == 10
    assert ewc.metrics()["fisher_max"] == pytest.approx(max(float(v.max()) for v in mean.values()), rel=1e-4)


def test_normalizing_divides_each_task_by_its_largest_value_over_the_whole_model() -> None:
    model, dataset = tiny_llama(with_b=True), tiny_dataset("t0", 6)
    raw, normal = BaseEWC(model, normalize_fisher=False), BaseEWC(model)
    raw.after_training("t0", dataset)
    normal.after_training("t0", dataset)
    assert raw.consolidated is not None
    assert normal.consolidated is not None
    largest = max(float(f.max()) for f in raw.consolidated.importance.values())
    for name, f in raw.consolidated.importance.items():
        torch.testing.assert_close(normal.consolidated.importance[name], f / largest)
    normal.after_training("t1", tiny_dataset("t1", 6, shift=4))
    assert 1 < max(float(f.max()) for f in normal.consolidated.importance.values()) <= 2


def test_only_fisher_sample_size_rows_are_used_and_they_depend_on_the_seed_alone() -> None:
    model, dataset = tiny_llama(with_b=True), tiny_dataset("t0", 12)

    def importance(seed: int) -> Tensor:
        ewc = BaseEWC(model, fisher_sample_size=5)
        ewc.memory = new_session(seed=seed)
        ewc.after_training("t0", dataset)
        assert ewc.metrics()["fisher_rows"] == 5
        assert ewc.consolidated is not None
        return next(iter(ewc.consolidated.importance.values()))

    assert torch.equal(importance(0), importance(0))
    assert not torch.equal(importance(0), importance(1))


def train_by_hand(
    model: nn.Module, ewc: BaseEWC, dataset: list[Example], *, attach: bool
) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(Params.of(model).values(), lr=0.05)
    if attach:
        ewc.attach(optimizer)
    for start in range(0, 12, 4):
        optimizer.zero_grad()
        nll, labels = completion_nll(model, collate(dataset[start : start + 4], 0))
        ewc.modify_loss(nll.sum() / labels.sum()).backward()
        optimizer.step()
    return trainable(model)


def test_attach_gives_the_same_training_as_modify_loss() -> None:
    results = []
    for attach in (False, True):
        model = tiny_llama(with_b=True)
        ewc = BaseEWC(model, ewc_lambda=20.0)
        ewc.after_training("t0", tiny_dataset("t0", 12))
        start = trainable(model)
        results.append(train_by_hand(model, ewc, tiny_dataset("t1", 12, shift=5), attach=attach))
        assert any(not torch.equal(start[name], results[-1][name]) for name in start)
    free = tiny_llama(with_b=True)
    unprotected = train_by_hand(free, BaseEWC(free), tiny_dataset("t1", 12, shift=5), attach=False)
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=1e-6)
    assert any(not torch.allclose(unprotected[n], v, rtol=0, atol=1e-5) for n, v in results[0].items())


def test_in_fit_task_the_penalty_counts_once_per_step_for_any_number_of_micro_batches() -> None:
    first, second = tiny_dataset("t0", 6), tiny_dataset("t1", 6, shift=5)
    reference = tiny_llama(with_b=True)
    by_hand = BaseEWC(reference, ewc_lambda=500.0)
    by_hand.after_training("t0", first)
    optimizer = torch.optim.AdamW(Params.of(reference).values(), lr=1e-3, weight_decay=0.0)
    for _ in range(4):
        optimizer.zero_grad()
        by_hand.modify_loss(reference(**collate(second, 0)).loss).backward()
        nn.utils.clip_grad_norm_(Params.of(reference).values(), 0.05)  # the penalty is clipped too
        optimizer.step()

    model = tiny_llama(with_b=True)
    alone = BaseEWC(model, ewc_lambda=500.0)
    alone.after_training("t0", first)
    session = new_session(store=alone.memory.store, version=1, op_id="run/t1")
    changes: dict[str, Any] = {
        "num_steps": 4,
        "micro_batch_size": 2,
        "schedule": "constant",
        "max_grad_norm": 0.05,
    }
    fit(model, second, BaseEWC(model, ewc_lambda=500.0), memory=session, task_id="t1", **changes)
    assert_close(trainable(model), trainable(reference), atol=1e-5)


def test_attach_is_refused_inside_fit_task() -> None:
    model = tiny_llama()
    ewc = BaseEWC(model)
    ewc.bind(model, Params.of(model), new_session())
    with pytest.raises(StrategyError, match="driven by fit_task"):
        ewc.attach(torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_new_object_reads_the_same_penalty_back_from_memory(learnt: Any) -> None:
    _, ewc, _ = learnt
    model = move(tiny_llama(with_b=True))
    other = BaseEWC(model, ewc_lambda=50.0)
    other.bind(model, Params.of(model), new_session(store=ewc.memory.store, version=1))
    torch.testing.assert_close(other.penalty(), ewc.penalty(Params.of(model)), rtol=0, atol=0)
    assert float(other.penalty().detach()) > 0


def test_state_of_an_adapter_with_another_rank_is_refused(learnt: Any) -> None:
    _, ewc, _ = learnt
    model = tiny_llama(r=2)
    other = BaseEWC(model)
    with pytest.raises(StateError, match=r"does not fit the adapter: .*lora_A.* has shape"):
        other.bind(model, Params.of(model), new_session(store=ewc.memory.store, version=1))


def test_forgetting_is_the_first_score_minus_the_present_one() -> None:
    scores = iter([0.9, 0.7, 0.95, 0.4])
    ewc = BaseEWC(tiny_llama())

    def ask(task: str) -> dict[str, float]:
        return ewc.compute_forgetting(task, [], lambda _model, _data: next(scores))

    assert ask("t0") == {"first": 0.9, "now": 0.9, "forgetting": 0.0}
    assert ask("t0") == pytest.approx({"first": 0.9, "now": 0.7, "forgetting": 0.2})
    assert ask("t0") == pytest.approx({"first": 0.9, "now": 0.95, "forgetting": -0.05})
    assert ask("t1") == {"first": 0.4, "now": 0.4, "forgetting": 0.0}


def test_without_eval_fn_the_score_is_minus_the_mean_loss() -> None:
    model, dataset = tiny_llama(with_b=True), tiny_dataset("t0", 5)
    assert BaseEWC(model).compute_forgetting("t0", dataset)["now"] == pytest.approx(
        -mean_nll(model, dataset), rel=1e-5
    )


def test_the_importance_picture_holds_the_top_means_largest_first(learnt: Any) -> None:
    _, ewc, _ = learnt
    picture = ewc.get_importance_visualization(top_k=3)
    means = {name: float(f.mean()) for name, f in ewc.consolidated.importance.items()}
    assert list(picture.values()) == sorted(means.values(), reverse=True)[:3]
    assert all(means[name] == value for name, value in picture.items())


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"ewc_lambda": -1.0}, "ewc_lambda .* got -1.0"),
        ({"ewc_lambda": float("nan")}, "ewc_lambda .* got nan"),
        ({"ewc_lambda": float("inf")}, "ewc_lambda .* got inf"),
        ({"fisher_sample_size": 0}, "fisher_sample_size must be at least 1, got 0"),
        ({"fisher_estimation_method": "exact"}, "must be 'empirical' or 'sample', got 'exact'"),
        ({"space": "weights"}, "space must be 'factors' or 'delta_w', got 'weights'"),
    ],
)
def test_a_bad_parameter_is_refused_with_its_value(params: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        BaseEWC(tiny_llama(), **params)


@pytest.mark.parametrize("space", ["factors", "delta_w"])
def test_parameters_in_bfloat16_get_the_same_pull(space: str) -> None:
    model = tiny_llama(with_b=True)
    ewc = BaseEWC(model, ewc_lambda=50.0, space=space)
    ewc.after_training("t0", tiny_dataset("t0", 6))
    move(model).bfloat16()
    half = Params.of(model)
    full = {name: nn.Parameter(p.detach().float()) for name, p in half.items()}
    ewc.modify_gradients(half)
    ewc.modify_gradients(Params(full))
    for name, p in half.items():
        assert p.grad is not None
        assert p.grad.dtype == torch.bfloat16
        expected = full[name].grad
        assert expected is not None
        torch.testing.assert_close(p.grad.float(), expected, rtol=1e-2, atol=1e-9)


def test_a_sampled_fisher_depends_on_the_seed_and_the_row_but_not_on_how_rows_are_batched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, dataset = tiny_llama(with_b=True), tiny_dataset("t0", 9)

    def importance(seed: int, method: str = "sample") -> Tensor:
        ewc = BaseEWC(model, fisher_estimation_method=method)
        ewc.memory = new_session(seed=seed)
        ewc.after_training("t0", dataset)
        assert isinstance(ewc.consolidated, Consolidated)
        return torch.cat([f.flatten() for f in ewc.consolidated.importance.values()])

    first = importance(0)
    assert torch.equal(first, importance(0))
    assert not torch.allclose(first, importance(1), rtol=1e-2)
    assert not torch.allclose(first, importance(0, "empirical"), rtol=1e-2)
    monkeypatch.setattr("clcore.strategies.ewc_base.FISHER_BATCH_ROWS", 2)
    torch.testing.assert_close(importance(0), first, rtol=1e-4, atol=1e-6)


def test_an_adapter_that_cannot_be_protected_is_refused_before_training() -> None:
    model = tiny_llama()
    next(p for n, p in model.named_parameters() if n.endswith("norm.weight")).requires_grad = True
    with pytest.raises(FisherError, match=r"norm\.weight' is in neither"):
        BaseEWC(model).before_training("t0")


def test_ending_a_task_needs_rows_and_a_trained_adapter() -> None:
    with pytest.raises(ConfigError, match=r"needs train_dataset in after_training\('t0'\)"):
        BaseEWC(tiny_llama(with_b=True)).after_training("t0")
    with pytest.raises(DataError, match="no rows"):
        BaseEWC(tiny_llama(with_b=True)).after_training("t0", [])
    with pytest.raises(FisherError, match="every LoRA B is 0"):
        BaseEWC(tiny_llama()).after_training("t0", tiny_dataset("t0", 2))


def test_modules_whose_b_is_still_0_are_counted() -> None:
    model = tiny_llama(with_b=True)
    nn.init.zeros_(next(p for name, p in model.named_parameters() if "lora_B" in name))
    ewc = BaseEWC(model)
    ewc.after_training("t0", tiny_dataset("t0", 2))
    assert ewc.metrics()["modules_with_B_0"] == 1


def test_it_works_on_conv1d_targets() -> None:
    model = tiny_gpt2()
    ewc = BaseEWC(model)
    ewc.after_training("t0", tiny_dataset("t0", 4))
    assert float(ewc.penalty(Params.of(move(model))).detach()) > 0
