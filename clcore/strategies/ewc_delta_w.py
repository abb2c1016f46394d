"""EWC in the space of weights: LoRA's B A, the change of each layer's weight, with rank-1 Fishers.

Legend: M layers, T tasks, O out, I in, R rank, K = R without an anchor and 2R with one, X = T * K.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clcore.engine import parallel
from clcore.engine.errors import FisherError
from clcore.engine.fisher import LayerMoments, layer_moments, unwrapped
from clcore.engine.params import Params
from clcore.strategies.ewc_factors import Tensors, check_shapes, gradients, load_like

CHUNK_ELEMENTS = 1 << 20
"""Layers of one shape are worked on together as long as their temporaries stay below this, in elements."""


@dataclasses.dataclass(frozen=True)
class LoraPair:
    """A plain LoRA layer under training: its change of weight is dW = scale * B @ A."""

    layer: str
    a_name: str
    b_name: str
    rank: int
    scale: float


@dataclasses.dataclass(frozen=True)
class _Stack:
    """Layers of one shape together: M layers, T tasks, O out, I in, R rank."""

    pairs: Sequence[LoraPair]
    a_MOT: Tensor
    """Squared output gradients, times scale^2."""
    b_MTI: Tensor
    anchor_MRI: Tensor | None
    anchor_MOR: Tensor | None

    def factors(self, params: Tensors) -> tuple[Tensor, Tensor]:
        a_MRI = torch.stack([params[pair.a_name] for pair in self.pairs]).float()
        b_MOR = torch.stack([params[pair.b_name] for pair in self.pairs]).float()
        return a_MRI, b_MOR

    def weighted(self, a_MRI: Tensor, b_MOR: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return U, V with U V = dW - dW* (up to scale), and all tasks' diag(a) U and V diag(b) side by side.

        K is R without an anchor and 2R with one. B A - B* A* = (B - B*) A + B* (A - A*) has no cancellation
        near the anchor, unlike [B, -B*] [A; A*].
        """
        if self.anchor_MRI is None or self.anchor_MOR is None:
            u_MOK, v_MKI = b_MOR, a_MRI
        else:
            u_MOK = torch.cat([b_MOR - self.anchor_MOR, self.anchor_MOR], dim=2)
            v_MKI = torch.cat([a_MRI, a_MRI - self.anchor_MRI], dim=1)
        au_MOTK = self.a_MOT.unsqueeze(3) * u_MOK.unsqueeze(2)
        vb_MTKI = self.b_MTI.unsqueeze(2) * v_MKI.unsqueeze(1)
        return u_MOK, v_MKI, au_MOTK.flatten(2), vb_MTKI.flatten(1, 2)

    def value(self, params: Tensors) -> Tensor:
        """Return sum_k scale^2 < U^T diag(a_k) U , V diag(b_k) V^T > over the layers."""
        u_MOK, v_MKI, au_MOX, vb_MXI = self.weighted(*self.factors(params))  # X = T * K
        left_MKX = u_MOK.transpose(1, 2) @ au_MOX
        right_MXK = vb_MXI @ v_MKI.transpose(1, 2)
        return (left_MKX * right_MXK.transpose(1, 2)).sum()

    def half_gradient(self, params: Tensors) -> tuple[Tensor, Tensor]:
        """Return half the value's gradient with respect to A, (M, R, I), and B, (M, O, R).

        With G = scale^2 sum_k a_k b_k^T o (U V), which is never formed, it is B^T G and G A^T.
        """
        a_MRI, b_MOR = self.factors(params)
        _, _, au_MOX, vb_MXI = self.weighted(a_MRI, b_MOR)
        grad_a_MRI = (b_MOR.transpose(1, 2) @ au_MOX) @ vb_MXI
        grad_b_MOR = au_MOX @ (vb_MXI @ a_MRI.transpose(1, 2))
        return grad_a_MRI, grad_b_MOR


