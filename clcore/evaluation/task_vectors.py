"""What a task looks like to a model: its loss, its mean gradient, its embedding.

Data sets are iterables of examples as iter_examples reads them. All functions run in eval mode and leave
modes, gradients and weights as they were. Legend: N rows, B rows of a batch, L tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from clcore.engine.errors import BackendError, ConfigError, DataError
from clcore.engine.fisher import unwrapped
from clcore.engine.loss import completion_nll
from clcore.engine.params import Params
from clcore.engine.tasks import IGNORE, collate, iter_examples

Tokens = Literal["label", "prompt"]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch every module to eval mode inside the block; each gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Compute with the base model of a PEFT model inside the block; any other model stays what it is.

    What trains and what does not is the same after it: PEFT itself would make every adapter trainable.
    """
    inner = unwrapped(model)
    if not isinstance(inner, PeftModel):
        yield
        return
    flags = [(p, p.requires_grad) for p in inner.parameters()]
    try:
        with inner.disable_adapter():
            yield
    finally:
        for parameter, is_trained in flags:
            parameter.requires_grad_(is_trained)


def batches_of(
    model: nn.Module, dataset: Iterable[Any], *, batch_size: int = 8, pad_token_id: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Yield the rows in order, padded to batches on the model's device. Raises DataError without rows."""
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    rows = list(iter_examples(dataset))
    if not rows:
        raise DataError("the data set has no rows")
    device = next(model.parameters()).device
    for start in range(0, len(rows), batch_size):
        yield collate(rows[start : start + batch_size], pad_token_id, device)


@torch.no_grad()
def label_loss(
    model: nn.Module, dataset: Iterable[Any], *, batch_size: int = 8, pad_token_id: int = 0
) -> float:
    """Return the loss in nats per label token, over all rows together.

    Raises DataError without rows or labels.
    """
    total, num_labels = 0.0, 0
    with eval_mode(model):
        for batch in batches_of(model, dataset, batch_size=batch_size, pad_token_id=pad_token_id):
            nll, labels = completion_nll(unwrapped(model), batch)
            total += float(nll.double().sum())
            num_labels += int(labels.sum())
    return total / _at_least_one(num_labels)


def mean_gradient(
    model: nn.Module, dataset: Iterable[Any], *, batch_size: int = 8, pad_token_id: int = 0
) -> dict[str, Tensor]:
    """Return the gradient of label_loss by trainable parameter, float32, on the parameters' devices.

    A parameter that the loss does not depend on has a gradient of zeros. Cost: one forward and backward per
    batch. Raises DataError without rows or labels.
    """
    inner, params = unwrapped(model), Params.of(model)
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in params.items()}
    num_labels = 0
    with eval_mode(model), torch.enable_grad():
        for batch in batches_of(model, dataset, batch_size=batch_size, pad_token_id=pad_token_id):
            nll, labels = completion_nll(inner, batch)
            found = torch.autograd.grad(nll.sum(), list(params.values()), allow_unused=True)
            for name, gradient in zip(total, found, strict=True):
                if gradient is not None:
                    total[name] += gradient.float()
            num_labels += int(labels.sum())
    return {name: gradient / _at_least_one(num_labels) for name, gradient in total.items()}


@torch.no_grad()
def row_embeddings(
    model: nn.Module,
    dataset: Iterable[Any],
    *,
    tokens: Tokens = "label",
    batch_size: int = 8,
    pad_token_id: int = 0,
) -> Tensor:
    """Return each row's mean last hidden state over its label or its prompt tokens, (N, H), float32, CPU.

    The last hidden state is what enters the output head. Prompt tokens are those without a label.
    Raises DataError for a row without such tokens, BackendError for a model without hidden states.
    """
    if tokens not in ("label", "prompt"):
        raise ConfigError(f"tokens must be label or prompt, got {tokens!r}")
    found: list[Tensor] = []
    inner: Any = unwrapped(model)
    with eval_mode(model):
        for batch in batches_of(model, dataset, batch_size=batch_size, pad_token_id=pad_token_id):
            ids, mask = batch["input_ids"], batch["attention_mask"]
            outputs = inner(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
            if not getattr(outputs, "hidden_states", None):
                raise BackendError(f"{type(inner).__name__} returns no hidden states to embed rows with")
            has_label_BL = batch["labels"] != IGNORE
            chosen_BL = has_label_BL if tokens == "label" else mask.bool() & ~has_label_BL
            count_B1 = chosen_BL.sum(1, keepdim=True)
            if not bool(count_B1.all()):
                raise DataError(f"a row has no {tokens} token to embed it by")
            hidden_BLH = outputs.hidden_states[-1].float()
            found.append(((hidden_BLH * chosen_BL.unsqueeze(-1)).sum(1) / count_B1).cpu())
    return torch.cat(found)


def _at_least_one(num_labels: int) -> int:
    if not num_labels:
        raise DataError("the data set has no label token")
    return num_labels
