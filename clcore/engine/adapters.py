"""The LoRA pairs of a PEFT model: find them, read them, and exchange them for pairs of another rank.

A pair is A (r, in) and B (out, r); the layer adds scaling * B A x to its output. One adapter, "default", is
what is trained, saved and served. A second one, "earlier", stands beside it only while a strategy trains a
fresh pair per task on top of frozen ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.pytorch_utils import Conv1D

from clcore.engine.errors import StrategyError
from clcore.engine.params import Params

TRAINED, EARLIER = "default", "earlier"
Pair = tuple[Tensor, Tensor]

NOT_PLAIN = (
    *("rank_pattern", "alpha_pattern", "use_dora", "lora_bias", "target_parameters"),
    *("modules_to_save", "trainable_token_indices"),
)
"""Options of a LoraConfig with which an adapter is more than one pair of one rank per layer."""


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the layers with a trained LoRA pair by name; names are those of the unwrapped model.

    Raises StrategyError for a layer whose adapter is no plain pair of Linear factors (DoRA, embeddings), and
    for a model without such layers.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    found = {}
    for name, layer in inner.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if TRAINED in layer.lora_variant:
            variant = type(layer.lora_variant[TRAINED]).__name__
            raise StrategyError(f"layer {name!r} has no plain LoRA pair but the variant {variant}")
        if TRAINED not in layer.lora_A or not isinstance(layer.lora_A[TRAINED], nn.Linear):
            raise StrategyError(f"layer {name!r} has no LoRA pair {TRAINED!r} of Linear factors")
        found[name] = layer
    if not found:
        raise StrategyError(f"no layer of {type(inner).__name__} has a LoRA pair")
    return found


def check_pairs(model: nn.Module) -> None:
    """Raise StrategyError unless a PEFT model trains one plain LoRA pair per layer, all of one rank."""
    configs: dict[str, Any] = _peft(model).peft_config
    config = configs.get(TRAINED)
    if config is None or config.peft_type != "LORA":
        kinds = {name: str(other.peft_type.value) for name, other in configs.items()}
        raise StrategyError(f"a LoRA adapter named {TRAINED!r} is needed, got {kinds}")
    options = {name: getattr(config, name, None) for name in NOT_PLAIN}
    options["bias"] = None if config.bias == "none" else config.bias
    for name, value in options.items():
        if value:
            raise StrategyError(
                f"{name}={value!r} is not supported here: a fresh pair per task needs one plain LoRA pair "
                "of one rank in every layer, and nothing trained beside them"
            )
    lora_layers(model)


def parameter_names(layer_name: str) -> tuple[str, str]:
    """Return the names of a layer's trained A and B."""
    return f"{layer_name}.lora_A.{TRAINED}.weight", f"{layer_name}.lora_B.{TRAINED}.weight"


def read_pair(layer: LoraLayer, adapter: str = TRAINED) -> Pair:
    """Return a layer's A (r, in) and B (out, r), detached, not copied."""
    a: Any = layer.lora_A[adapter]
    b: Any = layer.lora_B[adapter]
    return a.weight.detach(), b.weight.detach()


def set_pairs(model: nn.Module, pairs: Mapping[str, Pair], adapter: str = TRAINED) -> None:
    """Give every layer another pair, of any one rank for all layers; the scaling stays what it is.

    Raises KeyError for a layer without a pair, StrategyError for pairs of several ranks or another layer's
    shape, and where layers scale their pairs differently.
    """
    check_pairs(model)
    layers = lora_layers(model)
    for name, layer in layers.items():
        (a, b), (a_old, b_old) = pairs[name], read_pair(layer, adapter)
        if (a.shape[1], b.shape[0], b.shape[1]) != (a_old.shape[1], b_old.shape[0], a.shape[0]):
            shapes = f"A {tuple(a.shape)} and B {tuple(b.shape)}"
            raise StrategyError(f"a pair of shapes {shapes} does not fit layer {name!r}")
    ranks = sorted({pairs[name][0].shape[0] for name in layers})
    scalings = sorted({layer.scaling[adapter] for layer in layers.values()})
    if len(ranks) > 1 or len(scalings) > 1:
        raise StrategyError(f"all layers need one rank and one scaling, got {ranks} and {scalings}")
    config: Any = _peft(model).peft_config[adapter]
    alpha = scalings[0] * (math.sqrt(ranks[0]) if config.use_rslora else ranks[0])
    alpha = round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
    for name, layer in layers.items():
        old: Any = layer.lora_A[adapter]
        layer.lora_A[adapter], layer.lora_B[adapter] = (_linear(w, like=old.weight) for w in pairs[name])
        layer.r[adapter], layer.lora_alpha[adapter] = ranks[0], alpha
    config.r, config.lora_alpha = ranks[0], alpha


def assign_trained(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give the trained parameters stored values by name; LoRA pairs may have another rank than now.

    Raises KeyError when a name is missing.
    """
    if any(p.shape != values[name].shape for name, p in Params.of(model).items()):
        names = {name: parameter_names(name) for name in lora_layers(model)}
        set_pairs(model, {name: (values[a], values[b]) for name, (a, b) in names.items()})
    Params.of(model).assign(values)


def freeze_pairs(model: nn.Module) -> None:
    """Move the trained pairs to a second, frozen adapter; the trained pairs keep their values until set.

    The frozen pairs have no dropout: their tasks are over. Raises StrategyError as check_pairs does.
    """
    check_pairs(model)
    peft: Any = _peft(model)
    pairs = {name: read_pair(layer) for name, layer in lora_layers(model).items()}
    config: Any = copy.copy(peft.peft_config[TRAINED])
    config.lora_dropout = 0.0
    config.init_lora_weights = True  # the values come from the trained pairs; "pissa" would change the base
    peft.add_adapter(EARLIER, config)
    set_pairs(model, pairs, EARLIER)
    _activate(model, [EARLIER, TRAINED])


@contextmanager
def folded_pairs(model: nn.Module) -> Iterator[None]:
    """Compute with the frozen pairs inside the base weights, W + scaling B A: any number of them is free.

    The base weights come back bit for bit; meanwhile they are held twice, and the model with its adapters
    switched off is not the base model. Does nothing without frozen pairs, nor where a base weight is not
    float32: a coarser sum would lose what the pairs hold.
    """
    layers = lora_layers(model) if has_frozen_pairs(model) else {}
    bases: list[Any] = [layer.get_base_layer() for layer in layers.values()]
    if not bases or any(base.weight.dtype != torch.float32 for base in bases):
        yield
        return
    originals = [base.weight for base in bases]
    try:
        for layer, base in zip(layers.values(), bases, strict=True):
            a, b = read_pair(layer, EARLIER)
            change = layer.scaling[EARLIER] * (b @ a)
            weight = base.weight.detach() + (change.T if isinstance(base, Conv1D) else change)
            base.weight = nn.Parameter(weight, requires_grad=False)
        _activate(model, [TRAINED])
        yield
    finally:
        for base, original in zip(bases, originals, strict=True):
            base.weight = original
        _activate(model, [EARLIER, TRAINED])


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
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return isinstance(inner, PeftModel) and EARLIER in inner.peft_config


def _activate(model: nn.Module, adapters: Sequence[str]) -> None:
    """Compute with these adapters; PEFT would train all of them."""
    peft: Any = _peft(model)
    peft.base_model.set_adapter(list(adapters))
    for layer in lora_layers(model).values():
        layer.lora_A[EARLIER].requires_grad_(False)
        layer.lora_B[EARLIER].requires_grad_(False)


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
    return inner
