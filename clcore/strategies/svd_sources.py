"""Where AdaptiveSVD finds the directions to protect: inputs of layers, and weights with a rank per layer.

Legend: N sampled tokens, I in, O out, K directions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clcore.engine import parallel
from clcore.engine.adapters import EARLIER, lora_layers, parameter_names, read_pair
from clcore.engine.errors import StrategyError
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
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if any("lora_" in name for name in params):
        found = {name: Layer(layer, *parameter_names(name)) for name, layer in lora_layers(model).items()}
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
def sample_inputs(model: nn.Module, layers: Mapping[str, Layer], rows: Sequence[Example]) -> dict[str, Tensor]:
    """Return layer name -> inputs (N, I) at sampled tokens of the rows, in eval mode; the same on every rank.

    Every rank runs its share of the rows.
    """
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    device = next(inner.parameters()).device
    found: dict[str, Tensor] = {}
    rank, world = parallel.rank(), parallel.world_size()
    mine = list(range(len(rows)))[rank::world]
    here: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            here[name] = args[0].detach()

        return hook

    with _evaluating(inner), ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.module.register_forward_pre_hook(keep(name)).remove)
        for start in range(0, len(mine), BATCH_ROWS):
            numbers = mine[start : start + BATCH_ROWS]
            examples = [rows[i] for i in numbers]
            batch = collate(examples, 0, device)
            inner(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            positions = [
                torch.linspace(0, len(e["input_ids"]) - 1, TOKENS_PER_ROW).round().long() for e in examples
            ]
            for name, x_BLI in here.items():
                if name not in found:
                    found[name] = x_BLI.new_zeros(
                        (len(rows), TOKENS_PER_ROW, x_BLI.shape[-1]), dtype=torch.float32
                    )
                for i, (number, position) in enumerate(zip(numbers, positions, strict=True)):
                    found[name][number] = x_BLI[i, position.to(device)].float()
    for name, layer in layers.items():
        if name not in found:  # a rank without rows
            found[name] = torch.zeros((len(rows), TOKENS_PER_ROW, _width(layer)), device=device)
    ordered = {name: found[name] for name in layers}
    parallel.all_reduce_sum(list(ordered.values()))
    return {name: x.flatten(0, 1) for name, x in ordered.items()}


@torch.no_grad()
def current_weight(layer: Layer) -> Tensor:
    """Return the layer's weight (O, I) in float32 with the frozen pairs of earlier tasks added.

    Raises StrategyError for a weight that is not stored as floating-point numbers.
    """
    module: Any = layer.module
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if not base.weight.is_floating_point():
        raise StrategyError(
            f"source 'weights' needs floating-point weights, got {base.weight.dtype}; use 'activations'"
        )
    weight = base.weight.detach().float()
    weight = weight.T if isinstance(base, Conv1D) else weight
    if isinstance(module, LoraLayer) and EARLIER in module.lora_A:
        a, b = read_pair(module, EARLIER)
        weight = weight + module.scaling[EARLIER] * (b.float() @ a.float())
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
        ranks[name] = int(share * min(weight.shape))
    return ranks


def weight_directions(weight_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the leading right (K, I) and left (K, O) singular directions of a weight."""
    if weight_OI.shape[1] <= weight_OI.shape[0]:
        right = top_directions(weight_OI, max_rank=rank)
        return right, orthonormal((weight_OI.double() @ right.double().T).T)
    left = top_directions(weight_OI.T, max_rank=rank)
    return orthonormal(left.double() @ weight_OI.double()), left


def strongest_rows(rows_ND: Tensor, max_rank: int) -> Tensor:
    """Compress rows to at most max_rank rows with nearly the same Gram matrix: S V^T of their SVD."""
    directions = top_directions(rows_ND, max_rank=max_rank)
    return (rows_ND @ directions.T).norm(dim=0).unsqueeze(1) * directions


def _width(layer: Layer) -> int:
    module: Any = layer.module
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
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
