"""Protected subspaces: orthonormal bases, how they grow, and projections off them, batched over parameters.

A basis Q (k, d) has orthonormal rows. On the right it protects input directions: X (n, d) loses X Q^T Q. On
the left it protects output directions: X (d, n) loses Q^T Q X.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

NEGLIGIBLE = 1e-4
"""A direction with less than this share of the largest singular value is rounding noise in float32."""


class Subspaces:
    """Bases by parameter name, stacked per shape, so that projecting costs two batched products per shape."""

    def __init__(self, right: Mapping[str, Tensor], left: Mapping[str, Tensor] | None = None) -> None:
        """right, left: parameter name -> basis (k, d); names without one are free."""
        self.right, self.left = _non_empty(right), _non_empty(left or {})

    def bind(self, shapes: Mapping[str, torch.Size]) -> None:
        """Stack the bases for parameters of these shapes."""
        self._groups = [
            (is_right, names, _stack([bases[name] for name in names]))
            for is_right, bases in ((True, self.right), (False, self.left))
            for names in _by_shape(shapes, bases)
        ]

    def coefficients(self, tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return per group the stacked tensors (M, n, d), output side first transposed, and X Q^T (M, n, k)."""
        found = []
        for is_right, names, basis_MKD in self._groups:
            x_MND = torch.stack([tensors[n] if is_right else tensors[n].T for n in names]).float()
            found.append((x_MND, torch.bmm(x_MND, basis_MKD.transpose(1, 2))))
        return found

    @torch.no_grad()
    def remove(self, tensors: Mapping[str, Tensor], strength: float = 1.0) -> None:
        """Take strength times the protected part out of the tensors, in place."""
        for is_right, names, basis_MKD in self._groups:
            x_MND = torch.stack([tensors[n] if is_right else tensors[n].T for n in names]).float()
            inside_MND = torch.bmm(torch.bmm(x_MND, basis_MKD.transpose(1, 2)), basis_MKD)
            for name, inside in zip(names, inside_MND.unbind(), strict=True):
                part = inside if is_right else inside.T
                tensors[name].sub_(part.to(tensors[name].dtype), alpha=strength)

    @torch.no_grad()
    def inside_share(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """Return name -> norm of the protected part over the norm of the whole, the larger of both sides."""
        shares: dict[str, float] = defaultdict(float)
        for (_, names, _), (x_MND, inside_MNK) in zip(self._groups, self.coefficients(tensors), strict=True):
            norms = inside_MNK.flatten(1).norm(dim=1) / x_MND.flatten(1).norm(dim=1).clamp_min(1e-30)
            for name, share in zip(names, norms.tolist(), strict=True):
                shares[name] = max(shares[name], share)
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
        return rows_ND.new_zeros((0, d), dtype=torch.float32)
    gram = rows.T @ rows if d <= n else rows @ rows.T
    energy, vectors = torch.linalg.eigh(gram)
    energy, vectors = energy.flip(0).clamp_min(0), vectors.flip(1)
    kept = int((energy > NEGLIGIBLE**2 * energy[0]).sum())
    total = float(energy.sum()) + known_energy
    missing = total - known_energy - energy.cumsum(0)
    enough = int((missing > lost_energy * total).sum()) + 1
    if known_energy >= (1 - lost_energy) * total:
        enough = 0
    vectors = vectors[:, : min(kept, max_rank, enough)]
    if d > n:
        vectors = rows.T @ vectors
    return orthonormal(vectors.T)


@torch.no_grad()
def grow(basis_KD: Tensor, rows_ND: Tensor, *, max_new: int | None = None, lost_energy: float = 0.0) -> Tensor:
    """Add the leading directions of rows that a basis does not hold yet; the result is orthonormal.

    lost_energy: stop once the basis holds at least 1 - lost_energy of the rows' energy (Saha et al. 2021).
    """
    d = rows_ND.shape[1]
    rows, basis = rows_ND.double(), basis_KD.double()
    outside = rows - (rows @ basis.T) @ basis
    outside = outside - (outside @ basis.T) @ basis  # twice is enough for orthogonality to rounding
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
    return torch.linalg.qr(rows_KD.double().T).Q.T.float().contiguous()


def empty_basis(d: int, device: torch.device) -> Tensor:
    """Return a basis without directions, (0, d)."""
    return torch.zeros((0, d), device=device)


def _non_empty(bases: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: basis for name, basis in bases.items() if len(basis)}


def _by_shape(shapes: Mapping[str, torch.Size], bases: Mapping[str, Tensor]) -> list[list[str]]:
    groups: dict[torch.Size, list[str]] = defaultdict(list)
    for name in bases:
        groups[shapes[name]].append(name)
    return list(groups.values())


def _stack(bases: Sequence[Tensor]) -> Tensor:
    """Stack bases of different size to (M, k, d); rows of zeros project nothing."""
    k = max(len(basis) for basis in bases)
    padded = [torch.cat([b, b.new_zeros(k - len(b), b.shape[1])]) for b in bases]
    return torch.stack(padded)
