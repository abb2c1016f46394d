"""Snapshots: what a model has learnt after each task, and a visit back to it.

A snapshot holds the adapter only, on the CPU, name -> tensor. The base model is the same after every task, so
no copy of a model is ever made. Of a model without PEFT a snapshot holds the trainable parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from clcore.engine.adapters import TRAINED, assign_trained, lora_layers
from clcore.engine.errors import StateError
from clcore.engine.fisher import unwrapped
from clcore.engine.params import Params

Snapshot = Mapping[str, Tensor]


def adapter_parameters(model: nn.Module) -> Params:
    """Return what makes the model differ from its base: adapters, frozen ones too, and what else trains.

    Includes AdaLoRA's ranks (ranknum): they scale the output. Buffers are not parameters and not included.
    """
    inner = unwrapped(model)
    adapters: set[int] = set()
    for module in inner.modules():
        if isinstance(module, BaseTunerLayer):
            for name in (*module.adapter_layer_names, *module.other_param_names):
                container = getattr(module, name, None)
                if isinstance(container, nn.Module):
                    adapters.update(map(id, container.parameters()))
    return Params({n: p for n, p in inner.named_parameters() if p.requires_grad or id(p) in adapters})


def take_snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copy the adapter's parameters to the CPU; types stay. Cost: the adapter's size, not the model's."""
    return {name: p.detach().to("cpu", copy=True) for name, p in adapter_parameters(model).items()}


@contextmanager
def restore(model: nn.Module, snapshot: Snapshot) -> Iterator[None]:
    """Compute with a snapshot inside the block; the present weights come back bit for bit after it.

    They come back after an exception too. Parameters stay the same objects, so an optimizer goes on with
    them. LoRA pairs of the snapshot may have another rank than now: a strategy that owns the adapter adds
    ranks with each task.

    Raises StateError for a snapshot whose names or shapes do not fit the model.
    """
    present = adapter_parameters(model)
    missing = sorted(set(present) ^ set(snapshot))
    if missing:
        whose = "the model" if missing[0] in snapshot else "the snapshot"
        raise StateError(f"the snapshot does not fit the model: {whose} has no {missing[0]!r}")
    odd = [name for name, p in present.items() if p.shape != snapshot[name].shape]
    if odd:
        if any(".lora_A." not in name and ".lora_B." not in name for name in odd):
            shapes = f"{tuple(snapshot[odd[0]].shape)} in the snapshot, {tuple(present[odd[0]].shape)} now"
            raise StateError(f"the snapshot does not fit the model: {odd[0]!r} has shape {shapes}")
        with _pairs_kept(model):
            assign_trained(model, snapshot)
            yield
        return
    kept = present.copies()
    try:
        present.assign(snapshot)
        yield
    finally:
        present.assign(kept)


@contextmanager
def _pairs_kept(model: nn.Module) -> Iterator[None]:
    """Put the very modules of all LoRA pairs back after the block, with their values, ranks and scales."""
    layers = lora_layers(model)
    values = Params.of(model).copies()
    parameters = dict(Params.of(model).items())
    inner: Any = unwrapped(model)
    config = inner.peft_config[TRAINED]
    numbers = config.r, config.lora_alpha
    kept = [
        (layer.lora_A[TRAINED], layer.lora_B[TRAINED], layer.r[TRAINED], layer.lora_alpha[TRAINED])
        for layer in layers.values()
    ]
    try:
        yield
    finally:
        for layer, (a, b, rank, alpha) in zip(layers.values(), kept, strict=True):
            layer.lora_A[TRAINED], layer.lora_B[TRAINED] = a, b
            layer.r[TRAINED], layer.lora_alpha[TRAINED] = rank, alpha
        config.r, config.lora_alpha = numbers
        Params(parameters).assign(values)
