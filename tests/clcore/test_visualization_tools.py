"""VisualizationTools and the geometry of adapters, against updates that are built in full."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor

from clcore.engine.errors import ConfigError, DataError
from clcore.evaluation.adapter_geometry import METHODS, coordinates, distance, embed, inner_products
from clcore.evaluation.eval_visualization import VisualizationTools, create_visualization_dashboard
from clcore.evaluation.visualization_tools import adapter_ranks
from tests.clcore.tiny import tiny_llama, tiny_llama_base

LAYER = "base_model.model.model.layers"


def snapshot(seed: int, rank: int = 2, layers: int = 2) -> dict[str, Tensor]:
    """Return the parameters of an adapter with one pair per layer: A (rank, 5), B (4, rank)."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in range(layers):
        name = f"{LAYER}.{layer}.self_attn.q_proj"
        found[f"{name}.lora_A.default.weight"] = torch.randn(rank, 5, generator=generator)
        found[f"{name}.lora_B.default.weight"] = torch.randn(4, rank, generator=generator)
    return found


def full(found: dict[str, Tensor]) -> Tensor:
    """Return all updates B A of a snapshot as one vector."""
    parts = [
        found[name.replace("lora_A", "lora_B")].double() @ a.double()
        for name, a in found.items()
        if "lora_A" in name
    ]
    return torch.cat([part.flatten() for part in parts])


def data(figure: Any) -> Any:
    return json.loads(figure.to_json())


def test_distances_of_updates_are_those_of_the_full_matrices_whatever_the_rank() -> None:
    snapshots = [snapshot(seed, rank) for seed, rank in ((0, 2), (1, 3), (2, 5))]
    total = sum(inner_products(snapshots).values())
    for i in range(3):
        for j in range(3):
            expected = float((full(snapshots[i]) - full(snapshots[j])).norm())
            assert distance(total, i, j) == pytest.approx(expected, abs=1e-6)


def test_the_same_update_in_other_factors_is_at_distance_zero() -> None:
    first = snapshot(0)
    mix = torch.tensor([[2.0, 1.0], [0.0, 0.5]], dtype=torch.float64)
    second = {
        name: torch.linalg.solve(mix, value.double()) if "lora_A" in name else value.double() @ mix
        for name, value in first.items()
    }
    total = sum(inner_products([first, second]).values())
    assert distance(total, 0, 1) == pytest.approx(0, abs=1e-6)


def test_an_adalora_triple_counts_with_its_singular_values() -> None:
    name = f"{LAYER}.0.self_attn.q_proj"
    triple = {
        f"{name}.lora_A.default": torch.eye(2, 3),
        f"{name}.lora_B.default": torch.eye(2, 2),
        f"{name}.lora_E.default": torch.tensor([[3.0], [0.0]]),
    }
    (products,) = inner_products([triple, triple]).values()
    assert products.tolist() == [[9, 9], [9, 9]]  # the update is 3 in one cell, 0 elsewhere


