"""The LoRA pairs of a PEFT model: find them, read them, and exchange them for pairs of another rank.

A pair is A (r, in) and B (out, r); the layer adds scaling * B A x to its output. One adapter, "default", is
what is trained, saved and served. A second one, "earlier", stands beside it only while a strategy trains a
fresh pair per task on top of frozen ones.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clcore.engine.errors import StrategyError

TRAINED, EARLIER = "default", "earlier"
Pair = tuple[Tensor, Tensor]


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the layers with a trained LoRA pair by name; names are those of the unwrapped model.

    Raises StrategyError for a layer whose adapter is no plain pair of Linear factors (DoRA, embeddings).
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    found = {}
    for name, layer in inner.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if TRAINED not in layer.lora_A or TRAINED in layer.lora_variant:
            raise StrategyError(f"layer {name!r} has no plain LoRA pair of Linear factors")
        found[name] = layer
    return found


def parameter_names(layer_name: str) -> tuple[str, str]:
    """Return the names of a layer's trained A and B."""
    return f"{layer_name}.lora_A.{TRAINED}.weight", f"{layer_name}.lora_B.{TRAINED}.weight"


def read_pair(layer: LoraLayer, adapter: str = TRAINED) -> Pair:
    """Return a layer's A (r, in) and B (out, r), detached, not copied."""
    a: Any = layer.lora_A[adapter]
    b: Any = layer.lora_B[adapter]
    return a.weight.detach(), b.weight.detach()


def set_pairs(model: nn.Module, pairs: Mapping[str, Pair], adapter: str = TRAINED) -> None:
    """Give every layer another pair, of any one rank for all layers; the scaling stays what it is."""
    layers = lora_layers(model)
    rank = next(iter(pairs.values()))[0].shape[0]
    for name, layer in layers.items():
        a, b = pairs[name]
        old: Any = layer.lora_A[adapter]
        layer.lora_A[adapter] = _linear(a, like=old.weight)
        layer.lora_B[adapter] = _linear(b, like=old.weight)
        layer.r[adapter], layer.lora_alpha[adapter] = rank, layer.scaling[adapter] * rank
    config: Any = _peft(model).peft_config[adapter]
    config.r, config.lora_alpha = rank, next(iter(layers.values())).scaling[adapter] * rank


def assign_trained(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give the trained adapter stored values by parameter name; the pairs may have another rank than now.

    Raises KeyError when a name is missing.
    """
    layers = lora_layers(model)
    set_pairs(model, {name: tuple(values[key] for key in parameter_names(name)) for name in layers})  # type: ignore[misc]
    with torch.no_grad():
        for name, parameter in _peft(model).named_parameters():
            if parameter.requires_grad:
                parameter.copy_(values[name])


def freeze_pairs(model: nn.Module) -> None:
    """Move the trained pairs to a second, frozen adapter; the trained pairs keep their values until set."""
    peft = _peft(model)
    pairs = {name: read_pair(layer) for name, layer in lora_layers(model).items()}
    config: Any = copy.copy(peft.peft_config[TRAINED])
    config.lora_dropout = 0.0
    peft.add_adapter(EARLIER, config)
    set_pairs(model, pairs, EARLIER)
    peft.base_model.set_adapter([EARLIER, TRAINED])
    for layer in lora_layers(model).values():
        layer.lora_A[EARLIER].requires_grad_(False)
        layer.lora_B[EARLIER].requires_grad_(False)


def join_pairs(model: nn.Module) -> None:
    """Stack the frozen pairs and the trained ones to one trained adapter that computes their sum."""
    peft = _peft(model)
    joined = {}
    for name, layer in lora_layers(model).items():
        (a_old, b_old), (a_new, b_new) = read_pair(layer, EARLIER), read_pair(layer)
        joined[name] = (torch.cat([a_old, a_new]), torch.cat([b_old, b_new], dim=1))
    peft.delete_adapter(EARLIER)
    set_pairs(model, joined)
    peft.set_adapter(TRAINED)


def has_frozen_pairs(model: nn.Module) -> bool:
    """Say whether earlier pairs stand beside the trained ones."""
    return EARLIER in _peft(model).peft_config


def _linear(weight: Tensor, like: Tensor) -> nn.Linear:
    """Make a Linear without bias; a copy of weight with the device, type and need for gradients of like."""
    out_features, in_features = weight.shape
    made = nn.Linear(in_features, out_features, bias=False, device="meta")
    value = weight.detach().to(like.device, like.dtype, copy=True)
    made.weight = nn.Parameter(value, requires_grad=like.requires_grad)
    return made


def _peft(model: nn.Module) -> PeftModel:
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    if not isinstance(inner, PeftModel):
        raise StrategyError(f"a PEFT model is needed, got {type(inner).__name__}")
    if inner.peft_config[TRAINED].rank_pattern:  # type: ignore[union-attr]
        raise StrategyError("rank_pattern is not supported: every layer's pair must have one rank")
    return inner
