"""Angles between LoRA deltas against full matrices, CKA and cosines worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from scipy.linalg import subspace_angles
from torch import Tensor

from clcore.engine.errors import ConfigError, DataError
from clcore.evaluation.similarity import (
    adapter_similarity,
    basis,
    change_factors,
    cosine,
    linear_cka,
    lora_factors,
    principal_angles,
    subspace_overlap,
)
from clcore.evaluation.snapshots import take_snapshot
from tests.clcore.tiny import fill_b, tiny_llama, tiny_llama_base

Factors = tuple[Tensor, Tensor]


def random_factors(seed: int, out: int = 9, rank: int = 3, width: int = 7) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    return u, torch.randn(rank, width, generator=generator, dtype=torch.float64)


def spaces_of_the_full_matrix(factors: Factors, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Return bases of the column space and the row space from the SVD of U V itself."""
    u, _, v_t = np.linalg.svd((factors[0] @ factors[1]).numpy())
    return u[:, :rank], v_t[:rank].T


@pytest.mark.parametrize(("rank", "other_rank"), [(3, 3), (2, 4)])
def test_principal_angles_from_the_factors_are_those_of_the_full_matrices(rank: int, other_rank: int) -> None:
    first, second = random_factors(0, rank=rank), random_factors(1, rank=other_rank)
    full = spaces_of_the_full_matrix(first, rank), spaces_of_the_full_matrix(second, other_rank)
    for which, side in enumerate(("column", "row")):
        expected = np.sort(subspace_angles(full[0][which], full[1][which]))
        angles = principal_angles(basis(first, side), basis(second, side))  # type: ignore[arg-type]
        np.testing.assert_allclose(angles.numpy(), expected, rtol=0, atol=1e-12)


def test_small_angles_keep_their_digits() -> None:
    # The plane spanned by e1, e2 against e1, cos(t) e2 + sin(t) e3: angles 0 and t.
    t = 1e-9
    first = torch.eye(4, 2, dtype=torch.float64)
    second = first.clone()
    second[1, 1], second[2, 1] = math.cos(t), math.sin(t)
    angles = principal_angles(first, second)
    assert angles.tolist() == pytest.approx([0.0, t], abs=1e-15)


def test_the_overlap_of_two_planes_worked_out_by_hand() -> None:
    # Angles 0 and 60 degrees: (1 + 0.25) / 2.
    first = torch.eye(3, 2, dtype=torch.float64)
    second = torch.tensor([[1, 0], [0, 0.5], [0, math.sqrt(0.75)]], dtype=torch.float64)
    assert subspace_overlap(first, second) == pytest.approx(0.625)
    assert subspace_overlap(first, first[:, :1]) == 1.0
    assert subspace_overlap(first, torch.zeros(3, 0, dtype=torch.float64)) is None


def test_a_deficient_product_has_the_rank_of_the_full_matrix_and_a_product_of_zeros_none() -> None:
    u, v = random_factors(0)
    v[2] = v[0] - v[1]
    assert basis((u, v), "row").shape == (7, 2)
    assert basis((u, v), "column").shape == (9, 2)
    assert basis((torch.zeros_like(u), v), "row").shape == (7, 0)


def test_the_change_between_two_adapters_spans_what_the_difference_of_full_matrices_spans() -> None:
    old = random_factors(0)
    u, v = random_factors(1)
    v[:2] = old[1][:2]  # two shared inputs
    change = change_factors({"layer": old}, {"layer": (u, v)})["layer"]
    full = u @ v - old[0] @ old[1]
    torch.testing.assert_close(change[0] @ change[1], full)
    rank = int(torch.linalg.matrix_rank(full))
    row = basis(change, "row")
    assert row.shape[1] == rank == 4
    torch.testing.assert_close(full @ row @ row.T, full)


def test_an_unchanged_adapter_has_no_direction_of_change() -> None:
    factors = {"layer": random_factors(0)}
    change = change_factors(factors, factors)
    assert basis(change["layer"], "row").shape[1] == 0
    assert adapter_similarity(change, factors, "row") is None


