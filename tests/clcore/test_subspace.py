"""Bases and projections against torch's SVD and dense projectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clcore.strategies import subspace
from clcore.strategies.subspace import Subspaces, empty_basis, grow, orthonormal, top_directions


def spectrum(n: int, d: int, values: list[float], seed: int = 0) -> Tensor:
    """Return an (n, d) matrix with these singular values and random directions."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(d, len(values), generator=generator, dtype=torch.float64)).Q
    return ((u * torch.tensor(values, dtype=torch.float64)) @ v.T).float()


def projector(basis_KD: Tensor) -> Tensor:
    return basis_KD.double().T @ basis_KD.double()


def assert_orthonormal(basis_KD: Tensor) -> None:
    eye = torch.eye(len(basis_KD), dtype=torch.float64)
    torch.testing.assert_close(basis_KD.double() @ basis_KD.double().T, eye, rtol=0, atol=1e-6)
    assert basis_KD.dtype == torch.float32


def svd_directions(rows_ND: Tensor, k: int) -> Tensor:
    return torch.linalg.svd(rows_ND.double(), full_matrices=False).Vh[:k]


@pytest.mark.parametrize(("n", "d"), [(30, 12), (12, 30), (12, 12)])
def test_top_directions_are_the_leading_singular_vectors_in_both_orientations(n: int, d: int) -> None:
    rows = spectrum(n, d, [10.0 / (i + 1) for i in range(12)])
    for k in (1, 5, 12):
        found = top_directions(rows, max_rank=k)
        assert found.shape == (k, d)
        assert_orthonormal(found)
        for one, wanted in zip(
            found.double(), svd_directions(rows, k), strict=True
        ):  # one by one, up to sign
            assert abs(float(one @ wanted)) > 1 - 1e-6


@pytest.mark.parametrize(("n", "d"), [(20, 8), (8, 20)])
def test_as_few_directions_as_keep_the_energy(n: int, d: int) -> None:
    rows = spectrum(n, d, [4.0, 3.0, 2.0, 1.0])  # energies 16, 9, 4, 1 of 30
    for lost, wanted in [
        (0.0, 4),
        (0.03, 4),
        (0.04, 3),
        (0.16, 3),
        (0.17, 2),
        (0.46, 2),
        (0.47, 1),
        (0.9, 1),
    ]:
        assert len(top_directions(rows, max_rank=8, lost_energy=lost)) == wanted, lost
    assert len(top_directions(rows, max_rank=2, lost_energy=0.0)) == 2


def test_known_energy_counts_as_kept_and_adds_to_the_total() -> None:
    rows = spectrum(20, 8, [4.0, 3.0, 2.0, 1.0])
    # With 30 known the total is 60; lost are 30 / 60, 14 / 60, 5 / 60, 1 / 60 with 0, 1, 2, 3 directions.
    for lost, wanted in [(0.51, 0), (0.49, 1), (0.24, 1), (0.23, 2), (0.09, 2), (0.08, 3), (0.01, 4)]:
        assert len(top_directions(rows, max_rank=8, lost_energy=lost, known_energy=30.0)) == wanted, lost


