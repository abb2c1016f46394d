"""Params: the trainable parameters by name, as local tensors, whatever the backend.

Strategies see plain tensors only. Today a parameter is a plain tensor on every backend that runs (one
process, DDP); sharded backends will hand out their local shards here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from clcore.engine.errors import BackendError


class Params(Mapping[str, nn.Parameter]):
    """Trainable parameters, name -> parameter; names are those of the unwrapped model."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        sharded = [name for name, parameter in parameters.items() if hasattr(parameter, "to_local")]
        if sharded:
            raise BackendError(
                f"sharded parameters are not supported yet: {sharded[0]} and {len(sharded) - 1} more"
            )
        self._parameters = dict(parameters)

    @classmethod
    def of(cls, model: nn.Module) -> Params:
        """Collect the trainable parameters of a plain or DDP-wrapped model."""
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        return cls({name: p for name, p in inner.named_parameters() if p.requires_grad})

    def __getitem__(self, name: str) -> nn.Parameter:
        return self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def copies(self) -> dict[str, Tensor]:
        """Return detached copies of all values."""
        return {name: parameter.detach().clone() for name, parameter in self.items()}

    def digest(self) -> str:
        """Return the sha256 of all names and values."""
        found = hashlib.sha256()
        for name, parameter in self.items():
            found.update(name.encode())
            found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    @torch.no_grad()
    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Overwrite all values in place. Raises KeyError when a name is missing."""
        for name, parameter in self.items():
            parameter.copy_(values[name])
