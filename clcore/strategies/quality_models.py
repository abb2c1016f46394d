"""What quality control asks of models: the loss of rows, and embeddings of texts.

Shapes: N rows, D dimensions of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clcore.engine import parallel
from clcore.engine.errors import DataError
from clcore.engine.loss import completion_nll
from clcore.engine.tasks import Example, collate, num_label_tokens

Embed = Callable[[list[str]], Any]
"""N texts -> one vector each, (N, D)."""

MIN_ROWS = 8
"""Quartiles are taken of that many rows or more."""
MIN_SPREAD_NATS = 1.0
"""A batch of almost equal losses counts as this wide, so that a hard row is not an outlier."""


def unwrapped(model: nn.Module | None) -> nn.Module | None:
    """Return the model inside DDP's wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def nll_per_token(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    pad_token_id: int = 0,
    use_base: bool = False,
) -> list[float]:
    """Return each example's negative log-likelihood in nats per label token, in eval mode, without gradient.

    use_base: switch a PEFT model's adapter off. Ranks share the batches and get equal numbers; with several
    processes all must call. The model comes back as it was. Raises DataError for an example without a label
    or a loss that is not finite.
    """
    inner: Any = unwrapped(model)
    values = np.zeros(len(examples))
    device = next(inner.parameters()).device
    batches = range(0, len(examples), batch_size)
    unlabelled = [example for example in examples if not num_label_tokens(example)]
    if unlabelled:
        raise DataError(f"row {unlabelled[0].get('ref')!r} has no label token")
    adapter = inner.disable_adapter() if use_base else nullcontext()
    with _left_as_it_was(inner), torch.no_grad(), adapter:
        for start in batches[parallel.rank() :: parallel.world_size()]:
            batch = collate(examples[start : start + batch_size], pad_token_id, device)
            nll, num_labels = completion_nll(inner, batch)
            values[start : start + batch_size] = (nll.double() / num_labels).cpu().numpy()
    found = parallel.sum_over_ranks(values.tolist())
    for example, value in zip(examples, found, strict=True):
        if not np.isfinite(value):
            raise DataError(f"the model gives row {example.get('ref')!r} a loss of {value}")
    return found


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; restore modes and requires_grad, which PEFT's adapter switch changes."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def fence(values: Sequence[float], width: float | None) -> tuple[float, float]:
    """Return (low, high) = (q25 - width * spread, q75 + width * spread), Tukey's fence, in the values' unit.

    spread = max(q75 - q25, MIN_SPREAD_NATS). Unbounded without a width or with fewer than MIN_ROWS values.
    """
    if width is None or len(values) < MIN_ROWS:
        return -np.inf, np.inf
    q25, q75 = np.percentile(values, [25, 75])
    spread = max(float(q75 - q25), MIN_SPREAD_NATS)
    return float(q25) - width * spread, float(q75) + width * spread


def sentence_encoder(name: str, batch_size: int) -> Embed:
    """Load a sentence-transformers model by name or folder, with the pooling that it was trained with."""
    from sentence_transformers import SentenceTransformer  # optional, and slow to import

    encoder = SentenceTransformer(name)
    return lambda texts: encoder.encode(texts, batch_size=batch_size, show_progress_bar=False)


def unit_vectors(embed: Embed, texts: Sequence[str], batch_size: int) -> NDArray[np.float64]:
    """Embed texts in batches and scale each row to length 1, (N, D); a zero vector stays zero.

    Raises DataError when embed does not return one finite vector per text.
    """
    parts = []
    for start in range(0, len(texts), batch_size):
        batch = list(texts[start : start + batch_size])
        vectors_ND = np.asarray(embed(batch), dtype=np.float64)
        if vectors_ND.ndim != 2 or len(vectors_ND) != len(batch) or not np.isfinite(vectors_ND).all():
            raise DataError(
                f"embed must return one finite vector per text: got shape {vectors_ND.shape} "
                f"for {len(batch)} texts"
            )
        parts.append(vectors_ND)
    all_ND = np.concatenate(parts) if parts else np.zeros((0, 1))
    norms = np.linalg.norm(all_ND, axis=1, keepdims=True)
    return all_ND / np.where(norms == 0, 1, norms)
