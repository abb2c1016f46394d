"""How alike are two tasks or two adapters?

Two LoRA deltas are compared by the principal angles between their row spaces (which inputs they read) or
column spaces (which outputs they write), from the factors: nothing of the size of a weight is formed. Two
sets of activations are compared by linear CKA, two vectors by their cosine.
Legend: O out, I in, R rank, N rows, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from clcore.engine.errors import ConfigError, DataError

Factors = tuple[Tensor, Tensor]
"""U (O, R) and V (R, I); their product is the change of a layer's weight, up to a positive scale."""
Side = Literal["row", "column"]

_KNOWN = ("lora_A", "lora_B", "lora_E", "ranknum")


def lora_factors(snapshot: Mapping[str, Tensor], adapter: str = "default") -> dict[str, Factors]:
    """Read every layer's LoRA delta from a snapshot as factors, name of the layer -> (U, V), float64.

    U = B and V = A; of AdaLoRA V = diag(E) A, so that a pruned rank counts for nothing. The layer's scale, a
    positive number, is left out: no angle depends on it.

    Raises ConfigError for what is no product of two factors: DoRA's magnitudes, embeddings, convolutions, a
    layer whose pair is incomplete; and for a snapshot without a LoRA pair of this adapter.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in snapshot.items():
        words = name.split(".")
        kind = next((word for word in words if word.startswith("lora_") or word == "ranknum"), None)
        if kind is None:
            continue
        layer, _, rest = name.partition(f".{kind}.")
        if rest.split(".")[0] != adapter:
            continue
        if kind not in _KNOWN or (kind != "ranknum" and value.dim() != 2):
            raise ConfigError(
                f"the delta of {layer!r} is not the product of two LoRA matrices: it has {kind} of shape "
                f"{tuple(value.shape)}; only LoRA and AdaLoRA of linear layers can be compared"
            )
        if not rest.endswith("bias"):
            parts.setdefault(layer, {})[kind] = value.detach().double()
    if not parts:
        raise ConfigError(f"the snapshot holds no LoRA pair of adapter {adapter!r}")
    found = {}
    for layer, part in parts.items():
        if "lora_A" not in part or "lora_B" not in part:
            raise ConfigError(f"the snapshot holds only {', '.join(part)} of {layer!r}; A and B are needed")
        a, b = part["lora_A"], part["lora_B"]
        found[layer] = (b, a * part["lora_E"] if "lora_E" in part else a)
    return found


def change_factors(before: Mapping[str, Factors], after: Mapping[str, Factors]) -> dict[str, Factors]:
    """Return after - before per layer as factors: U V - U0 V0 = [U, -U0] [V; V0].

    Both must come from one adapter, whose scale did not change. Raises ConfigError for other layers.
    """
    _check_layers(before, after)
    return {
        layer: (torch.cat([u, -before[layer][0]], dim=1), torch.cat([v, before[layer][1]]))
        for layer, (u, v) in after.items()
    }


def basis(factors: Factors, side: Side) -> Tensor:
    """Return an orthonormal basis of the row space (I, K) or the column space (O, K) of U V.

    K is the numerical rank: singular values up to max(O, I) x float64 epsilon x the largest count as 0; a
    product of zeros has K = 0. Cost: QR of both factors and an SVD of an R x R matrix.
    """
    if side not in ("row", "column"):
        raise ConfigError(f"side must be row or column, got {side!r}")
    u, v = (factor.double() for factor in factors)
    left_OR, r_left = torch.linalg.qr(u)
    right_IR, r_right = torch.linalg.qr(v.T)
    x, values, y_t = torch.linalg.svd(r_left @ r_right.T)
    # Rounding of the factors' product scales with the factors, which may cancel, not with what is left.
    scale = torch.linalg.matrix_norm(r_left) * torch.linalg.matrix_norm(r_right)
    smallest = max(u.shape[0], v.shape[1]) * torch.finfo(torch.float64).eps * scale
    rank = int((values > smallest).sum())
    found: Tensor = right_IR @ y_t.T[:, :rank] if side == "row" else left_OR @ x[:, :rank]
    return found


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Return the principal angles between two subspaces in radians, ascending, (min(K1, K2),).

    first (D, K1), second (D, K2): orthonormal columns. Angles near 0 come from sines, where cosines have no
    digits left. Source: Bjorck & Golub 1973.
    """
    if first.shape[1] < second.shape[1]:
        first, second = second, first
    product = first.T @ second
    cosines = torch.linalg.svdvals(product).clamp(max=1)
    sines = torch.linalg.svdvals(second - first @ product).clamp(max=1).flip(0)
    return torch.where(cosines.square() > 0.5, torch.asin(sines), torch.acos(cosines))


