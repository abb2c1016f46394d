"""The diagonal Fisher information: squared per-row gradients of trainable parameters from one backward pass.

The gradient of one row with respect to a Linear weight is the sum over tokens of (output gradient) x (input).
Both factors of all rows are there after one backward pass of the summed loss: nothing runs row by row.
Legend: B rows, L tokens, I in, O out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clcore.engine.errors import FisherError
from clcore.engine.loss import completion_nll
from clcore.engine.params import Params


def squared_gradients(
    model: nn.Module, params: Params, batches: Iterable[Mapping[str, Tensor]]
) -> tuple[dict[str, Tensor], int]:
    """Sum the squared per-row gradients of the log-likelihood over all rows of the batches.

    Returns name -> float32 sum of the parameter's shape, in nats^2 per squared parameter unit, and the number
    of rows; the empirical Fisher is sum / rows. A row is one observation: its gradient sums over its label
    tokens and is squared after that. Runs in eval mode (no dropout) and leaves modes and gradients as they
    were. Local to this process.
    Cost: one forward and backward per batch; memory: one gradient per row of a batch.

    Raises FisherError for a parameter of the output head or outside Linear and Conv1D, or when every LoRA B
    is 0 (A's Fisher is then 0).
    Source: Kirkpatrick et al. 2017; labels from the data (empirical), see van de Ven 2025 (arXiv 2502.11756).
    """
    _refuse_untrained_lora(params)
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in params.items()}
    num_rows = 0
    parameters = list(params.values())
    with _evaluating(inner), _per_row_gradients(inner, params) as per_row:
        for batch in batches:
            per_row.clear()
            nll, _ = completion_nll(inner, batch)
            # Only the hooks are wanted, and autograd.grad leaves every .grad alone.
            torch.autograd.grad(nll.sum(), parameters, allow_unused=True)
            for name, gradient_B in per_row.items():
                if gradient_B.shape[0] != nll.shape[0]:  # completion_nll gives the head all rows as one
                    raise FisherError(
                        f"{name!r} belongs to the output head; take the head out of the adapter"
                    )
                total[name] += gradient_B.float().square().sum(0)
            num_rows += nll.shape[0]
    return total, num_rows


@contextmanager
def _per_row_gradients(model: nn.Module, params: Params) -> Iterator[dict[str, Tensor]]:
    """Collect name -> per-row gradient, shape (B, *parameter), from every backward pass in the block."""
    wanted = {id(p): name for name, p in params.items()}
    found: dict[str, Tensor] = {}
    covered: set[str] = set()
    handles = []
    for module in model.modules():
        names = {kind: wanted[id(p)] for kind, p in module.named_parameters(recurse=False) if id(p) in wanted}
        if names and isinstance(module, nn.Linear | Conv1D):
            covered.update(names.values())
            handles.append(module.register_forward_hook(_capture(names, found, isinstance(module, Conv1D))))
    missing = sorted(set(params) - covered)
    if missing:
        raise FisherError(f"per-sample gradients need Linear or Conv1D modules; {missing[0]!r} is in neither")
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _capture(names: Mapping[str, str], found: dict[str, Tensor], is_transposed: bool) -> Callable[..., None]:
    def add(name: str, gradient: Tensor) -> None:  # a module may run more than once per forward pass
        found[name] = found[name] + gradient if name in found else gradient

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:  # the first pass of a checkpointed block
            return
        x_BLI = args[0].detach()
        if x_BLI.dim() != 3:
            name, shape = next(iter(names.values())), tuple(x_BLI.shape)
            raise FisherError(f"per-sample gradients need inputs (rows, tokens, in); {name!r} got {shape}")

        def on_gradient(g_BLO: Tensor) -> None:
            if "weight" in names:
                spec = "bli,blo->bio" if is_transposed else "blo,bli->boi"
                pair = (x_BLI, g_BLO) if is_transposed else (g_BLO, x_BLI)
                add(names["weight"], torch.einsum(spec, *pair))
            if "bias" in names:
                add(names["bias"], g_BLO.sum(1))

        output.register_hook(on_gradient)  # type: ignore[no-untyped-call]

    return hook


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _refuse_untrained_lora(params: Params) -> None:
    up = [p for name, p in params.items() if "lora_B" in name]
    if up and not any(bool(p.detach().any()) for p in up):
        raise FisherError(
            "every LoRA B is 0, so the Fisher of every A is 0: train the adapter before estimating"
        )
