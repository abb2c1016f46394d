"""The training loop: what a step is, and what its result may and may not depend on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clcore.engine.errors import BackendError, ConfigError, DataError, TrainingDivergedError
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
