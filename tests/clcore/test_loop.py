"""The training loop: what a step is, and what its result may and may not depend on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clcore.engine.errors import BackendError, ConfigError, DataError, StateError, TrainingDivergedError
from clcore.engine.loop import StepReport, scheduled_learning_rate
from clcore.engine.loss import RowLosses
from clcore.engine.params import Params
from clcore.engine.tasks import IGNORE, Example, collate
from clcore.strategies.ewc_base import BaseEWC
from clcore.strategies.none import NoStrategy
from tests.clcore.fitting import config, fit
from tests.clcore.tiny import (
    assert_close,
    differ,
    mean_nll,
    new_session,
    tiny_dataset,
    tiny_llama,
    trainable,
)

# --------------------------------------------------------------------------------------------- what a step is


def test_steps_equal_adamw_written_out_with_mean_loss_over_tokens_clipping_and_a_linear_schedule() -> None:
    model, reference = tiny_llama(with_b=True), tiny_llama(with_b=True)
    dataset = tiny_dataset("t0", 6)  # one batch is the whole data set: the order of rows does not matter
    losses: list[float] = []
    changes: dict[str, Any] = {"max_grad_norm": 0.05, "weight_decay": 0.1, "micro_batch_size": 4}
    fit(model, dataset, on_step=lambda report: losses.append(report.loss), **changes)
    params = list(Params.of(reference).values())
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 5)
        optimizer.zero_grad()
        loss = reference(**collate(dataset, 0)).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(params, 0.05)
        assert float(norm) > 0.05
        optimizer.step()
        assert losses[step] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert_close(trainable(model), trainable(reference), atol=1e-5)


@pytest.mark.parametrize("micro_batch_size", [1, 4, 100])
def test_the_micro_batch_size_does_not_change_the_result(micro_batch_size: int) -> None:
    model, reference = tiny_llama(with_b=True), tiny_llama(with_b=True)
    fit(reference)
    fit(model, micro_batch_size=micro_batch_size)
    assert_close(trainable(model), trainable(reference), atol=1e-6)


def test_an_epoch_shows_every_row_once_in_an_order_of_its_own() -> None:
    class Watch(NoStrategy):
        seen: list[str]

        def mix_batch(self, batch: list[Example], *, step: int) -> list[Example]:  # noqa: ARG002
            self.seen += [example["ref"] for example in batch]
            return batch

    model = tiny_llama()
    watch = Watch(model)
    watch.seen = []
    fit(model, tiny_dataset("t0", 10), watch, num_steps=6, batch_size=5)
    epochs = [watch.seen[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 10 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1.0, 1.0, 1.0, 1.0]),
        ("linear", 0, [1.0, 0.75, 0.5, 0.25]),
        ("cosine", 0, [1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 - math.cos(math.pi / 4)) / 2]),
        ("linear", 2, [1 / 3, 2 / 3, 1.0, 0.5]),
        ("constant", 3, [0.25, 0.5, 0.75, 1.0]),
        ("linear", 9, [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_learning_rates_are_those_on_paper(schedule: str, warmup: int, expected: list[float]) -> None:
    cfg = config(num_steps=4, learning_rate=2.0, schedule=schedule, warmup_steps=warmup)
    assert [scheduled_learning_rate(cfg, step) / 2 for step in range(4)] == pytest.approx(expected)


def test_reports_and_result_count_steps_and_tokens() -> None:
    reports: list[StepReport] = []
    model, dataset = tiny_llama(), tiny_dataset("t0", 6)
    result = fit(model, dataset, num_steps=3, on_step=reports.append)
    assert [report.step for report in reports] == [1, 2, 3]
    assert [report.learning_rate for report in reports] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    tokens = sum(len(example["input_ids"]) for example in dataset)
    labels = sum(int((example["labels"] != IGNORE).sum()) for example in dataset)
    assert [report.num_tokens for report in reports] == [tokens] * 3
    assert (result.total_tokens, result.label_tokens, result.replay_tokens) == (3 * tokens, 3 * labels, 0)
    assert result.final_loss == reports[-1].loss
    assert reports[-1].eta_s == 0
    assert 0 <= result.strategy_s <= result.train_s
    assert not result.is_stopped


def test_bf16_follows_fp32_and_keeps_parameters_in_fp32() -> None:
    model, reference = tiny_llama(with_b=True), tiny_llama(with_b=True)
    low, full = fit(model, precision="bf16"), fit(reference)
    assert {p.dtype for p in Params.of(model).values()} == {torch.float32}
    assert low.final_loss != full.final_loss
    assert low.final_loss == pytest.approx(full.final_loss, rel=0.02)


# -------------------------------------------------------------------------------------- same seed, same bytes


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_bytes() -> None:
    def run(seed: int) -> dict[str, Tensor]:
        model = tiny_llama(dropout=0.2)
        fit(model, seed=seed)
        return trainable(model)

    first = run(0)
    torch.rand(3)
    assert_close(run(0), first)
    other = run(1)
    assert differ(first, other)


def test_frozen_weights_do_not_move_and_no_gradient_stays_behind() -> None:
    model = tiny_llama()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = trainable(model)
    fit(model, learning_rate=1e-1)
    assert_close({n: p.detach() for n, p in model.named_parameters() if n in frozen}, frozen)
    assert differ(before, trainable(model))
    assert all(p.grad is None for p in model.parameters())


def test_training_lowers_the_loss() -> None:
    model, dataset = tiny_llama(), tiny_dataset("t0")
    before = mean_nll(model, dataset)
    fit(model, dataset, learning_rate=1e-2, num_steps=10)
    assert mean_nll(model, dataset) < before


def test_the_penalty_acts_but_is_not_in_the_reported_loss() -> None:
    def second_task(strategy_lambda: float) -> tuple[list[float], dict[str, Tensor]]:
        model, session = tiny_llama(), new_session()
        fit(model, strategy=BaseEWC(model, ewc_lambda=strategy_lambda), memory=session, learning_rate=1e-2)
        with torch.no_grad():
            for p in Params.of(model).values():
                p.add_(0.01)  # away from the anchor: the penalty is not 0
        ewc = BaseEWC(model, ewc_lambda=strategy_lambda)
        losses: list[float] = []
        following = session.next_task(op_id="run/t1")
        fit(
            model,
            tiny_dataset("t1", shift=5),
            ewc,
            memory=following,
            task_id="t1",
            num_steps=2,
            on_step=lambda report: losses.append(report.loss),
        )
        return losses, trainable(model)

    free, pulled = second_task(0.0), second_task(1e6)
    assert free[0][0] == pulled[0][0]
    assert free[0][1] != pulled[0][1]
    assert differ(free[1], pulled[1])


# ----------------------------------------------------------------------------------------------------- errors


def test_an_empty_data_set_and_a_step_without_labels_are_refused() -> None:
    with pytest.raises(DataError, match="'t0' has no rows"):
        fit(tiny_llama(), [])
    blank = [
        {"input_ids": e["input_ids"], "labels": torch.full_like(e["labels"], IGNORE), "ref": e["ref"]}
        for e in tiny_dataset("t0", 3)
    ]
    with pytest.raises(DataError, match="no label token"):
        fit(tiny_llama(), blank)


def test_a_loss_that_is_not_finite_ends_training_with_advice() -> None:
    with pytest.raises(TrainingDivergedError, match=r"'t0' is (nan|inf) at step \d+; lower learning_rate"):
        fit(tiny_llama(with_b=True), learning_rate=1e30, schedule="constant")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_steps": 2.5}, "num_steps must be a whole number, got 2.5"),
        ({"batch_size": True}, "batch_size must be a whole number, got True"),
        ({"max_grad_norm": None}, "max_grad_norm must be a number, got None"),
        ({"seed": "a"}, "seed must be a whole number, got 'a'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"micro_batch_size": -1}, "micro_batch_size must be at least 1, got -1"),
        ({"learning_rate": float("nan")}, "learning_rate must be a positive finite number, got nan"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a positive finite number, got 0.0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"checkpoint_every_steps": -1}, "checkpoint_every_steps must be at least 0, got -1"),
        ({"schedule": "step"}, "one of constant, linear, cosine, got 'step'"),
        ({"precision": "fp16"}, "fp32 or bf16, got 'fp16'"),
    ],
)
def test_a_bad_training_value_is_refused_with_what_is_allowed(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**changes)


def test_a_session_that_a_task_has_committed_is_refused_for_the_next() -> None:
    model, session = tiny_llama(), new_session()
    fit(model, memory=session)
    with pytest.raises(StateError, match=r"was committed; give task 't1' the next one"):
        fit(model, tiny_dataset("t1"), memory=session, task_id="t1")
    fit(model, tiny_dataset("t1"), memory=session.next_task(op_id="run/t1"), task_id="t1")


def test_a_row_without_labels_is_refused_by_name() -> None:
    rows: Any = [{"input_ids": example["input_ids"], "ref": example["ref"]} for example in tiny_dataset("t0")]
    with pytest.raises(DataError, match=r"row 't0:\d+' has no labels; iter_examples gives rows their labels"):
        fit(tiny_llama(), rows)


def test_a_backend_that_does_not_run_yet_is_refused() -> None:
    with pytest.raises(BackendError, match="'fsdp' is not available yet; use 'ddp'"):
        config(backend="fsdp")


def test_a_batch_of_rows_is_not_changed_by_training_on_it() -> None:
    dataset = tiny_dataset("t0")
    before = [example["input_ids"].clone() for example in dataset]
    fit(tiny_llama(), dataset)
    assert all(torch.equal(a, b["input_ids"]) for a, b in zip(before, dataset, strict=True))


def test_modify_loss_sees_the_loss_row_by_row_with_its_graph_and_references() -> None:
    seen: list[tuple[Tensor, RowLosses]] = []

    class Watch(NoStrategy):
        def modify_loss(self, loss: Tensor, *_: Any, outputs: Any = None, **__: Any) -> Tensor:
            assert outputs.row_nll.requires_grad
            seen.append((loss.detach(), outputs))
            return loss

    model, dataset = tiny_llama(), tiny_dataset("t0", 4)
    fit(model, dataset, Watch(model), num_steps=1, batch_size=4, micro_batch_size=2)
    assert sorted(ref for _, rows in seen for ref in rows.refs) == [f"t0:{i}" for i in range(4)]
    for loss, rows in seen:
        assert float(loss) == pytest.approx(float(rows.row_nll.detach().sum()) * rows.scale)
    num_labels = sum(int(rows.num_labels.sum()) for _, rows in seen)
    assert num_labels == sum(int((e["labels"][1:] != IGNORE).sum()) for e in dataset)
    assert {rows.scale for _, rows in seen} == {1 / num_labels}
