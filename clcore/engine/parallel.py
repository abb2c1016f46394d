"""Several processes as one: wrapping the model and the few collective operations that the loop needs.

Without an initialised process group everything here is the identity of one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clcore.engine.errors import BackendError

BACKENDS = ("ddp",)
"""Backends that run today; 'fsdp' and 'deepspeed' are accepted names without code yet."""


def rank() -> int:
    """This process's number, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def check_backend(backend: str) -> None:
    """Raise BackendError unless the backend runs today."""
    if backend not in BACKENDS:
        raise BackendError(
            f"backend {backend!r} is not available yet; use {' or '.join(map(repr, BACKENDS))}"
        )


def wrap(model: nn.Module, backend: str) -> nn.Module:
    """Wrap a model for synchronised gradients; alone the model itself comes back."""
    check_backend(backend)
    if world_size() == 1:
        return model
    return DistributedDataParallel(model, broadcast_buffers=False)


@contextmanager
def no_gradient_sync(model: nn.Module, *, skip: bool) -> Iterator[None]:
    """Hold back gradient synchronisation while skip is true: for all but a step's last micro-batch."""
    if skip and isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        yield


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Sum float tensors over all processes, in place, in one flat bucket per dtype."""
    if world_size() == 1 or not tensors:
        return
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        group = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in group])
        dist.all_reduce(flat)
        for tensor, part in zip(group, torch.split(flat, [t.numel() for t in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Sum numbers over all processes; exact for integers below 2^53."""
    total = torch.tensor(values, dtype=torch.float64)
    all_reduce_sum([total])
    return [float(v) for v in total]


def from_rank0(value: int) -> int:
    """Return rank 0's integer on every process."""
    if world_size() == 1:
        return value
    holder = torch.tensor([value], dtype=torch.int64)
    dist.broadcast(holder, src=0)
    return int(holder.item())
