"""EWC on the change of weights: the low-rank forms against dense ones, and what must not matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from clcore.engine.errors import CompositionError, FisherError, StateError
from clcore.engine.loop import TrainConfig, fit_task
from clcore.engine.params import Params
from clcore.engine.registry import build_strategy
from clcore.engine.strategy import compose
from clcore.strategies import ewc_delta_w
from clcore.strategies.ewc_base import BaseEWC
from clcore.strategies.ewc_delta_w import DeltaW, lora_pairs
from clcore.strategies.ewc_online import OnlineEWC
from tests.clcore.tiny import (
    fill_b,
    mean_nll,
    new_session,
    tiny_dataset,
    tiny_gpt2,
    tiny_learner,
    tiny_llama,
    tiny_llama_base,
    tiny_stream,
)

TARGETS = ("q_proj", "k_proj", "v_proj", "down_proj")
LAMBDA = 3.0


def move(model: nn.Module, by: float = 0.05) -> nn.Module:
    """Shift every trainable parameter a little, each value differently."""
    torch.manual_seed(11)
    with torch.no_grad():
        for p in Params.of(model).values():
            p.add_(by * torch.randn_like(p))
    return model


def random_ewc(num_tasks: int, model: nn.Module) -> tuple[DeltaW, dict[str, Any]]:
    """Return a penalty on random Fishers, and all it was made of, independent of how it keeps them."""
    params, generator = Params.of(model), torch.Generator().manual_seed(num_tasks)
    tasks = [
        {
            pair.layer: (
                torch.rand(params[pair.b_name].shape[0], generator=generator) * 10**k,
                torch.rand(params[pair.a_name].shape[1], generator=generator),
            )
            for pair in lora_pairs(model, params)
        }
        for k in range(num_tasks)
    ]
    held = DeltaW.first(tasks[0], model, params, is_fresh=False)
    for fisher in tasks[1:]:
        move(model, 0.02)
        held.add(fisher, params)
    anchor = {name: p.detach().clone() for name, p in params.items()}
    return held, {"tasks": tasks, "pairs": lora_pairs(model, params), "anchor": anchor}


def dense_value(params: dict[str, Tensor], made_of: dict[str, Any]) -> Tensor:
    """sum_k a b^T o (dW - dW*)^2 with every matrix formed, in float64; params are float64 leaves."""
    total = torch.zeros((), dtype=torch.float64)
    for pair in made_of["pairs"]:
        change = pair.scale * params[pair.b_name] @ params[pair.a_name]
        if made_of["anchor"]:
            old = {name: value.double() for name, value in made_of["anchor"].items()}
            change = change - pair.scale * old[pair.b_name] @ old[pair.a_name]
        for fisher in made_of["tasks"]:
            a, b = fisher[pair.layer]
            total = total + (torch.outer(a.double(), b.double()) * change.square()).sum()
    return total


def assert_equals_dense(held: DeltaW, params: Params, made_of: dict[str, Any], rel: float = 1e-6) -> None:
    """Compare value and gradient, for LAMBDA / 2 times the value."""
    leaves = {name: p.detach().double().requires_grad_() for name, p in params.items()}
    dense = LAMBDA / 2 * dense_value(leaves, made_of)
    assert float(dense.detach()) > 0
    value = LAMBDA / 2 * held.value(params)
    assert float(value.detach()) == pytest.approx(float(dense.detach()), rel=rel)
    by_loss = torch.autograd.grad(value, list(params.values()))
    for p in params.values():
        p.grad = torch.ones_like(p)
    held.add_gradient(params, LAMBDA)
    expected = torch.autograd.grad(dense, list(leaves.values()))
    for (name, p), g, from_loss in zip(params.items(), expected, by_loss, strict=True):
        assert p.grad is not None
        assert float((from_loss - g).norm() / g.norm()) < 2 * rel, name
        # The ones that were there stay, at their own rounding.
        assert float((p.grad - 1 - g).norm()) < 2 * rel * float(g.norm()) + 1e-7 * p.numel() ** 0.5, name
        p.grad = None
    held.add_gradient(params, LAMBDA)
    for (name, p), g in zip(params.items(), expected, strict=True):
        assert p.grad is not None
        assert float((p.grad - g).norm() / g.norm()) < 2 * rel, name
        p.grad = None


@pytest.mark.parametrize("num_tasks", [1, 3])
def test_value_and_gradient_equal_the_dense_ones_with_the_latest_anchor_for_all_tasks(num_tasks: int) -> None:
    model = tiny_llama(with_b=True, targets=TARGETS)
    held, made_of = random_ewc(num_tasks, model)
    assert len({tuple(fisher[0].shape) for fisher in held.fisher.values()}) > 1  # several shapes
    assert_equals_dense(held, Params.of(move(model)), made_of)


def test_the_scale_of_lora_counts_squared() -> None:
    config = LoraConfig(r=4, lora_alpha=12, use_rslora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = fill_b(get_peft_model(tiny_llama_base(), config))  # type: ignore[arg-type]
    held, made_of = random_ewc(2, model)
    assert made_of["pairs"][0].scale == 12 / 2
    assert_equals_dense(held, Params.of(move(model)), made_of)


def test_the_gradient_stays_exact_close_to_the_anchor() -> None:
    model = tiny_llama(with_b=True, targets=TARGETS)
    held, made_of = random_ewc(2, model)
    assert float(held.value(Params.of(model)).detach()) == 0
    assert_equals_dense(held, Params.of(move(model, 1e-4)), made_of, rel=1e-3)


def test_working_layer_by_layer_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(with_b=True, targets=TARGETS)
    together, _ = random_ewc(2, model)
    monkeypatch.setattr(ewc_delta_w, "CHUNK_ELEMENTS", 1)
    apart = DeltaW(together.pairs, together.fisher, together.anchor)
    assert len(apart.stacks) == 8 > len(together.stacks) == 3
    params = Params.of(move(model))
    torch.testing.assert_close(apart.value(params), together.value(params))


@pytest.mark.parametrize("is_fresh", [False, True])
def test_another_basis_of_the_same_product_pays_the_same(is_fresh: bool) -> None:
    model, dataset = tiny_llama(with_b=True, targets=TARGETS), tiny_dataset("t0", 6)
    ewc, in_factors = BaseEWC(model, space="delta_w"), BaseEWC(model)
    ewc.adapter_is_fresh = is_fresh
    ewc.after_training("t0", dataset)
    in_factors.after_training("t0", dataset)
    params = Params.of(move(model))
    before, before_in_factors = float(ewc.penalty().detach()), float(in_factors.penalty().detach())
    torch.manual_seed(5)
    with torch.no_grad():
        for pair in lora_pairs(model, params):
            basis = torch.eye(4) + 0.3 * torch.randn(4, 4)
            params[pair.a_name].copy_(basis @ params[pair.a_name])
            params[pair.b_name].copy_(params[pair.b_name] @ torch.linalg.inv(basis))
    assert float(ewc.penalty().detach()) == pytest.approx(before, rel=1e-4)
    assert float(in_factors.penalty().detach()) > 1.5 * before_in_factors


def test_loss_form_and_gradient_form_agree_and_the_value_is_lambda_half() -> None:
    model = tiny_gpt2()
    ewc = BaseEWC(model, ewc_lambda=50.0, space="delta_w")
    ewc.after_training("t0", tiny_dataset("t0", 6))
    params = Params.of(move(model))
    assert isinstance(ewc.consolidated, DeltaW)
    assert float(ewc.penalty().detach()) == pytest.approx(25 * float(ewc.consolidated.value(params).detach()))
    by_loss = torch.autograd.grad(ewc.modify_loss(torch.zeros(()), model), list(params.values()))
    ewc.modify_gradients(params)
    for expected, p in zip(by_loss, params.values(), strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_a_and_b_are_means_over_rows_and_tokens_and_normalizing_makes_their_largest_product_1() -> None:
    model, dataset = tiny_llama(with_b=True, targets=TARGETS), tiny_dataset("t0", 10)
    raw = BaseEWC(model, normalize_fisher=False, space="delta_w")
    raw.after_training("t0", dataset)
    assert isinstance(raw.consolidated, DeltaW)
    twice = BaseEWC(model, normalize_fisher=False, space="delta_w")
    twice.after_training("t0", [row for row in dataset for _ in range(2)])  # means do not grow with rows
    assert isinstance(twice.consolidated, DeltaW)
    normal = BaseEWC(model, space="delta_w")
    normal.after_training("t0", dataset)
    assert isinstance(normal.consolidated, DeltaW)
    largest = max(float(a.max() * b.max()) for a, b in raw.consolidated.fisher.values())
    assert normal.metrics()["fisher_max"] == pytest.approx(largest)
    assert raw.metrics()["fisher_rows"] == 10
    for layer, (a, b) in raw.consolidated.fisher.items():
        torch.testing.assert_close(twice.consolidated.fisher[layer][0], a, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(twice.consolidated.fisher[layer][1], b, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(normal.consolidated.fisher[layer][0], a / largest)
        torch.testing.assert_close(normal.consolidated.fisher[layer][1], b)
    picture = raw.get_importance_visualization(top_k=2)
    means = {
        layer: float(torch.outer(a[0], b[0]).mean()) for layer, (a, b) in raw.consolidated.fisher.items()
    }
    assert picture == pytest.approx(dict(sorted(means.items(), key=lambda item: -item[1])[:2]))


def test_the_input_moment_is_of_unit_scale_after_a_norm() -> None:
    model = tiny_llama(with_b=True, targets=["q_proj"])
    ewc = BaseEWC(model, normalize_fisher=False, space="delta_w")
    ewc.after_training("t0", tiny_dataset("t0", 8))
    assert isinstance(ewc.consolidated, DeltaW)
    for _, b_TI in ewc.consolidated.fisher.values():
        assert float(b_TI.mean()) == pytest.approx(1.0, rel=0.05)  # RMSNorm with weight 1


def test_a_second_task_adds_a_fisher_and_moves_the_anchor_to_the_present() -> None:
    model = tiny_llama(with_b=True)
    ewc = BaseEWC(model, space="delta_w")
    ewc.after_training("t0", tiny_dataset("t0", 6))
    move(model)
    assert float(ewc.penalty().detach()) > 0
    ewc.after_training("t1", tiny_dataset("t1", 6, shift=5))
    assert float(ewc.penalty().detach()) == 0
    assert isinstance(ewc.consolidated, DeltaW)
    assert all(a.shape[0] == b.shape[0] == 2 for a, b in ewc.consolidated.fisher.values())


def test_old_fishers_fade_by_gamma() -> None:
    model = tiny_llama(with_b=True)
    plain, online = BaseEWC(model, space="delta_w"), OnlineEWC(model, online_gamma=0.3, space="delta_w")
    for strategy in (plain, online):
        for t in range(3):
            strategy.after_training(f"t{t}", tiny_dataset(f"t{t}", 6, shift=1 + t))
    assert isinstance(plain.consolidated, DeltaW)
    assert isinstance(online.consolidated, DeltaW)
    for layer, (a_TO, b_TI) in plain.consolidated.fisher.items():
        faded = a_TO * torch.tensor([0.09, 0.3, 1.0])[:, None]
        torch.testing.assert_close(online.consolidated.fisher[layer][0], faded)
        torch.testing.assert_close(online.consolidated.fisher[layer][1], b_TI)


def with_fresh_pair(r: int = 3) -> nn.Module:
    """Return a model with a frozen pair of an earlier task and a trainable one at work side by side."""
    model: Any = tiny_llama(with_b=True, targets=TARGETS)
    model.add_adapter("new", LoraConfig(r=r, lora_alpha=3 * r, target_modules=list(TARGETS)))
    model.base_model.set_adapter(["default", "new"])
    for name, p in model.named_parameters():
        p.requires_grad = ".new." in name
    found: nn.Module = model
    return found


def test_with_a_fresh_pair_per_task_only_its_own_product_counts_from_zero() -> None:
    model, dataset = with_fresh_pair(), tiny_dataset("t0", 6)
    assert all(".new." in name for name in Params.of(model))
    ewc = BaseEWC(model, space="delta_w")
    ewc.adapter_is_fresh = True
    ewc.before_training("t0")
    ewc.after_training("t0", dataset)
    ewc.after_training("t1", dataset)
    assert isinstance(ewc.consolidated, DeltaW)
    assert float(ewc.penalty().detach()) == 0  # B of the fresh pair is 0
    fill_b(model)
    params = Params.of(model)
    tasks = [{n: (a[t], b[t]) for n, (a, b) in ewc.consolidated.fisher.items()} for t in (0, 1)]
    pairs = lora_pairs(model, params)
    assert {pair.scale for pair in pairs} == {3.0}
    assert_equals_dense(ewc.consolidated, params, {"tasks": tasks, "pairs": pairs, "anchor": {}})


def test_a_fresh_pair_ignores_the_stored_anchor_and_its_shapes() -> None:
    old = tiny_llama(with_b=True, targets=TARGETS)
    first = BaseEWC(old, space="delta_w")
    first.after_training("t0", tiny_dataset("t0", 6))
    model = fill_b(with_fresh_pair(r=3))
    ewc = BaseEWC(model, space="delta_w")
    ewc.adapter_is_fresh = True
    ewc.bind(model, Params.of(model), new_session(store=first.memory.store, version=1))
    assert isinstance(ewc.consolidated, DeltaW)
    assert isinstance(first.consolidated, DeltaW)
    tasks = [{n: (a[0], b[0]) for n, (a, b) in first.consolidated.fisher.items()}]
    pairs = lora_pairs(model, Params.of(model))
    assert_equals_dense(ewc.consolidated, Params.of(model), {"tasks": tasks, "pairs": pairs, "anchor": {}})


def test_it_protects_beside_a_strategy_that_trains_a_fresh_pair_per_task() -> None:
    data, config = [dataset for _, dataset in tiny_stream()], TrainConfig(num_steps=40, learning_rate=1e-2)

    def forgotten(*names: str) -> float:
        model, session, losses = tiny_learner(), new_session(), []
        for t in range(2):
            params = {"ewc": {"space": "delta_w"}}
            parts = compose([build_strategy(name, params.get(name, {}), model) for name in names])
            fit_task(model, parts, data[t], task_id=f"t{t}", config=config, memory=session)
            session = session.next_task(op_id=f"run/t{t + 1}")
            losses.append(mean_nll(model, data[0]))
        return losses[1] - losses[0]

    assert forgotten("orthogonal_lora", "ewc") < forgotten("orthogonal_lora") / 2
    model = tiny_learner()
    parts = [build_strategy(name, {}, model) for name in ("orthogonal_lora", "ewc")]
    with pytest.raises(CompositionError, match="space='delta_w' works with it"):
        compose(parts)


def test_after_fresh_pairs_an_adapter_that_goes_on_is_anchored_where_it_starts() -> None:
    model = with_fresh_pair()
    fresh = BaseEWC(model, space="delta_w")
    fresh.adapter_is_fresh = True
    for task in ("t0", "t1"):
        fresh.after_training(task, tiny_dataset(task, 6))
    assert fresh.memory.read("ewc")["anchor"] == {}
    released = tiny_llama(with_b=True, targets=TARGETS)
    ewc = BaseEWC(released, space="delta_w")
    ewc.bind(released, Params.of(released), new_session(store=fresh.memory.store, version=2))
    assert float(ewc.penalty().detach()) == 0
    move(released)
    assert float(ewc.penalty().detach()) > 0


def test_a_new_object_reads_the_same_penalty_back_from_memory() -> None:
    model = tiny_llama(with_b=True, targets=TARGETS)
    ewc = BaseEWC(model, space="delta_w")
    ewc.after_training("t0", tiny_dataset("t0", 6))
    move(model)
    ewc.after_training("t1", tiny_dataset("t1", 6, shift=4))
    move(model)
    other = BaseEWC(model, space="delta_w")
    other.bind(model, Params.of(model), new_session(store=ewc.memory.store, version=2))
    torch.testing.assert_close(other.penalty(), ewc.penalty(), rtol=0, atol=0)
    assert float(other.penalty().detach()) > 0


def test_state_that_does_not_fit_is_refused() -> None:
    model = tiny_llama(with_b=True)
    ewc = BaseEWC(model, space="delta_w")
    ewc.after_training("t0", tiny_dataset("t0", 4))

    def bind(other: nn.Module, **changes: Any) -> None:
        strategy = BaseEWC(other, **changes)
        strategy.bind(other, Params.of(other), new_session(store=ewc.memory.store, version=1))

    with pytest.raises(StateError, match=r"lora_A.* has shape .* on one side only"):
        bind(tiny_llama(r=2), space="delta_w")
    with pytest.raises(StateError, match=r"k_proj' has shape \(16, 32\) on one side only"):
        bind(tiny_llama(targets=("q_proj", "k_proj", "v_proj")), space="delta_w")
    with pytest.raises(
        StateError, match="stored state is of space 'delta_w', this strategy has space='factors'"
    ):
        bind(model)


def test_a_zero_b_everywhere_is_no_obstacle_because_the_layers_weight_has_a_fisher() -> None:
    model = tiny_llama()
    ewc = BaseEWC(model, space="delta_w")
    ewc.after_training("t0", tiny_dataset("t0", 4))
    assert ewc.metrics()["modules_with_B_0"] == 4
    assert float(ewc.penalty(Params.of(fill_b(model))).detach()) > 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "lora_A"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["down_proj"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A"),
    ],
)
def test_anything_but_plain_lora_is_refused_before_training(changes: dict[str, Any], named: str) -> None:
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changes})
    model: Any = get_peft_model(tiny_llama_base(attention_bias=True), config)  # type: ignore[arg-type]
    with pytest.raises(FisherError, match=rf"needs plain LoRA .*{named}.* is something else"):
        BaseEWC(model, space="delta_w").before_training("t0")


def test_two_trainable_pairs_at_one_layer_are_refused() -> None:
    model = with_fresh_pair()
    for name, p in model.named_parameters():
        p.requires_grad = "lora_" in name
    with pytest.raises(FisherError, match=r"one trainable adapter per layer, .* has \['default', 'new'\]"):
        BaseEWC(model, space="delta_w").before_training("t0")


def test_only_the_space_of_factors_needs_the_same_adapter() -> None:
    model = tiny_llama()
    assert BaseEWC(model).config.needs_same_adapter
    assert not BaseEWC(model, space="delta_w").config.needs_same_adapter
    assert not OnlineEWC(model, space="delta_w").config.needs_same_adapter