def subspace_overlap(first: Tensor, second: Tensor) -> float | None:
    """Return the mean squared cosine of the principal angles, in 0..1; None where a subspace is {0}.

    1: the smaller subspace lies in the larger one; 0: they are orthogonal.
    """
    smaller = min(first.shape[1], second.shape[1])
    if smaller == 0:
        return None
    return min(1.0, float((first.T @ second).square().sum()) / smaller)


def adapter_similarity(
    first: Mapping[str, Factors], second: Mapping[str, Factors], side: Side
) -> float | None:
    """Return the mean over layers of the overlap of row or column spaces, in 0..1.

    Layers where either delta is 0 have no direction and do not count; None when no layer counts.
    Raises ConfigError when the two do not have the same layers.
    """
    _check_layers(first, second)
    pairs = ((basis(first[name], side), basis(second[name], side)) for name in first)
    known = [overlap for x, y in pairs if (overlap := subspace_overlap(x, y)) is not None]
    return sum(known) / len(known) if known else None


def linear_cka(first_ND: Tensor, second_ND: Tensor) -> float | None:
    """Return the linear centred kernel alignment of two sets of activations of the same rows, in 0..1.

    |Y^T X|^2 / (|X^T X| |Y^T Y|) with centred columns and Frobenius norms. Unchanged by an orthogonal
    transform, a shift or a scale of either side; None where all rows of a side are equal.
    Raises DataError for different numbers of rows, or fewer than two.
    Source: Kornblith et al. 2019. With few rows and many columns it is biased upwards.
    """
    x, y = (value.double() - value.double().mean(0) for value in (first_ND, second_ND))
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or len(x) < 2:
        raise DataError(f"both sides need the same two or more rows, got {tuple(x.shape)}, {tuple(y.shape)}")
    gram_x, gram_y = x @ x.T, y @ y.T  # rows x rows: <X X^T, Y Y^T> = |Y^T X|^2
    scale = torch.linalg.matrix_norm(gram_x) * torch.linalg.matrix_norm(gram_y)
    return min(1.0, float((gram_x * gram_y).sum() / scale)) if float(scale) > 0 else None


def cosine(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None
) -> float | None:
    """Return the cosine of two vectors given as tensors by name, in -1..1; None where one is 0.

    weights, not negative: every product and norm is sum_k weights_k x_k y_k instead of sum_k x_k y_k.
    """

    def inner(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> float:
        total = 0.0
        for name, value in x.items():
            product = value.double() * y[name].double()
            total += float((product if weights is None else product * weights[name].double()).sum())
        return total

    if set(first) != set(second):
        raise DataError(f"the vectors have different parts: {sorted(set(first) ^ set(second))[0]!r}")
    scale = inner(first, first) ** 0.5 * inner(second, second) ** 0.5
    return max(-1.0, min(1.0, inner(first, second) / scale)) if scale > 0 else None


def similarity_matrix(
    items: Sequence[Mapping[str, Tensor]],
) -> list[list[float | None]]:
    """Return the cosine of every two vectors, symmetric, (T, T)."""
    return [[cosine(x, y) for y in items] for x in items]


def _check_layers(first: Mapping[str, Factors], second: Mapping[str, Factors]) -> None:
    odd = sorted(set(first) ^ set(second))
    if odd:
        raise ConfigError(f"both adapters need the same layers; only one has {odd[0]!r}")
