"""Distances between whole adapters, exact and without building a weight-sized matrix.

The update of a LoRA pair is B A. Factors are no coordinates of it (B M and M^-1 A give the same update), and
their rank may grow from task to task, so adapters are compared by their updates:
<B1 A1, B2 A2> = sum((B1^T B2) * (A1 A2^T)), at a cost of rank^2 * (in + out) per module. AdaLoRA's update is
B diag(E) A. Parameters outside pairs count as they are. The factor alpha / r is left out: it is the same for
all snapshots of one adapter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from clcore.engine.errors import ConfigError, DataError

if TYPE_CHECKING:
    # Figures are drawn where torch is not loaded, too.
    from torch import Tensor

Snapshot: TypeAlias = "Mapping[str, Tensor]"
"""Parameter name -> its value."""
Update: TypeAlias = "tuple[Tensor, Tensor] | Tensor"
"""B (out, r) and A (r, in) with B A the update, or a plain parameter."""
Points = np.ndarray[tuple[int, int], np.dtype[np.float64]]

METHODS = ("pca", "tsne", "mds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedding:
    """Adapters as points of a plane."""

    points: list[tuple[float, float]]
    method: str
    explained: tuple[float, float] | None
    """Share of the variance on each axis, 0..1; None unless the method is pca."""


def updates(snapshot: Snapshot) -> dict[str, Update]:
    """Return a snapshot's updates in float64 by module name, or by parameter name outside pairs."""
    values = {name: value.detach().cpu().double() for name, value in snapshot.items()}
    found: dict[str, Update] = {}
    used = set()
    for name, a in values.items():
        for factor in ("lora_A", "lora_embedding_A"):
            head, mark, tail = name.partition(f".{factor}")
            other = f"{head}.{factor[:-1]}B{tail}"
            if not mark or other not in values or a.ndim != 2:
                continue
            scale = values.get(f"{head}.lora_E{tail}")
            found[head] = (values[other], a if scale is None else a * scale)
            used |= {name, other, f"{head}.lora_E{tail}"}
    return found | {name: value for name, value in values.items() if name not in used}


def inner_products(snapshots: Sequence[Snapshot]) -> dict[str, Points]:
    """Return per module the inner products of all snapshots' updates, (n, n), float64.

    Raises DataError if snapshots hold no or different modules, or a plain parameter changes its shape.
    """
    all_updates = [updates(snapshot) for snapshot in snapshots]
    modules = list(all_updates[0]) if all_updates else []
    if not modules:
        raise DataError("snapshots hold no parameters")
    for i, found in enumerate(all_updates):
        if set(found) != set(modules):
            other = sorted(set(found) ^ set(modules))[0]
            raise DataError(
                f"snapshots 1 and {i + 1} do not hold the same parameters: {other!r} is in one only"
            )
    products = {}
    for module in modules:
        cells = np.zeros((len(snapshots), len(snapshots)))
        for i, left in enumerate(all_updates):
            for j in range(i, len(all_updates)):
                cells[i, j] = cells[j, i] = _inner(left[module], all_updates[j][module], module)
        products[module] = cells
    return products


def distance(products: Points, i: int, j: int) -> float:
    """Return the L2 (Frobenius) distance of updates i and j."""
    return float(np.sqrt(max(products[i, i] - 2 * products[i, j] + products[j, j], 0.0)))


def coordinates(products: Points) -> Points:
    """Return n points, (n, n), centred, with exactly the distances of the updates."""
    count = len(products)
    centre = np.eye(count) - 1.0 / count
    values, vectors = np.linalg.eigh(centre @ products @ centre)
    found: Points = vectors * np.sqrt(np.clip(values, 0.0, None))
    return found


def embed(snapshots: Sequence[Snapshot], method: str = "pca", *, seed: int = 0) -> Embedding:
    """Place adapters in a plane so that what lies near is alike.

    method: pca (the two directions of most variance), mds (metric; keeps all distances as well as it can) or
    tsne (keeps neighbours; perplexity is a third of the other snapshots, at most 30). seed: of mds and tsne.
    The sign of each axis is such that the last adapter is on its positive side.

    Raises ConfigError for another method, DataError for fewer than 2 snapshots or unlike ones.
    """
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if len(snapshots) < 2:
        raise DataError(f"an embedding needs at least 2 snapshots, got {len(snapshots)}")
    per_module = inner_products(snapshots)
    places = coordinates(np.sum(list(per_module.values()), axis=0))
    explained = None
    if method == "pca":
        found, explained = _pca(places)
    elif method == "mds":
        found = _mds(places, seed)
    else:
        found = _tsne(places, seed)
    signs = np.where(found[-1] < 0, -1.0, 1.0)
    points = [(float(x), float(y)) for x, y in found * signs]
    return Embedding(points=points, method=method, explained=explained)


def _pca(places: Points) -> tuple[Points, tuple[float, float]]:
    from sklearn.decomposition import PCA

    model = PCA(n_components=2, svd_solver="full")
    found = model.fit_transform(places)
    total = float(np.square(places - places.mean(axis=0)).sum())
    spread = np.square(found).sum(axis=0)
    first, second = (float(part) / total if total > 0 else 0.0 for part in spread)
    return found, (first, second)


def _mds(places: Points, seed: int) -> Points:
    from sklearn.manifold import MDS

    model = MDS(
        n_components=2, metric="precomputed", init="classical_mds", n_init=1, max_iter=1000, random_state=seed
    )
    # Stress is minimized on one scale, whatever the size of the weights.
    apart = np.linalg.norm(places[:, None] - places[None, :], axis=2)
    size = float(apart.max()) or 1.0
    found: Points = model.fit_transform(apart / size) * size
    return found


def _tsne(places: Points, seed: int) -> Points:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, max(1.0, (len(places) - 1) / 3))
    model = TSNE(n_components=2, perplexity=perplexity, random_state=seed, init="random", method="exact")
    size = float(np.abs(places).max()) or 1.0
    found: Points = model.fit_transform(places / size).astype(np.float64)
    return found


def _inner(left: Update, right: Update, module: str) -> float:
    if not isinstance(left, tuple) or not isinstance(right, tuple):
        if isinstance(left, tuple) or isinstance(right, tuple) or left.shape != right.shape:
            raise DataError(f"parameter {module!r} does not have the same shape in all snapshots")
        return float((left * right).sum())
    (left_b, left_a), (right_b, right_a) = left, right
    if left_b.shape[0] != right_b.shape[0] or left_a.shape[1] != right_a.shape[1]:
        raise DataError(f"module {module!r} does not have the same size in all snapshots")
    return float(((left_b.T @ right_b) * (left_a @ right_a.T)).sum())
