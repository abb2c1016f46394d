"""The diagonal Fisher information: of trainable parameters exactly, of whole layers as an outer product.

The gradient of one row with respect to a Linear weight is the sum over tokens of (output gradient) x (input).
Both factors of all rows are there after one backward pass of the summed loss: nothing runs row by row.
Targets are the labels of the data (the empirical Fisher), or, where a batch has "row_seeds" (B,), drawn from
the model itself at the same positions (an unbiased estimate of the Fisher).
Legend: B rows, L tokens, I in, O out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    of rows; the diagonal Fisher is sum / rows. A row is one observation: its gradient sums over its label
    tokens t and is squared after that, (sum_t g_t)^2. Runs in eval mode (no dropout) and leaves modes and
    gradients as they were. Local to this process.
    Cost: one forward and backward per batch; memory: one gradient per row of a batch.

    Raises FisherError for a parameter of the output head or outside Linear and Conv1D, or when every LoRA B
    is 0 (A's Fisher is then 0).
    Source: Kirkpatrick et al. 2017; which labels to take: van de Ven 2025 (arXiv 2502.11756).
    """
    _refuse_untrained_lora(params)
    inner = unwrapped(model)
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in params.items()}
    per_row: dict[str, Tensor] = {}
    hooks = [
        (module, _capture(names, per_row, isinstance(module, Conv1D)))
        for module, names in linear_modules(inner, params)
    ]
    num_rows = 0
    with _hooked(inner, hooks):
        for batch in batches:
            per_row.clear()
            batch_rows = _backward(inner, params, batch)
            for name, gradient_B in per_row.items():
                if gradient_B.shape[0] != batch_rows:  # completion_nll gives the head all rows as one
                    raise FisherError(
                        f"{name!r} belongs to the output head; take the head out of the adapter"
                    )
                total[name] += gradient_B.float().square().sum(0)
            num_rows += batch_rows
    return total, num_rows


@dataclasses.dataclass
class LayerMoments:
    """Sums of squares at one layer; those of several processes add up. Float32."""

    gradient_O: Tensor
    """Squared gradients of the log-likelihood with respect to the layer's output, over rows and tokens."""
    input_I: Tensor
    """Squared inputs, over rows and tokens that are not padding."""
    num_tokens: Tensor
    """Those tokens, a scalar."""


def layer_moments(
    model: nn.Module, params: Params, layers: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Tensor]]
) -> tuple[dict[str, LayerMoments], int]:
    """Sum squared output gradients and squared inputs of layers over all rows of the batches.

    Returns name of the layer -> sums, and the number of rows. With a = gradient_O / rows and
    b = input_I / num_tokens, a b^T approximates sum_t g_t^2 x_t^2 per row: the diagonal Fisher of the layer's
    weight with tokens as observations, if squared gradients and inputs are independent (the diagonal of
    K-FAC, Martens & Grosse 2015). That holds for every weight that the layer could have, so a zero LoRA B is
    no obstacle. params must lie in or below the layers. Modes, gradients and cost as in squared_gradients;
    memory: no more than a plain backward pass. Local to this process.

    Raises FisherError for a layer whose input is not (rows, tokens, in): the output head, an expert.
    """
    inner = unwrapped(model)
    moments: dict[str, LayerMoments] = {}
    mask: dict[str, Tensor] = {}
    hooks = [(layer, _capture_moments(name, moments, mask)) for name, layer in layers.items()]
    num_rows = 0
    with _hooked(inner, hooks):
        for batch in batches:
            mask["BL"] = batch["attention_mask"]
            num_rows += _backward(inner, params, batch)
    return moments, num_rows


def linear_modules(model: nn.Module, params: Params) -> list[tuple[nn.Module, dict[str, str]]]:
    """Return the modules that hold params, each with "weight" or "bias" -> name of the parameter.

    Raises FisherError for a parameter outside Linear and Conv1D.
    """
    wanted = {id(p): name for name, p in params.items()}
    found: list[tuple[nn.Module, dict[str, str]]] = []
    for module in unwrapped(model).modules():
        names = {kind: wanted[id(p)] for kind, p in module.named_parameters(recurse=False) if id(p) in wanted}
        if names and isinstance(module, nn.Linear | Conv1D):
            found.append((module, names))
    missing = sorted(set(params) - {name for _, names in found for name in names.values()})
    if missing:
        raise FisherError(f"per-sample gradients need Linear or Conv1D modules; {missing[0]!r} is in neither")
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, or the model itself."""
    inner: nn.Module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return inner


def _backward(model: nn.Module, params: Params, batch: Mapping[str, Tensor]) -> int:
    """Run the backward pass of a batch for its hooks alone; return the number of rows."""
    nll, _ = completion_nll(model, batch, row_seeds=batch.get("row_seeds"))
    # autograd.grad leaves every .grad alone.
    torch.autograd.grad(nll.sum(), list(params.values()), allow_unused=True)
    return nll.shape[0]


@contextmanager
def _hooked(model: nn.Module, hooks: Sequence[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Run the block in eval mode with gradients and with a forward hook on each of the modules."""
    modes = [(module, module.training) for module in model.modules()]
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode


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


def _capture_moments(
    name: str, moments: dict[str, LayerMoments], mask: Mapping[str, Tensor]
) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:  # the first pass of a checkpointed block
            return
        x_BLI, mask_BL = args[0].detach(), mask["BL"]
        if x_BLI.shape[:-1] != mask_BL.shape:
            raise FisherError(
                f"the Fisher of a layer needs inputs (rows, tokens, in) = {(*mask_BL.shape, 'in')}; {name!r} "
                f"got {tuple(x_BLI.shape)}; take the output head and experts out of the adapter"
            )

        def on_gradient(g_BLO: Tensor) -> None:
            is_token_BL = mask_BL.bool()
            new = LayerMoments(
                g_BLO.float().square().sum((0, 1)),
                x_BLI.float().square().mul_(is_token_BL.unsqueeze(-1)).sum((0, 1)),
                is_token_BL.sum(dtype=torch.float64),
            )
            old = moments.get(name)
            moments[name] = (
                new
                if old is None
                else LayerMoments(
                    old.gradient_O + new.gradient_O,
                    old.input_I + new.input_I,
                    old.num_tokens + new.num_tokens,
                )
            )

        output.register_hook(on_gradient)  # type: ignore[no-untyped-call]

    return hook


def _refuse_untrained_lora(params: Params) -> None:
    up = [p for name, p in params.items() if "lora_B" in name]
    if up and not any(bool(p.detach().any()) for p in up):
        raise FisherError(
            "every LoRA B is 0, so the Fisher of every A is 0: train the adapter before estimating"
        )
