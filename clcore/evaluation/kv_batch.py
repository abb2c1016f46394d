"""A batch of rows that goes through a model piece by piece and keeps its keys and values.

B rows, T tokens of a piece, C columns of the cache, V entries of the vocabulary, P tokens of a prefix.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from clcore.engine.errors import BackendError


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The tokens that several rows begin with, and their keys and values per layer, each (1, heads, P, D)."""

    tokens: tuple[int, ...]
    layers: tuple[tuple[Tensor, Tensor], ...]


class KVBatch:
    """Rows with a key-value cache. A column holds one token of each row, or nothing where the mask is 0.

    Pieces are padded on the left, so that their last tokens share the last columns; positions count a row's
    real tokens only. With a prefix every row begins with its tokens.
    Raises BackendError for adapters that put virtual tokens before every piece.
    """

    def __init__(self, model: nn.Module, num_rows: int, pad: int, prefix: Prefix | None = None) -> None:
        peft = getattr(model, "active_peft_config", None)
        if getattr(peft, "is_prompt_learning", False):
            raise BackendError(f"rows cannot be fed piece by piece under {type(peft).__name__}")
        self._model, self._pad = model, pad
        self._accepted = _arguments(model)
        self._device = next(model.parameters()).device
        length = len(prefix.tokens) if prefix else 0
        self._mask = torch.ones(num_rows, length, dtype=torch.long)
        self._lengths = [length] * num_rows
        if prefix:
            self._cache = DynamicCache(
                [(k.expand(num_rows, -1, -1, -1), v.expand(num_rows, -1, -1, -1)) for k, v in prefix.layers]
            )
        else:
            self._cache = DynamicCache(config=_config(model))

    def feed(self, pieces: Sequence[Sequence[int]], num_logits: int) -> Tensor:
        """Append a piece to each row; return the float32 logits of the last num_logits columns.

        Shape (B, num_logits, V). A row whose piece is empty gets columns that nothing looks at.
        """
        width = max(map(len, pieces))
        ids = torch.full((len(pieces), width), self._pad, dtype=torch.long)
        positions, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, piece in enumerate(pieces):
            if piece:
                start = width - len(piece)
                ids[i, start:] = torch.tensor(piece)
                positions[i, start:] = torch.arange(self._lengths[i], self._lengths[i] + len(piece))
                mask[i, start:] = 1
                self._lengths[i] += len(piece)
        self._mask = torch.cat([self._mask, mask], dim=1)
        # A model without them derives positions from the mask, or needs none.
        optional = {"position_ids": positions.to(self._device), "logits_to_keep": num_logits}
        cache = "cache" if "cache" in self._accepted else "past_key_values"  # its name before transformers 6
        outputs = self._model(
            input_ids=ids.to(self._device),
            attention_mask=self._mask.to(self._device),
            use_cache=True,
            **{cache: self._cache},
            **{name: value for name, value in optional.items() if name in self._accepted},
        )
        logits: Tensor = outputs.logits[:, -num_logits:]
        return logits.float()

    def forget(self, row: int, num_tokens: int) -> None:
        """Make a row as if its last num_tokens had not been fed; they must belong to the last piece."""
        if num_tokens:
            self._mask[row, -num_tokens:] = 0
            self._lengths[row] -= num_tokens

    def crop(self, num_columns: int) -> None:
        """Remove the last columns, in which every row has a token."""
        if num_columns:
            self._cache.crop(-num_columns)
            self._mask = self._mask[:, :-num_columns]
            self._lengths = [length - num_columns for length in self._lengths]

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order."""
        if list(rows) != list(range(len(self._lengths))):
            self._cache.batch_select_indices(torch.tensor(rows, device=self._device))
            self._mask = self._mask[list(rows)]
            self._lengths = [self._lengths[row] for row in rows]

    def as_prefix(self, tokens: Sequence[int]) -> Prefix:
        """Return the keys and values of a batch of one row that was fed these tokens."""
        return Prefix(tuple(tokens), tuple((layer[0], layer[1]) for layer in self._cache))


def has_plain_cache(model: nn.Module) -> bool:
    """Say whether columns can be hidden, removed and shared: every layer attends to all of the past.

    Not so for sliding windows, which count columns, and recurrent layers, which cannot take a token back.
    """
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=_config(model)).layers)


def shared_prefix(model: nn.Module, prompts: Sequence[tuple[int, ...]], pad: int) -> Prefix | None:
    """Run what all prompts begin with through the model once; None where that saves nothing.

    At least one token of every prompt stays out of it: something must predict the first token of an answer.
    """
    if len(prompts) < 2 or not has_plain_cache(model):
        return None
    first, last = min(prompts), max(prompts)
    room = min(map(len, prompts)) - 1
    count = next((i for i in range(room) if first[i] != last[i]), room)
    if count < 1:
        return None
    batch = KVBatch(model, 1, pad)
    batch.feed([first[:count]], 1)
    return batch.as_prefix(first[:count])


def pad_token(tokenizer: Any) -> int:
    """Return a token to fill up with; nothing ever looks at it."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(pad or 0)


def _inner(model: nn.Module) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _config(model: nn.Module) -> Any:
    config = getattr(_inner(model), "config", None)
    if config is None:
        raise BackendError(f"{type(model).__name__} has no config; a transformers model is needed")
    return config


def _arguments(model: nn.Module) -> set[str]:
    return set(inspect.signature(_inner(model).forward).parameters)