class DeltaW:
    """The change of each LoRA layer's weight, dW = scale * B A, with one rank-1 Fisher per task and layer.

        value = sum_k sum_oi a_k,o b_k,i (dW - dW*)_oi^2

    a = sum over rows and tokens of the squared gradient at the layer's output / rows, (O,); b = mean squared
    input over tokens, (I,). a b^T is in nats^2 per squared unit of the layer's weight, with tokens as
    observations (see fisher.layer_moments). It protects the function and not a coordinate system:
    (A, B) -> (R A, B R^-1) changes nothing. dW* is the latest one for all tasks, and 0 when each task trains
    a fresh pair beside frozen ones. dW is never formed: cost per step 8 T R^2 (O + I) multiplications per
    layer, memory O + I per task and layer beside the anchor.

    Source: K-FAC's diagonal (Martens & Grosse 2015); penalty on dW: EWC-LoRA (arXiv 2602.17559).
    """

    def __init__(
        self,
        pairs: Sequence[LoraPair],
        fisher: Mapping[str, tuple[Tensor, Tensor]],
        anchor: Tensors | None,
    ) -> None:
        """fisher: layer -> all tasks' a, (T, O), and b, (T, I); anchor None: zero displacement."""
        self.pairs = pairs
        self.fisher = dict(fisher)
        self._stack(anchor)

    @staticmethod
    def check(model: nn.Module, params: Params) -> None:
        """Raise FisherError unless all params are the A and B of plain LoRA layers."""
        lora_pairs(model, params)

    @staticmethod
    def estimate(
        model: nn.Module, params: Params, batches: Iterable[Tensors], *, normalize: bool
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], float, int]:
        """Return layer -> (a, b) over all ranks' rows, the largest a * b before normalising, and rows.

        normalize: divide every a by the largest value that a b^T takes over the model.
        """
        pairs = lora_pairs(model, params)
        layers = {pair.layer: unwrapped(model).get_submodule(pair.layer) for pair in pairs}
        found, local_rows = layer_moments(model, params, layers, batches)
        sums = {pair.layer: found.get(pair.layer) or _no_moments(pair, params) for pair in pairs}
        parallel.all_reduce_sum(
            [t for m in sums.values() for t in (m.gradient_O, m.input_I, m.num_tokens)],
        )
        num_rows = int(parallel.sum_over_ranks([local_rows])[0])
        fisher = {
            layer: (m.gradient_O / num_rows, m.input_I / m.num_tokens.float().clamp(min=1))
            for layer, m in sums.items()
        }
        largest = max(float(a_O.max() * b_I.max()) for a_O, b_I in fisher.values())
        divisor = largest if normalize and largest > 0 else 1.0
        return {layer: (a_O / divisor, b_I) for layer, (a_O, b_I) in fisher.items()}, largest, num_rows

    @classmethod
    def first(
        cls, fisher: Mapping[str, tuple[Tensor, Tensor]], model: nn.Module, params: Params, *, is_fresh: bool
    ) -> DeltaW:
        """Return the penalty of a first task, anchored at the present dW."""
        rows = {layer: (a_O.unsqueeze(0), b_I.unsqueeze(0)) for layer, (a_O, b_I) in fisher.items()}
        return cls(lora_pairs(model, params), rows, None if is_fresh else params)

    def add(
        self, fisher: Mapping[str, tuple[Tensor, Tensor]], theta: Tensors, gamma: float | None = None
    ) -> None:
        """Add a task's Fisher, the old ones times gamma (None: 1), and move the anchor, if any, to theta."""
        fade = 1.0 if gamma is None else gamma
        for layer, (a_O, b_I) in fisher.items():
            a_TO, b_TI = self.fisher[layer]
            self.fisher[layer] = (torch.cat([fade * a_TO, a_O[None]]), torch.cat([b_TI, b_I[None]]))
        self._stack(theta if self.anchor else None)

    @property
    def anchor(self) -> dict[str, Tensor]:
        """Parameter's name -> its value at the anchor; {} for zero displacement."""
        found: dict[str, Tensor] = {}
        for stack in self.stacks:
            if stack.anchor_MRI is not None and stack.anchor_MOR is not None:
                found.update((p.a_name, a) for p, a in zip(stack.pairs, stack.anchor_MRI, strict=True))
                found.update((p.b_name, b) for p, b in zip(stack.pairs, stack.anchor_MOR, strict=True))
        return found

    def value(self, params: Tensors) -> Tensor:
        """Return the weighted squared displacement, a scalar with its graph."""
        return torch.stack([stack.value(params) for stack in self.stacks]).sum()

    @torch.no_grad()
    def add_gradient(self, params: Tensors, strength: float) -> None:
        """Add strength times half the value's gradient to every .grad."""
        for stack in self.stacks:
            grad_a_MRI, grad_b_MOR = stack.half_gradient(params)
            names = [*(p.a_name for p in stack.pairs), *(p.b_name for p in stack.pairs)]
            pulls = [*grad_a_MRI.unbind(), *grad_b_MOR.unbind()]
            torch._foreach_add_(gradients(params[name] for name in names), pulls, alpha=strength)

    def means(self) -> dict[str, float]:
        """Return each layer's mean importance per weight, summed over tasks."""
        return {layer: float(a_TO.mean(1) @ b_TI.mean(1)) for layer, (a_TO, b_TI) in self.fisher.items()}

    def state(self) -> dict[str, Any]:
        return {
            "space": "delta_w",
            "a": {layer: a_TO for layer, (a_TO, _) in self.fisher.items()},
            "b": {layer: b_TI for layer, (_, b_TI) in self.fisher.items()},
            "anchor": self.anchor,
        }

    @classmethod
    def load(cls, state: Mapping[str, Any], model: nn.Module, params: Params, *, is_fresh: bool) -> DeltaW:
        """Take what state returned. Raises StateError when it belongs to other layers or another adapter.

        is_fresh: the anchor is not looked at. State of fresh pairs has none: the present parameters, which
        hold everything learnt, take its place.
        """
        pairs = lora_pairs(model, params)
        shapes = {p.layer: (params[p.b_name].shape[0], params[p.a_name].shape[1]) for p in pairs}
        stored = {layer: (np.shape(a)[1], np.shape(state["b"][layer])[1]) for layer, a in state["a"].items()}
        check_shapes(stored, shapes)
        device = params[pairs[0].a_name].device
        a, b = (
            {p.layer: torch.tensor(state[key][p.layer], device=device) for p in pairs} for key in ("a", "b")
        )
        anchor: Tensors | None = None
        if not is_fresh:
            anchor = load_like(params, state["anchor"]) if state["anchor"] else params
        return cls(pairs, {layer: (a[layer], b[layer]) for layer in a}, anchor)

    @torch.no_grad()
    def _stack(self, anchor: Tensors | None) -> None:
        by_shape: dict[tuple[int, ...], list[LoraPair]] = {}
        for pair in self.pairs:
            a_TO, b_TI = self.fisher[pair.layer]
            by_shape.setdefault((pair.rank, *a_TO.shape, b_TI.shape[1]), []).append(pair)
        stacks = []
        for (rank, num_tasks, num_out, num_in), pairs in by_shape.items():
            size = max(1, CHUNK_ELEMENTS // (num_tasks * (num_out + num_in) * 2 * rank))
            for chunk in (pairs[i : i + size] for i in range(0, len(pairs), size)):
                a_MTO = torch.stack([self.fisher[p.layer][0] * p.scale**2 for p in chunk])
                b_MTI = torch.stack([self.fisher[p.layer][1] for p in chunk])
                anchors = [
                    None if anchor is None else torch.stack([anchor[name].float() for name in names])
                    for names in ([p.a_name for p in chunk], [p.b_name for p in chunk])
                ]
                stacks.append(_Stack(chunk, a_MTO.transpose(1, 2).contiguous(), b_MTI, *anchors))
        self.stacks = stacks


def lora_pairs(model: nn.Module, params: Params) -> list[LoraPair]:
    """Find the plain LoRA layers whose A and B are in params.

    Raises FisherError for a parameter that is neither, for DoRA and other variants, and for two trainable
    pairs at one layer.
    """
    names = {id(p): name for name, p in params.items()}
    pairs: list[LoraPair] = []
    for layer_name, layer in unwrapped(model).named_modules():
        if not isinstance(layer, LoraLayer) or not isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
            continue
        trained = [
            adapter
            for adapter, a in layer.lora_A.items()
            if isinstance(a, nn.Linear)
            and id(a.weight) in names
            and id(layer.lora_B[adapter].weight) in names
            and adapter not in layer.lora_variant
        ]
        if len(trained) > 1:
            raise FisherError(
                f"space 'delta_w' needs one trainable adapter per layer, {layer_name!r} has {trained}"
            )
        for adapter in trained:
            a_name, b_name = names[id(layer.lora_A[adapter].weight)], names[id(layer.lora_B[adapter].weight)]
            rank, scale = params[a_name].shape[0], float(layer.scaling[adapter])
            pairs.append(LoraPair(layer_name, a_name, b_name, rank, scale))
    missing = sorted(set(params) - {name for pair in pairs for name in (pair.a_name, pair.b_name)})
    if missing:
        raise FisherError(
            f"space 'delta_w' needs plain LoRA on Linear or Conv1D; {missing[0]!r} is something else; "
            f"space 'factors' may take it"
        )
    return pairs


def _no_moments(pair: LoraPair, params: Params) -> LayerMoments:
    """Return the sums of a layer that this rank's rows never ran through."""
    a, b = params[pair.a_name], params[pair.b_name]
    zero = torch.zeros((), dtype=torch.float64, device=a.device)
    return LayerMoments(
        torch.zeros(b.shape[0], device=b.device), torch.zeros(a.shape[1], device=a.device), zero
    )
