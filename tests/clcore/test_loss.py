"""The loss equals the model's own, and the head runs on labelled positions only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clcore.engine.errors import BackendError
from clcore.engine.loss import completion_nll
from clcore.engine.tasks import IGNORE, Example, collate
from tests.clcore.tiny import tiny_dataset, tiny_gpt2, tiny_llama


def mixed_lengths() -> list[Example]:
    rows = tiny_dataset("t0", 5)
    longer = torch.cat([rows[1]["input_ids"], rows[2]["input_ids"]])
    blank = rows[3]["input_ids"]
    return [
        *rows,
        {"input_ids": longer, "labels": longer.clone()},
        {"input_ids": blank, "labels": torch.full_like(blank, IGNORE)},
    ]


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("make", [lambda: tiny_llama(with_b=True), tiny_gpt2], ids=["llama", "gpt2"])
def test_loss_and_gradients_equal_the_models_own_with_full_logits(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    batch = collate(mixed_lengths(), 0)
    nll, labels = completion_nll(model, batch)
    theirs = model(**batch).loss  # the mean over all labels
    torch.testing.assert_close(nll.sum() / labels.sum(), theirs, rtol=0, atol=1e-6)
    ours_mean = completion_nll(model, batch)[0].sum() / labels.sum()
    for ours, reference in zip(gradients(model, ours_mean), gradients(model, theirs), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-7)


def test_each_row_gets_its_own_sum_and_count_and_a_row_without_labels_gets_0() -> None:
    model, rows = tiny_llama(with_b=True).eval(), mixed_lengths()
    nll, labels = completion_nll(model, collate(rows, 0))
    for i, row in enumerate(rows):
        alone = collate([row], 0)
        logits = model(input_ids=alone["input_ids"], attention_mask=alone["attention_mask"]).logits[0, :-1]
        reference = F.cross_entropy(logits, alone["labels"][0, 1:], ignore_index=IGNORE, reduction="sum")
        torch.testing.assert_close(nll[i], reference, rtol=1e-5, atol=1e-5)
        assert int(labels[i]) == int((row["labels"][1:] != IGNORE).sum())
    assert float(nll[-1].detach()) == 0
    assert int(labels[-1]) == 0


def test_a_batch_without_any_label_gives_zeros_and_zero_gradients() -> None:
    model = tiny_llama(with_b=True)
    nll, labels = completion_nll(model, collate(mixed_lengths()[-1:], 0))
    assert nll.tolist() == [0.0]
    assert labels.tolist() == [0]
    assert all(not bool(g.any()) for g in gradients(model, nll.sum()))


def test_the_head_receives_exactly_the_labelled_positions() -> None:
    model, batch = tiny_llama(), collate(mixed_lengths(), 0)
    head, seen = model.get_output_embeddings(), []
    head.register_forward_hook(lambda _module, args, _out: seen.append(args[0].numel() // args[0].shape[-1]))
    _, labels = completion_nll(model, batch)
    assert seen == [int(labels.sum())]
    assert seen[0] < batch["labels"].numel() / 2
    model(input_ids=batch["input_ids"])  # the restriction is gone afterwards
    assert seen[1] == batch["labels"].numel()


def test_the_restriction_is_gone_after_a_failing_forward_pass() -> None:
    model, batch = tiny_llama(), collate(mixed_lengths(), 0)
    with pytest.raises(IndexError):
        completion_nll(model, {**batch, "input_ids": batch["input_ids"] + 10_000})
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(BackendError, match="Linear has no output embeddings"):
        completion_nll(nn.Linear(2, 2), collate(mixed_lengths(), 0))
