"""Where AdaptiveSVD finds the directions to protect: inputs of layers, and weights with a rank per layer.

Legend: N sampled tokens, I in, O out, K directions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clcore.engine import parallel
from clcore.engine.adapters import EARLIER, lora_layers, parameter_names, read_pair
from clcore.engine.errors import StrategyError
from clcore.engine.fisher import unwrapped
from clcore.engine.loss import completion_nll
from clcore.engine.params import Params
from clcore.engine.tasks import Example, collate
from clcore.strategies.subspace import orthonormal, top_directions

TOKENS_PER_ROW = 8
"""Tokens of a row whose inputs are looked at: evenly spaced, the last one among them."""
BATCH_ROWS = 8
MOST_OF_A_LAYER = 0.95
"""Share of a layer's directions that the adaptive rank protects at most."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A trained layer and the parameters through which its inputs and outputs can be protected."""

    module: nn.Module
    input_parameter: str
    output_parameter: str
    is_transposed: bool = False
    """The one weight of a Conv1D is (in, out)."""


def trained_layers(model: nn.Module, params: Params) -> dict[str, Layer]:
    """Return the layers that are trained, by LoRA pairs or by full weights.

    Raises StrategyError for a trained parameter that is neither: it could not be protected.
    """
    inner = unwrapped(model)
    if any("lora_" in name for name in params):
        pairs: dict[str, Any] = dict(lora_layers(model))
        found = {name: Layer(layer, *parameter_names(name)) for name, layer in pairs.items()}
    else:
        modules = dict(inner.named_modules())
        found = {}
        for parameter in params:
            name = parameter.removesuffix(".weight")
            if name != parameter and isinstance(modules[name], nn.Linear | Conv1D):
                is_transposed = isinstance(modules[name], Conv1D)
                found[name] = Layer(modules[name], parameter, parameter, is_transposed)
    covered = {p for layer in found.values() for p in (layer.input_parameter, layer.output_parameter)}
    odd = sorted(set(params) - covered)
    if odd:
        raise StrategyError(
            f"{odd[0]!r} is trained but is neither a LoRA factor nor the weight of a Linear layer"
        )
    return found


@torch.no_grad()
def sample_inputs(
    model: nn.Module, layers: Mapping[str, Layer], rows: Sequence[Example]
) -> dict[str, Tensor]:
    """Return layer name -> inputs (N, I) at sampled tokens of the rows, in eval mode; the same on every rank.

    Every rank runs its share of the rows. A layer that a row does not reach has zeros there. Memory: N * I
    numbers per layer. Raises StrategyError for a layer whose inputs are not (rows, tokens, in): an expert.
    """
    inner = unwrapped(model)
    device = next(inner.parameters()).device
    found = {
        name: torch.zeros((len(rows), TOKENS_PER_ROW, _width(layer)), device=device)
        for name, layer in layers.items()
    }
    where: list[Tensor] = []

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0].dim() != 3:
                shape = tuple(args[0].shape)
                raise StrategyError(f"layer {name!r} sees inputs of shape {shape}, not (rows, tokens, in)")
            numbers, rows_B1, tokens_BT = where
            found[name][numbers] = args[0][rows_B1, tokens_BT].float()

        return hook

    mine = list(range(len(rows)))[parallel.rank() :: parallel.world_size()]
    with _evaluating(inner), ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.module.register_forward_pre_hook(keep(name)).remove)
        for start in range(0, len(mine), BATCH_ROWS):
            numbers = mine[start : start + BATCH_ROWS]
            examples = [rows[i] for i in numbers]
            tokens = [torch.linspace(0, len(e["input_ids"]) - 1, TOKENS_PER_ROW) for e in examples]
            tokens_BT = torch.stack(tokens).round().long()
            where[:] = [torch.tensor(numbers), torch.arange(len(numbers)).unsqueeze(1), tokens_BT]
            where[:] = [tensor.to(device) for tensor in where]
            completion_nll(inner, collate(examples, 0, device))
    for x_NTI in found.values():  # one by one: in one bucket they would need their memory twice
        parallel.all_reduce_sum([x_NTI])
    return {name: x_NTI.flatten(0, 1) for name, x_NTI in found.items()}


@torch.no_grad()
def current_weight(layer: Layer) -> Tensor:
    """Return the layer's weight (O, I) in float32 with the frozen pairs of earlier tasks added.

    Raises StrategyError for a weight that is not stored as floating-point numbers.
    """
    base = _base(layer)
    if not base.weight.is_floating_point():
        raise StrategyError(
            f"source 'weights' needs floating-point weights, got {base.weight.dtype}; use 'activations'"
        )
    weight: Tensor = base.weight.detach().float()
    weight = weight.T if isinstance(base, Conv1D) else weight
    module: Any = layer.module
    if EARLIER in getattr(module, "lora_A", {}):
        a, b = read_pair(module, EARLIER)
        weight = weight + float(module.scaling[EARLIER]) * (b.float() @ a.float())
    return weight


def adaptive_ranks(
    weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor], *, least: float, target: float
) -> dict[str, int]:
    """Return how many directions of each layer to protect (Nayak et al. 2025, "Sculpting Subspaces").

    share = least + I (target - least) of the smaller side, where I is the layer's importance over the mean of
    all layers. The paper takes I from cos(x, W x), which exists for square layers only and has either sign;
    here it is the mean of cos(x, W^T W x), in [0, 1] for any shape: how far the inputs lie along the
    directions that the layer amplifies.
    """
    importance = {
        name: float(nn.functional.cosine_similarity(x, x @ weights[name].T @ weights[name], dim=1).mean())
        for name, x in inputs.items()
    }
    mean = sum(importance.values()) / len(importance)
    ranks = {}
    for name, weight in weights.items():
        relative = importance[name] / mean if mean > 0 else 1.0
        share = min(least + relative * (target - least), MOST_OF_A_LAYER)
        ranks[name] = int(share * min(weight.shape) + 1e-6)  # 0.29 of 100 is 29, whatever the rounding
    return ranks


def weight_directions(weight_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the leading right (K, I) and left (K, O) singular directions of a weight."""
    right = top_directions(weight_OI, max_rank=rank)
    return right, orthonormal((weight_OI.double() @ right.double().T).T)


def strongest_rows(rows_ND: Tensor, max_rank: int) -> Tensor:
    """Compress rows to at most max_rank rows with nearly the same Gram matrix: S V^T of their SVD."""
    directions = top_directions(rows_ND, max_rank=max_rank)
    scales_K: Tensor = (rows_ND @ directions.T).norm(dim=0)
    return scales_K.unsqueeze(1) * directions


def _base(layer: Layer) -> Any:
    """Return the Linear or Conv1D itself."""
    module: Any = layer.module
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _width(layer: Layer) -> int:
    base = _base(layer)
    return int(base.weight.shape[0] if isinstance(base, Conv1D) else base.in_features)


@contextmanager
def _evaluating(model: nn.Module) -> Any:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