@pytest.mark.parametrize(("n", "d"), [(40, 16), (10, 16)])
def test_directions_of_rounding_noise_are_left_out(n: int, d: int) -> None:
    rows = spectrum(n, d, [5.0, 1.0, 1e-3])
    noisy = rows + 1e-7 * torch.randn(n, d, generator=torch.Generator().manual_seed(1))
    found = top_directions(noisy, max_rank=16)
    assert len(found) == 3
    torch.testing.assert_close(projector(found), projector(svd_directions(rows, 3)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_rows_of_zeros_have_no_direction(n: int) -> None:
    found = top_directions(torch.zeros(n, 7), max_rank=3)
    assert (found.shape, found.dtype) == ((0, 7), torch.float32)
    basis = orthonormal(torch.eye(7)[:2])
    assert torch.equal(grow(basis, torch.zeros(n, 7)), basis)


def test_half_precision_rows_are_taken_in_double() -> None:
    rows = spectrum(20, 8, [4.0, 2.0])
    found = top_directions(rows.bfloat16(), max_rank=2)
    assert_orthonormal(found)
    torch.testing.assert_close(projector(found), projector(svd_directions(rows, 2)), rtol=0, atol=2e-2)


def test_a_grown_basis_is_orthonormal_and_spans_old_and_new() -> None:
    generator = torch.Generator().manual_seed(3)
    basis, everything = empty_basis(24, torch.device("cpu")), torch.zeros(0, 24)
    for size in (5, 6, 4):
        rows = torch.randn(size, 24, generator=generator)
        everything = torch.cat([everything, rows])
        basis = grow(basis, rows)
        assert basis.shape == (len(everything), 24)
        assert_orthonormal(basis)
        wanted = projector(svd_directions(everything, len(everything)))
        torch.testing.assert_close(projector(basis), wanted, rtol=0, atol=1e-6)
    assert grow(basis, everything[:3]) is basis  # nothing new in them


def test_a_basis_grows_by_max_new_and_stops_when_it_holds_every_direction() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(30, 10, generator=generator)
    basis = grow(empty_basis(10, rows.device), rows, max_new=4)
    assert len(basis) == 4
    basis = grow(basis, rows, max_new=4)
    assert len(basis) == 8
    basis = grow(basis, rows, max_new=4)
    assert len(basis) == 10
    assert_orthonormal(basis)
    assert grow(basis, torch.randn(30, 10, generator=generator)) is basis


@pytest.mark.parametrize("lost", [0.3, 0.1, 0.03, 0.005])
def test_a_basis_grows_by_the_threshold_of_gradient_projection_memory(lost: float) -> None:
    """||R||^2 of all rows counts, with what the old basis holds: k is the least that keeps 1 - lost."""
    old_rows, rows = (
        spectrum(20, 12, [3.0, 2.0, 1.0]),
        spectrum(20, 12, [3.0, 2.5, 2.0, 1.5, 1.0, 0.5], seed=1),
    )
    rows = rows + 0.5 * old_rows
    basis = grow(empty_basis(12, rows.device), old_rows)
    found = grow(basis, rows, lost_energy=lost)

    whole = rows.double()
    outside = whole - whole @ projector(basis)
    directions = torch.linalg.svd(outside, full_matrices=False).Vh
    for k in range(13 - len(basis)):
        held = projector(torch.cat([basis.double(), directions[:k]]))
        if (whole @ held).square().sum() >= (1 - lost) * whole.square().sum():
            break
    assert len(found) == len(basis) + k
    torch.testing.assert_close(projector(found), held, rtol=0, atol=1e-6)


def test_almost_known_rows_add_no_noise() -> None:
    """What is left of rows inside the basis is rounding, even next to one small new direction."""
    generator = torch.Generator().manual_seed(0)
    basis = orthonormal(torch.randn(6, 20, generator=generator))
    rows = torch.randn(50, 6, generator=generator) @ basis
    assert grow(basis, rows) is basis
    new = torch.randn(20, generator=generator)
    assert len(grow(basis, rows + 1e-3 * torch.randn(50, 1, generator=generator) * new)) == 7
    small = spectrum(50, 20, [3e-3, 1e-5], seed=5)  # of a norm of about 17
    grown = grow(basis, rows + small)
    assert len(grown) == 7
    assert_orthonormal(grown)


# ---------------------------------------------------------------------------------------------- projections

SHAPES = {"a": (4, 10), "b": (4, 10), "c": (6, 10), "d": (10, 4), "e": (10, 4), "f": (7, 7)}
RIGHT = {"a": 3, "b": 5, "c": 2, "f": 4}
LEFT = {"d": 6, "e": 1, "f": 2, "c": 3}


def bases_of(sizes: dict[str, int], side: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: orthonormal(torch.randn(k, SHAPES[n][side], generator=generator)) for n, k in sizes.items()}


def bound() -> tuple[Subspaces, dict[str, Tensor]]:
    """Return bases of several sizes on each side, on both for c and f, and random tensors."""
    found = Subspaces(bases_of(RIGHT, 1, 0), bases_of(LEFT, 0, 1))
    found.bind({name: torch.Size(shape) for name, shape in SHAPES.items()})
    generator = torch.Generator().manual_seed(2)
    return found, {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def dense_remove(found: Subspaces, name: str, x: Tensor, strength: float) -> Tensor:
    x = x.double()
    if name in found.right:
        x = x - strength * x @ projector(found.right[name])
    if name in found.left:
        x = x - strength * projector(found.left[name]) @ x
    return x.float()


@pytest.mark.parametrize("most", [2**24, 80, 1])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_removal_equals_dense_projectors_on_each_side_and_on_both(
    strength: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subspace, "MOST_STACKED", most)  # all of a shape at once, two at once, one by one
    found, tensors = bound()
    wanted = {name: dense_remove(found, name, x, strength) for name, x in tensors.items()}
    found.remove(tensors, strength)
    for name, x in tensors.items():
        torch.testing.assert_close(x, wanted[name], rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    if strength == 1:  # (I - P_U) X (I - P_V)
        assert float((tensors["f"] @ found.right["f"].T).norm()) < 1e-5
        assert float((found.left["f"] @ tensors["f"]).norm()) < 1e-5


def test_removal_skips_what_is_not_given_and_leaves_what_has_no_basis() -> None:
    found, tensors = bound()
    wanted = {name: dense_remove(found, name, x, 1.0) for name, x in tensors.items()}
    some = {name: tensors[name] for name in ("b", "f", "e")} | {"free": torch.ones(3, 3)}
    found.remove(some)
    for name in ("b", "f", "e"):
        torch.testing.assert_close(some[name], wanted[name], rtol=0, atol=2e-6)
    assert torch.equal(some["free"], torch.ones(3, 3))


def test_half_precision_tensors_are_projected_in_float32() -> None:
    found, tensors = bound()
    x = tensors["a"].bfloat16()
    wanted = dense_remove(found, "a", x, 1.0)
    found.remove({"a": x})
    assert x.dtype == torch.bfloat16
    torch.testing.assert_close(x.float(), wanted, rtol=2e-2, atol=2e-2)


def test_a_subspace_without_directions_is_free_and_unbound_bases_do_nothing() -> None:
    empty = Subspaces({"a": torch.zeros(0, 10)}, {"d": torch.zeros(0, 10)})
    assert empty.names == []
    empty.bind({name: torch.Size(shape) for name, shape in SHAPES.items()})
    x = torch.ones(4, 10)
    empty.remove({"a": x})
    assert torch.equal(x, torch.ones(4, 10))
    assert empty.inside_share({"a": x}) == {}


def test_the_share_inside_is_the_norm_of_the_protected_part_over_the_whole() -> None:
    found, tensors = bound()
    shares = found.inside_share(tensors)
    assert set(shares) == set(SHAPES)
    for name, x in tensors.items():
        right = x.double() @ projector(found.right[name]) if name in found.right else torch.zeros(1)
        left = projector(found.left[name]) @ x.double() if name in found.left else torch.zeros(1)
        wanted = max(float(right.norm()), float(left.norm())) / float(x.double().norm())
        assert shares[name] == pytest.approx(wanted, rel=1e-5)
    found.remove(tensors)
    assert max(found.inside_share(tensors).values()) < 1e-6
    assert found.inside_share({"a": torch.zeros(4, 10)}) == {"a": 0.0}


def test_coefficients_are_the_products_with_the_basis_and_carry_gradients() -> None:
    found, tensors = bound()
    for x in tensors.values():
        x.requires_grad_(True)
    total = sum(float(inside.detach().square().sum()) for inside in found.coefficients(tensors))
    right = sum((tensors[n] @ q.T).square().sum() for n, q in found.right.items())
    left = sum((q @ tensors[n]).square().sum() for n, q in found.left.items())
    assert total == pytest.approx(float((right + left).detach()), rel=1e-5)
    assert all(inside.requires_grad for inside in found.coefficients(tensors))
