"""The loss on completion tokens, with the output head applied only where a label stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clcore.engine.errors import BackendError
from clcore.engine.tasks import IGNORE


def completion_nll(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return each row's summed negative log-likelihood, in nats, and its number of labels, both (B,).

    The head sees only the hidden states that predict a label, so memory and time of the logits go with the
    number of labels, not with the batch's length. Whatever the model does to its logits afterwards still
    happens.
    """
    targets = batch["labels"][:, 1:]
    row, position = torch.where(targets != IGNORE)
    head = _output_head(model)

    def keep_labelled(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][row, position].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(keep_labelled)
    try:
        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        handle.remove()
    logits = outputs.logits.squeeze(0).float()
    nll = F.cross_entropy(logits, targets[row, position], reduction="none")
    num_rows = targets.shape[0]
    per_row = torch.zeros(num_rows, device=nll.device).index_add(0, row, nll)
    return per_row, torch.bincount(row, minlength=num_rows)


def _output_head(model: nn.Module) -> nn.Module:
    inner: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        raise BackendError(
            f"{type(inner).__name__} has no output embeddings; a causal language model is needed"
        )
    return head