def test_similarity_of_adapters_is_the_mean_over_layers_and_leaves_zero_deltas_out() -> None:
    u = torch.eye(3, 1, dtype=torch.float64)
    e1, e2 = torch.eye(2, dtype=torch.float64).split(1)
    zero = (torch.zeros_like(u), e1)
    first = {"x": (u, e1), "y": (u, e1), "z": zero}
    second = {"x": (u, e1), "y": (u, e1 + e2), "z": (u, e1)}
    # Rows: 1 in x, cos^2 of 45 degrees in y; columns are equal.
    assert adapter_similarity(first, second, "row") == pytest.approx(0.75)
    assert adapter_similarity(first, second, "column") == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="only one has 'z'"):
        adapter_similarity(first, {"x": second["x"], "y": second["y"]}, "row")
    with pytest.raises(ConfigError, match="got 'diagonal'"):
        basis(first["x"], "diagonal")  # type: ignore[arg-type]


def check_deltas(model: Any, rank: int) -> None:
    """Compare factors of the model's snapshot with PEFT's own delta weights, up to a positive scale."""
    factors = lora_factors(take_snapshot(model))
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    assert set(factors) == set(layers)
    for name, layer in layers.items():
        delta = layer.get_delta_weight("default").detach().double()
        ours = factors[name][0] @ factors[name][1]
        scale = float((delta * ours).sum() / ours.square().sum())
        assert scale > 0
        torch.testing.assert_close(scale * ours, delta, rtol=1e-5, atol=1e-7)
        assert basis(factors[name], "row").shape[1] == rank


def test_factors_of_lora_are_pefts_delta_up_to_scale() -> None:
    check_deltas(tiny_llama(with_b=True), rank=4)


def test_factors_of_adalora_hold_its_singular_values_and_pruned_ranks_do_not_count() -> None:
    config = AdaLoraConfig(init_r=4, target_modules=["q_proj", "v_proj"], total_step=10, tinit=1, tfinal=1)
    model = fill_b(get_peft_model(tiny_llama_base(), config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_E" in name:
                p.copy_(torch.tensor([[1.0], [0.0], [-2.0], [0.0]]))
    check_deltas(model, rank=2)


def test_what_is_no_product_of_two_factors_is_refused() -> None:
    dora = get_peft_model(tiny_llama_base(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ConfigError, match="lora_magnitude_vector"):
        lora_factors(take_snapshot(dora))
    embedding = get_peft_model(tiny_llama_base(), LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(ConfigError, match="lora_embedding_A"):
        lora_factors(take_snapshot(embedding))
    with pytest.raises(ConfigError, match="no LoRA pair of adapter 'other'"):
        lora_factors(take_snapshot(tiny_llama()), "other")
    half = {"x.lora_A.default.weight": torch.zeros(2, 3)}
    with pytest.raises(ConfigError, match="only lora_A of 'x'"):
        lora_factors(half)


def test_linear_cka_worked_out_by_hand() -> None:
    # Centred: x = (-1, 0, 1), y = (-1, 2, -1), x.y = 0; z holds both.
    x = torch.tensor([[1.0], [2.0], [3.0]])
    y = torch.tensor([[0.0], [3.0], [0.0]])
    z = torch.cat([x, y], dim=1)
    assert linear_cka(x, y) == pytest.approx(0.0, abs=1e-12)
    # Z^T X = (2, 0), squared norm 4; X^T X = 2; Z^T Z = diag(2, 6), norm sqrt(40).
    assert linear_cka(x, z) == pytest.approx(4 / (2 * math.sqrt(40)))


def test_linear_cka_is_that_of_the_features_and_ignores_rotation_shift_and_scale() -> None:
    x, y = random_factors(0)[0], random_factors(1, rank=5)[0]
    cx, cy = x - x.mean(0), y - y.mean(0)
    expected = (cy.T @ cx).norm() ** 2 / ((cx.T @ cx).norm() * (cy.T @ cy).norm())
    assert linear_cka(x, y) == pytest.approx(float(expected))
    turn = torch.linalg.qr(random_factors(2, out=3, rank=3)[0])[0]
    assert linear_cka(5 * x @ turn + 7, y) == pytest.approx(float(expected))
    assert linear_cka(x, x @ turn) == pytest.approx(1.0)
    assert linear_cka(torch.ones(4, 2), torch.eye(4)) is None
    with pytest.raises(DataError, match="the same two or more rows"):
        linear_cka(x, y[:4])


def test_cosines_plain_and_weighted_worked_out_by_hand() -> None:
    x = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    y = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([0.0])}
    assert cosine(x, y) == pytest.approx(3 / (5 * math.sqrt(2)))
    weights = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([0.0])}
    assert cosine(x, y, weights) == pytest.approx(3 / (3 * 2))
    assert cosine(x, {"a": torch.zeros(2), "b": torch.zeros(1)}) is None
    with pytest.raises(DataError, match="'b'"):
        cosine(x, {"a": y["a"]})
