"""The loss on completion tokens, with the output head applied only where a label stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clcore.engine.errors import BackendError
from clcore.engine.tasks import IGNORE


@dataclasses.dataclass(frozen=True)
class RowLosses:
    """The loss of a micro-batch row by row, which the loop hands to modify_loss as outputs.

    The loop's loss is row_nll.sum() * scale.
    """

    row_nll: Tensor
    """Summed negative log-likelihood per row, in nats, (B,), with its graph."""
    num_labels: Tensor
    """Label tokens per row, (B,)."""
    refs: Sequence[str | None]
    """References of the rows; None for a row without one."""
    scale: float


def completion_nll(
    model: nn.Module, batch: Mapping[str, Tensor], *, row_seeds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return each row's summed negative log-likelihood, in nats, and its number of labels, both (B,).

    The head sees only the hidden states that predict a label, so memory and time of the logits go with the
    number of labels, not with the batch's length. Whatever the model does to its logits afterwards still
    happens.
    row_seeds, (B,): score targets that sample_targets draws instead of the labels; the inputs stay the data.
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
    wanted = targets[row, position] if row_seeds is None else sample_targets(logits, row, row_seeds)
    nll = F.cross_entropy(logits, wanted, reduction="none")
    num_rows = targets.shape[0]
    per_row = torch.zeros(num_rows, device=nll.device).index_add(0, row, nll)
    return per_row, torch.bincount(row, minlength=num_rows)


@torch.no_grad()
def sample_targets(logits_NV: Tensor, row_N: Tensor, row_seeds_B: Tensor) -> Tensor:
    """Draw a target for each position from the softmax of its logits, (N,).

    row_N: the row that each position belongs to. A row's targets depend on its own logits and seed only: one
    uniform number per position through the inverse of the distribution function.
    """
    drawn_N = torch.empty_like(row_N)
    for row, seed in enumerate(row_seeds_B.tolist()):
        is_mine_N = row_N == row
        cdf_nV = logits_NV[is_mine_N].softmax(-1).cumsum(-1)
        # On the CPU, so that every device draws the same.
        uniform_n = torch.rand(len(cdf_nV), 1, generator=torch.Generator().manual_seed(seed))
        heights_n = uniform_n.to(cdf_nV.device) * cdf_nV[:, -1:]
        # right: the first token whose cumulated probability is above, so one of probability 0 is never drawn.
        found_n = torch.searchsorted(cdf_nV, heights_n, right=True).squeeze(1)
        drawn_N[is_mine_N] = found_n.clamp(max=logits_NV.shape[1] - 1)
    return drawn_N


def _output_head(model: nn.Module) -> nn.Module:
    inner: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        raise BackendError(
            f"{type(inner).__name__} has no output embeddings; a causal language model is needed"
        )
    return head