def test_coordinates_keep_all_distances_and_pca_the_two_largest_directions() -> None:
    snapshots = [snapshot(seed) for seed in range(6)]
    total = np.asarray(sum(inner_products(snapshots).values()))
    places = coordinates(total)
    vectors = torch.stack([full(found) for found in snapshots])
    for i in range(6):
        for j in range(6):
            expected = float((vectors[i] - vectors[j]).norm())
            assert math.dist(places[i], places[j]) == pytest.approx(expected, abs=1e-6)
    found = embed(snapshots, "pca")
    centred = vectors - vectors.mean(dim=0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    expected_points = (left[:, :2] * values[:2]).numpy()
    expected_points = expected_points * np.where(expected_points[-1] < 0, -1, 1)
    np.testing.assert_allclose(found.points, expected_points, atol=1e-8)
    shares = (values**2 / (values**2).sum())[:2]
    assert found.explained == pytest.approx(shares.tolist())


def test_mds_of_adapters_on_a_plane_keeps_every_distance() -> None:
    name = "model.layers.0.q.weight"
    corners = [(0.0, 0.0), (3.0, 0.0), (3.0, 4.0), (0.0, 4.0)]
    found = embed([{name: torch.tensor(corner)} for corner in corners], "mds")
    for i in range(4):
        for j in range(4):
            expected = math.dist(corners[i], corners[j])
            assert math.dist(found.points[i], found.points[j]) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_method_takes_few_adapters_and_gives_the_same_points_again(method: str, count: int) -> None:
    snapshots = [snapshot(seed) for seed in range(count)]
    first, second = embed(snapshots, method, seed=3), embed(snapshots, method, seed=3)
    assert first.points == second.points
    assert np.isfinite(first.points).all()
    assert len(first.points) == count
    assert len(set(first.points)) == count


@pytest.mark.parametrize("method", METHODS)
def test_equal_adapters_can_be_embedded(method: str) -> None:
    points = embed([snapshot(0), snapshot(0), snapshot(0)], method).points
    assert np.isfinite(points).all()


def test_embeddings_that_cannot_be_made_say_why() -> None:
    with pytest.raises(DataError, match="at least 2 snapshots, got 1"):
        embed([snapshot(0)], "pca")
    with pytest.raises(ConfigError, match="pca, tsne, mds, got 'umap'"):
        embed([snapshot(0), snapshot(1)], "umap")
    with pytest.raises(DataError, match="do not hold the same parameters"):
        embed([snapshot(0), snapshot(1, layers=3)], "pca")
    with pytest.raises(DataError, match="same shape"):
        embed([{"x": torch.ones(2)}, {"x": torch.ones(3)}], "pca")
    with pytest.raises(DataError, match="no parameters"):
        embed([{}, {}], "pca")


def test_changes_are_the_distances_of_the_updates_per_layer_in_the_order_of_training() -> None:
    snapshots = {"second": snapshot(1), "first": snapshot(0)}
    tools = VisualizationTools(None, ["first", "second"], snapshots, initial=snapshot(9))
    figure = data(tools.parameter_changes())
    assert figure["layout"]["xaxis"]["ticktext"] == ["first", "second"]
    way = [full(snapshot(seed)).reshape(2, -1) for seed in (9, 0, 1)]
    expected = [[float((way[i + 1][layer] - way[i][layer]).norm()) for i in range(2)] for layer in range(2)]
    np.testing.assert_allclose(figure["data"][0]["z"], expected, rtol=1e-6)


def test_without_the_start_changes_begin_with_the_second_task() -> None:
    tools = VisualizationTools(None, ["a", "b", "c"], {"a": snapshot(0), "c": snapshot(1)})
    assert data(tools.parameter_changes())["layout"]["xaxis"]["ticktext"] == ["c"]
    assert [trace["name"] for trace in data(tools.adapter_embeddings())["data"]] == ["1  a", "2  c"]
    with pytest.raises(DataError, match="at least 2 snapshots, got 1"):
        VisualizationTools(None, ["a"], {"a": snapshot(0)}).parameter_changes()


def test_the_trajectory_begins_at_the_start() -> None:
    tools = VisualizationTools(None, ["a"], {"a": snapshot(0)}, initial=snapshot(1))
    assert [trace["name"] for trace in data(tools.task_trajectory())["data"]] == ["1  (start)", "2  a"]


def test_ranks_of_a_real_adalora_model_count_the_singular_values_that_are_left() -> None:
    config = AdaLoraConfig(
        target_modules=["q_proj"], init_r=4, target_r=2, total_step=10, task_type="CAUSAL_LM"
    )
    model = get_peft_model(tiny_llama_base(0), config)
    values = [parameter for name, parameter in model.named_parameters() if "lora_E" in name]
    with torch.no_grad():
        for i, value in enumerate(values):
            value.copy_(torch.tensor([[1.0], [0.0], [2.0], [0.0]]) if i == 0 else torch.ones(4, 1))
    ranks = adapter_ranks(dict(model.named_parameters()))
    assert list(ranks.values()) == [2, *[4] * (len(values) - 1)]
    figure = data(VisualizationTools(model, ["a"]).adapter_ranks())
    assert figure["data"][0]["z"] == [[2], *[[4]] * (len(values) - 1)]


def test_ranks_of_a_lora_model_and_of_a_snapshot_are_the_rows_of_a() -> None:
    assert set(adapter_ranks(dict(tiny_llama(r=3).named_parameters())).values()) == {3}
    tools = VisualizationTools(None, ["a"], {"a": snapshot(0, rank=5)})
    assert data(tools.adapter_ranks("a"))["data"][0]["z"] == [[5], [5]]
    with pytest.raises(ConfigError, match="no snapshot of task 'b'; there are a"):
        tools.adapter_ranks("b")
    with pytest.raises(ConfigError, match="need a model"):
        tools.adapter_ranks()


def test_importance_of_several_tasks_has_one_scale() -> None:
    scores = {
        "a": {f"{LAYER}.0.q": torch.tensor([1.0, 3.0])},
        "b": {f"{LAYER}.0.q": torch.tensor([10.0], dtype=torch.bfloat16)},
    }
    tools = VisualizationTools(None, ["a", "b"], importance_scores=scores)
    cells = data(tools.parameter_importance("a"))["data"][0]
    assert (cells["z"], cells["zmax"]) == ([[2.0]], 10.0)
    with pytest.raises(ConfigError, match="no importance for task None; there is 'a', 'b'"):
        tools.parameter_importance()
    alone = VisualizationTools(None, ["a"], importance_scores={f"{LAYER}.0.q": torch.tensor([1.0, 3.0])})
    assert data(alone.parameter_importance())["data"][0]["z"] == [[2.0]]


def test_a_snapshot_of_a_task_outside_the_order_is_refused() -> None:
    with pytest.raises(ConfigError, match="snapshot of task 'x', which is not one of a, b"):
        VisualizationTools(None, ["a", "b"], {"x": snapshot(0)})


def test_a_dashboard_needs_the_folder_it_is_written_to(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no folder '.*nowhere' to write 'page.html' to"):
        create_visualization_dashboard(None, ["one"], output=tmp_path / "nowhere" / "page.html")
