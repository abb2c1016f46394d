"""Fresh pairs per task and their projection, shown with orthogonal LoRA; in fit_task and alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clcore.engine.adapters import has_frozen_pairs, lora_layers, read_pair
from clcore.engine.errors import StrategyError
from clcore.engine.loop import StepReport, TrainConfig, fit_task
from clcore.engine.loss import completion_nll
from clcore.engine.params import Params
from clcore.engine.registry import build_strategy
from clcore.engine.tasks import Example, collate
from clcore.strategies.fresh_pair import FreshPairStrategy
from clcore.strategies.orthogonal_base import OrthogonalLoRA
from tests.clcore.owners import after_one_task, logits, share_inside, two_tasks
from tests.clcore.tiny import (
    assert_close,
    new_session,
    tiny_dataset,
    tiny_llama,
    tiny_stream,
    trainable,
)

# -------------------------------------------------------------------------------------------- fresh pairs


@pytest.mark.parametrize("kind", ["lora", "lora_gpt2"])
def test_the_new_rows_stay_orthogonal_to_the_old_ones_through_200_adamw_steps(kind: str) -> None:
    done = two_tasks(kind, "orthogonal_lora", {})
    for name, layer in lora_layers(done.model).items():
        a, _ = read_pair(layer)
        assert a.shape[0] == 2 * len(done.state["basis"][name])
        assert share_inside(a[4:], done.state["basis"][name]) < 1e-5
        old, new = a[:4].double(), a[4:].double()
        assert float((new @ old.T).norm() / (new.norm() * old.norm())) < 1e-5
    assert done.metrics[1]["overlap_max"] < 1e-5


def test_without_the_projection_of_updates_the_rows_do_not_stay_orthogonal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FreshPairStrategy, "modify_update", lambda *_: None)
    done = two_tasks("lora", "orthogonal_lora", {}, num_steps=50)
    assert done.metrics[1]["overlap_max"] > 1e-2


def test_half_the_projection_leaves_more_overlap_than_all_and_less_than_none() -> None:
    overlaps = [
        two_tasks("lora", "orthogonal_lora", {"orthogonal_projection_alpha": alpha}, num_steps=40).metrics[1][
            "overlap_max"
        ]
        for alpha in (1.0, 0.5, 0.0)
    ]
    assert overlaps[0] < 1e-5 < 1e-2 < overlaps[1] < 0.8 * overlaps[2]


def test_earlier_pairs_are_bit_equal_after_the_next_task() -> None:
    model, session = after_one_task()
    first = trainable(model)
    strategy = OrthogonalLoRA(model)
    config = TrainConfig(num_steps=20, learning_rate=1e-2, weight_decay=0.1)
    fit_task(model, strategy, tiny_stream()[1][1], task_id="t1", config=config, memory=session)
    for name, value in trainable(model).items():
        kept = value[:4] if "lora_A" in name else value[:, :4]
        assert torch.equal(kept, first[name])
        assert value.numel() == 2 * first[name].numel()
    assert not has_frozen_pairs(model)


def test_a_task_starts_as_the_function_that_the_one_before_left() -> None:
    model, session = after_one_task()
    model.eval()
    start = logits(model)
    strategy = OrthogonalLoRA(model)
    strategy.prepare_model(model, "t1", session)
    strategy.bind(model, Params.of(model), session)
    strategy.before_training("t1", tiny_stream()[1][1])
    torch.testing.assert_close(logits(model), start, rtol=0, atol=1e-6)
    for name, p in Params.of(model).items():
        assert p.shape[0 if "lora_A" in name else 1] == 4
        assert bool(p.any()) == ("lora_A" in name)
    assert max(strategy.get_orthogonality_visualization().values()) < 1e-6  # A starts outside


def test_the_fresh_pair_depends_on_seed_and_task_and_has_the_scale_of_a_new_one() -> None:
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    for seed, task in [(0, "t1"), (0, "t1"), (0, "t2"), (1, "t1")]:
        model, session = after_one_task()
        session.seed = seed
        torch.manual_seed(len(found))
        OrthogonalLoRA(model).prepare_model(model, task, session)
        if (seed, task) in found:
            assert_close(trainable(model), found[seed, task])
        found[seed, task] = trainable(model)
    name = next(iter(found[0, "t1"]))
    assert not torch.equal(found[0, "t1"][name], found[0, "t2"][name])
    assert not torch.equal(found[0, "t1"][name], found[1, "t1"][name])
    values = torch.cat([x.flatten() for n, x in found[0, "t1"].items() if "lora_A" in n])
    assert 0.9 / 32**0.5 < float(values.abs().max()) <= 1 / 32**0.5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_while_a_task_trains_the_frozen_pairs_are_in_the_base_weights(precision: str) -> None:
    """Not in bf16, where the sum would lose what they hold."""
    model, session = after_one_task()
    layer = next(iter(lora_layers(model).values()))
    base: Any = layer.get_base_layer()
    original, held = base.weight, base.weight.detach().clone()
    a, b = (x.clone() for x in read_pair(layer))
    seen: list[Tensor] = []
    fit_task(
        model,
        OrthogonalLoRA(model),
        tiny_stream()[1][1],
        task_id="t1",
        config=TrainConfig(num_steps=2, learning_rate=1e-2, precision=precision),
        memory=session,
        on_step=lambda _: seen.append(base.weight.detach()),
    )
    wanted = held + layer.scaling["default"] * (b @ a) if precision == "fp32" else held
    for weight in seen:
        torch.testing.assert_close(weight, wanted, rtol=0, atol=1e-7)
    assert not torch.equal(wanted, held) or precision == "bf16"
    assert len(seen) == 2
    assert base.weight is original
    assert torch.equal(original, held)


def test_a_first_task_that_starts_from_a_trained_pair_freezes_it() -> None:
    model, session = tiny_llama(with_b=True), new_session()
    first = trainable(model)
    strategy = OrthogonalLoRA(model)
    config = TrainConfig(num_steps=3, learning_rate=1e-2)
    fit_task(model, strategy, tiny_stream()[0][1], task_id="t0", config=config, memory=session)
    for name, value in trainable(model).items():
        assert torch.equal(value[:4] if "lora_A" in name else value[:, :4], first[name])
        assert value.numel() == 2 * first[name].numel()
    assert session.read("orthogonal_lora")["rank"] == 4


def test_a_stopped_task_goes_on_in_the_model_that_it_started_with() -> None:
    second = tiny_stream()[1][1]
    config = TrainConfig(num_steps=6, learning_rate=1e-2)
    model, session = after_one_task()
    fit_task(model, OrthogonalLoRA(model), second, task_id="t1", config=config, memory=session)
    straight = trainable(model)

    model, session = after_one_task()
    states: list[dict[str, Any]] = []
    answers = iter([False, False, True])
    fit_task(
        model,
        OrthogonalLoRA(model),
        second,
        task_id="t1",
        config=config,
        memory=session,
        should_stop=lambda: next(answers),
        on_checkpoint=states.append,
    )
    model, session = after_one_task()
    fit_task(
        model, OrthogonalLoRA(model), second, task_id="t1", config=config, memory=session, resume=states[0]
    )
    assert_close(trainable(model), straight)


def test_a_task_that_failed_starts_again_in_the_model_that_it_left() -> None:
    """The pairs are frozen once, not once more by the second start."""
    second = tiny_stream()[1][1]
    config = TrainConfig(num_steps=4, learning_rate=1e-2)
    trained = []
    for fails in (False, True):
        model, session = after_one_task()
        options: dict[str, Any] = {"task_id": "t1", "config": config, "memory": session}

        def fail(report: StepReport) -> None:
            if report.step == 2:
                raise KeyboardInterrupt

        if fails:
            with pytest.raises(KeyboardInterrupt):
                fit_task(model, OrthogonalLoRA(model), second, on_step=fail, **options)
        fit_task(model, OrthogonalLoRA(model), second, **options)
        trained.append(trainable(model))
    assert_close(*trained)


def test_a_first_task_is_trained_exactly_as_without_the_strategy() -> None:
    trained = []
    for name in ("none", "orthogonal_lora", "adaptive_svd"):
        model = tiny_llama()
        strategy, config = build_strategy(name, {}, model), TrainConfig(num_steps=5, learning_rate=1e-2)
        asked = []
        fit_task(
            model,
            strategy,
            tiny_stream()[0][1],
            task_id="t0",
            config=config,
            memory=new_session(),
            on_step=lambda _, asked=asked, strategy=strategy: asked.append(strategy.edits_update),  # type: ignore[misc]
        )
        assert asked == [False] * 5  # nothing is protected yet: the loop copies no parameters
        trained.append(trainable(model))
    assert_close(trained[1], trained[0])
    assert_close(trained[2], trained[0])


def test_only_protected_parameters_are_touched_by_the_projection() -> None:
    model, session = after_one_task()
    strategy = OrthogonalLoRA(model)
    strategy.prepare_model(model, "t1", session)
    strategy.bind(model, params := Params.of(model), session)
    strategy.before_training("t1")
    before = {name: p.detach().clone() for name, p in params.items() if "lora_A" in name}
    for p in params.values():
        p.grad = torch.ones_like(p)
        p.data.add_(1.0)
    moved = trainable(model)
    strategy.modify_gradients(params)
    strategy.modify_update(params, before)  # no copy of B is asked for
    for name, p in params.items():
        if "lora_B" in name:
            assert torch.equal(p, moved[name])
            assert torch.equal(p.grad, torch.ones_like(p))
        else:
            basis = strategy.protected.right[name]
            assert share_inside(p.grad, basis) < 1e-6
            assert share_inside(p.detach() - before[name], basis) < 1e-6


# -------------------------------------------------------------------------------------------------- alone


def train_alone(
    model: nn.Module, strategy: Any, dataset: list[Example], *, attach: bool = True, num_steps: int = 20
) -> None:
    optimizer = torch.optim.AdamW(Params.of(model).values(), lr=1e-2)
    if attach:
        strategy.attach(optimizer)
    for _ in range(num_steps):
        optimizer.zero_grad()
        nll, labels = completion_nll(model, collate(dataset, 0))
        strategy.modify_loss(nll.sum() / labels.sum()).backward()
        optimizer.step()


def test_alone_two_tasks_leave_one_adapter_with_orthogonal_rows() -> None:
    model = tiny_llama()
    strategy = OrthogonalLoRA(model)
    datasets = [dataset for _, dataset in tiny_stream()]
    for i, dataset in enumerate(datasets):
        strategy.before_training(f"t{i}", dataset)
        train_alone(model, strategy, dataset)
        strategy.after_training(f"t{i}", dataset)
        assert not has_frozen_pairs(model)
    for layer in lora_layers(model).values():
        a, b = read_pair(layer)
        assert a.shape[0] == b.shape[1] == 8
        assert float((a[:4].double() @ a[4:].double().T).norm() / (a[:4].norm() * a[4:].norm())) < 1e-5
    assert strategy.metrics()["capacity_used_max"] == 8 / 32
    assert max(strategy.get_orthogonality_visualization().values()) < 1e-5


def test_alone_attach_must_not_be_forgotten_in_any_task() -> None:
    model = tiny_llama()
    strategy, dataset = OrthogonalLoRA(model), tiny_dataset("t0", 4)
    strategy.before_training("t0")
    train_alone(model, strategy, dataset, attach=False, num_steps=1)
    with pytest.raises(StrategyError, match="saw no optimizer step; call attach"):
        strategy.after_training("t0", dataset)
    train_alone(model, strategy, dataset, num_steps=1)
    strategy.after_training("t0", dataset)
    strategy.before_training("t1")
    train_alone(model, strategy, dataset, attach=False, num_steps=1)
    with pytest.raises(StrategyError, match="saw no optimizer step; call attach"):
        strategy.after_training("t1", dataset)


def test_alone_an_optimizer_of_other_parameters_is_refused() -> None:
    model = tiny_llama()
    strategy, dataset = OrthogonalLoRA(model), tiny_dataset("t0", 4)
    early = torch.optim.AdamW(Params.of(model).values(), lr=1e-2)
    for task in ("t0", "t1"):
        strategy.before_training(task)
        if task == "t1":
            with pytest.raises(StrategyError, match=r"does not hold '.*lora_A.*'; build and attach it after"):
                strategy.attach(early)
        train_alone(model, strategy, dataset, num_steps=1)
        strategy.after_training(task, dataset)
    early = torch.optim.AdamW(Params.of(model).values(), lr=1e-2)  # of the joined pairs
    with pytest.raises(StrategyError, match="does not hold"):
        strategy.attach(early)


def test_alone_an_optimizer_attached_before_a_trained_pair_was_frozen_is_refused() -> None:
    model = tiny_llama(with_b=True)
    strategy = OrthogonalLoRA(model)
    strategy.attach(torch.optim.AdamW(Params.of(model).values(), lr=1e-2))
    with pytest.raises(StrategyError, match="attach the optimizer of task 't0' after before_training"):
        strategy.before_training("t0")


def test_alone_the_penalty_needs_no_optimizer_and_has_the_same_gradient_as_a_loss() -> None:
    model = tiny_llama()
    strategy = OrthogonalLoRA(model, use_gradient_projection=False)
    dataset = tiny_dataset("t0", 4)
    for i in range(2):
        strategy.before_training(f"t{i}")
        if i == 1:
            assert float(strategy.penalty().detach()) > 0
            strategy.modify_loss(torch.zeros(())).backward()
            as_loss = {name: p.grad.clone() for name, p in strategy.params.items() if p.grad is not None}
            for p in strategy.params.values():
                p.grad = None
            strategy.modify_gradients()
            found = {name: p.grad for name, p in strategy.params.items() if p.grad is not None}
            assert_close({name: found[name] for name in as_loss}, as_loss, atol=1e-6)
        train_alone(model, strategy, dataset, attach=False, num_steps=2)
        strategy.after_training(f"t{i}", dataset)
    assert read_pair(next(iter(lora_layers(model).values())))[0].shape[0] == 8
