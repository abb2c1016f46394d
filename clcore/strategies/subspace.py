"""Protected subspaces: orthonormal bases, how they grow, and projections off them, batched over parameters.

A basis Q (k, d) has orthonormal rows. On the right it protects input directions: X (n, d) loses X Q^T Q. On
the left it protects output directions: X (d, n) loses Q^T Q X.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

NEGLIGIBLE = 1e-4
"""A direction with less than this share of the rows' norm is rounding noise in float32."""
MOST_STACKED = 2**24
"""Numbers that one batched product takes at most, so that copies of full weights stay small."""


@dataclasses.dataclass(frozen=True)
class _Group:
    """Parameters of one shape and their bases on one side, padded with rows of zeros to one size."""

    is_right: bool
    names: list[str]
    basis_MKD: Tensor

    def take(self, tensors: Mapping[str, Tensor]) -> tuple[list[str], Tensor, Tensor]:
        """Return those of the names that have a tensor, the tensors (M, n, d) and their bases."""
        chosen = [i for i, name in enumerate(self.names) if name in tensors]
        names = [self.names[i] for i in chosen]
        basis_MKD = self.basis_MKD if len(chosen) == len(self.names) else self.basis_MKD[chosen]
        if not names:
            return names, basis_MKD[:, :0], basis_MKD
        x_MND = torch.stack([tensors[n] if self.is_right else tensors[n].T for n in names]).float()
        return names, x_MND, basis_MKD


class Subspaces:
    """Bases by parameter name, stacked per shape, so that projecting costs two batched products per shape.

    The methods skip names that their tensors lack, such as parameters without a gradient.
    """

    def __init__(self, right: Mapping[str, Tensor], left: Mapping[str, Tensor] | None = None) -> None:
        """right, left: parameter name -> basis (k, d); names without one are free."""
        self.right, self.left = _non_empty(right), _non_empty(left or {})
        self.names = list(dict.fromkeys([*self.right, *self.left]))
        self._groups: list[_Group] = []

    def bind(self, shapes: Mapping[str, torch.Size]) -> None:
        """Stack the bases for parameters of these shapes."""
        self._groups = [
            _Group(is_right, names, _stack([bases[name] for name in names]))
            for is_right, bases in ((True, self.right), (False, self.left))
            for names in _by_shape(shapes, bases)
        ]

    def coefficients(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Return per group X Q^T (M, n, k), or X^T Q^T on the left, with its graph."""
        taken = [group.take(tensors) for group in self._groups]
        return [torch.bmm(x_MND, basis_MKD.transpose(1, 2)) for names, x_MND, basis_MKD in taken if names]

    @torch.no_grad()
    def protected_parts(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield a name and the part of its tensor inside its subspace, right sides before left ones.

        Lazy: who takes the part out before asking for the next projects a tensor with two sides on both.
        """
        for group in self._groups:
            names, x_MND, basis_MKD = group.take(tensors)
            if names:
                inside_MND = torch.bmm(torch.bmm(x_MND, basis_MKD.transpose(1, 2)), basis_MKD)
                inside = inside_MND if group.is_right else inside_MND.transpose(1, 2)
                yield from zip(names, inside.unbind(), strict=True)

    @torch.no_grad()
    def remove(self, tensors: Mapping[str, Tensor], strength: float = 1.0) -> None:
        """Take strength times the protected part out of the tensors, in place."""
        for name, part in self.protected_parts(tensors):
            tensors[name].sub_(part.to(tensors[name].dtype), alpha=strength)

    @torch.no_grad()
    def inside_share(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """Return name -> norm of the protected part over the norm of the whole, the larger of both sides."""
        shares: dict[str, float] = defaultdict(float)
        for name, part in self.protected_parts(tensors):
            share = part.norm() / tensors[name].float().norm().clamp_min(1e-30)
            shares[name] = max(shares[name], float(share))
        return dict(shares)


@torch.no_grad()
def top_directions(
    rows_ND: Tensor, *, max_rank: int, lost_energy: float = 0.0, known_energy: float = 0.0
) -> Tensor:
    """Return the leading right singular vectors of rows, (k, d), from the Gram matrix of the short side.

    As few as keep at least 1 - lost_energy of the energy (sum of squared singular values) of the rows plus
    known_energy, and at most max_rank. Directions of rounding noise are left out. float64: the eigenvalues of
    a Gram matrix are squares.
    """
    rows = rows_ND.double()
    n, d = rows.shape
    if not n or not bool(rows.any()):
        return empty_basis(d, rows.device)
    gram = rows.T @ rows if d <= n else rows @ rows.T
    energy, vectors = torch.linalg.eigh(gram)
    energy, vectors = energy.flip(0).clamp_min(0), vectors.flip(1)
    total = float(energy.sum()) + known_energy
    kept = int((energy > NEGLIGIBLE**2 * total).sum())
    missing = total - known_energy - energy.cumsum(0)
    enough = int((missing > lost_energy * total).sum()) + 1
    if known_energy >= (1 - lost_energy) * total:
        enough = 0
    vectors = vectors[:, : min(kept, max_rank, enough)]
    if d > n:
        vectors = rows.T @ vectors
    return orthonormal(vectors.T)


@torch.no_grad()
def grow(
    basis_KD: Tensor, rows_ND: Tensor, *, max_new: int | None = None, lost_energy: float = 0.0
) -> Tensor:
    """Add the leading directions of rows that a basis does not hold yet; the result is orthonormal.

    lost_energy: stop once the basis holds at least 1 - lost_energy of the rows' energy (Saha et al. 2021).
    max_new: add that many at most.
    """
    d = rows_ND.shape[1]
    rows, basis = rows_ND.double(), basis_KD.double()
    outside = rows - (rows @ basis.T) @ basis
    total, rest = float(rows.square().sum()), float(outside.square().sum())
    if rest <= NEGLIGIBLE**2 * total:
        return basis_KD
    free = d - basis_KD.shape[0]
    new = top_directions(
        outside,
        max_rank=free if max_new is None else min(free, max_new),
        lost_energy=lost_energy,
        known_energy=total - rest,
    )
    return orthonormal(torch.cat([basis, new.double()])) if len(new) else basis_KD


def orthonormal(rows_KD: Tensor) -> Tensor:
    """Return an orthonormal basis of independent rows, float32, by QR in float64; (k, d)."""
    q_DK: Tensor = torch.linalg.qr(rows_KD.double().T).Q
    return q_DK.T.float().contiguous()


def empty_basis(d: int, device: torch.device) -> Tensor:
    """Return a basis without directions, (0, d)."""
    return torch.zeros((0, d), device=device)


def _non_empty(bases: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: basis for name, basis in bases.items() if len(basis)}


def _by_shape(shapes: Mapping[str, torch.Size], bases: Mapping[str, Tensor]) -> list[list[str]]:
    """Group names by the shape of their parameters, no more in a group than one product may take."""
    groups: dict[torch.Size, list[str]] = defaultdict(list)
    for name in bases:
        groups[shapes[name]].append(name)
    found = []
    for shape, names in groups.items():
        size = max(1, MOST_STACKED // shape.numel())
        found += [names[i : i + size] for i in range(0, len(names), size)]
    return found


def _stack(bases: Sequence[Tensor]) -> Tensor:
    """Stack bases of different size to (M, k, d); rows of zeros project nothing."""
    k = max(len(basis) for basis in bases)
    padded = [torch.cat([b, b.new_zeros(k - len(b), b.shape[1])]) for b in bases]
    return torch.stack(padded)
