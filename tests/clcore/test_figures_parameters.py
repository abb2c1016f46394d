"""Figures of parameters and of what strategies hold: cells and shares worked out by hand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from clcore.engine.errors import ConfigError, DataError
from clcore.evaluation.eval_visualization import (
    adapter_embedding_figure,
    adapter_ranks_figure,
    mask_capacity_figure,
    mask_overlap_figure,
    orthogonality_figure,
    parameter_changes_figure,
    parameter_importance_figure,
    replay_composition_figure,
    task_trajectory_figure,
)
from clcore.evaluation.figures_parameters import layer_and_module

LLAMA = "base_model.model.model.layers"


def data(figure: go.Figure) -> Any:
    return json.loads(figure.to_json())


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        (f"{LLAMA}.3.mlp.up_proj.lora_A.default.weight", 3, "mlp.up_proj"),
        (f"{LLAMA}.12.self_attn.q_proj.lora_B.weight", 12, "self_attn.q_proj"),
        (f"{LLAMA}.0.self_attn.q_proj", 0, "self_attn.q_proj"),
        ("base_model.model.transformer.h.1.attn.c_attn.lora_E.default", 1, "attn.c_attn"),
        ("model.decoder.layers.2.fc1.weight", 2, "decoder.fc1"),
        ("model.layers.2.mlp.down_proj.ia3_l.default", 2, "mlp.down_proj"),
        ("base_model.model.lm_head.lora_A.default.weight", None, "lm_head"),
    ],
)
def test_a_parameter_belongs_to_a_layer_and_a_module(name: str, layer: int | None, module: str) -> None:
    assert layer_and_module(name) == (layer, module)


def test_changes_of_a_layer_are_the_root_of_the_sum_of_squares() -> None:
    changes: dict[str, dict[str, float | None]] = {
        "a": {f"{LLAMA}.10.q": 3.0, f"{LLAMA}.10.v": 4.0, f"{LLAMA}.2.q": 1.0, "lm_head": 0.0},
        "b": {f"{LLAMA}.10.q": 3.0, f"{LLAMA}.10.v": None},
    }
    figure = data(parameter_changes_figure(changes))
    cells = figure["data"][0]
    assert figure["layout"]["yaxis"]["ticktext"] == ["2", "10", "outside"]
    assert cells["z"] == [[1.0, None], [5.0, None], [0.0, None]]
    assert (cells["zmin"], cells["zmax"]) == (0, 5)
    assert cells["colorbar"]["title"]["text"] == "L2 norm of the change"


def test_importance_of_a_module_is_the_mean_over_all_its_elements() -> None:
    importance = {
        f"{LLAMA}.0.q.lora_A.default.weight": np.array([[1.0, 2.0], [3.0, 6.0]]),
        f"{LLAMA}.0.q.lora_B.default.weight": np.array([[0.0], [0.0]]),
        f"{LLAMA}.1.v.lora_A.default.weight": 5.0,
    }
    figure = data(parameter_importance_figure(importance, most=8.0))
    cells = figure["data"][0]
    assert cells["z"] == [[2.0, None], [None, 5.0]]  # (1 + 2 + 3 + 6) / 6
    assert cells["zmax"] == 8
    assert figure["layout"]["xaxis"]["ticktext"] == ["q", "v"]
    with pytest.raises(DataError, match="finite numbers of at least 0"):
        parameter_importance_figure({"q": np.array([-1.0])})


def test_ranks_stand_in_their_cells_as_whole_numbers() -> None:
    figure = data(adapter_ranks_figure({f"{LLAMA}.0.q": 8, f"{LLAMA}.1.q": 0, f"{LLAMA}.1.v": 3}))
    cells, text = figure["data"]
    assert cells["z"] == [[8, None], [0, 3]]
    assert sorted(text["text"]) == ["0", "3", "8"]
    with pytest.raises(DataError, match="two ranks belong to layer 0"):
        adapter_ranks_figure({f"{LLAMA}.0.q": 8, "other.layers.0.q": 2})


def test_points_of_adapters_are_numbered_in_the_order_of_training_on_equal_scales() -> None:
    figure = data(adapter_embedding_figure(["a", "b"], [(0, 1), (2, 3)], method="pca", explained=(0.75, 0.2)))
    assert [(trace["x"], trace["y"], trace["text"]) for trace in figure["data"]] == [
        ([0], [1], ["1"]),
        ([2], [3], ["2"]),
    ]
    assert [trace["name"] for trace in figure["data"]] == ["1  a", "2  b"]
    assert "75 % of the variance" in figure["layout"]["xaxis"]["title"]["text"]
    assert figure["layout"]["yaxis"]["scaleanchor"] == "x"
    with pytest.raises(ConfigError, match="pca, mds, tsne, got 'umap'"):
        adapter_embedding_figure(["a"], [(0, 1)], method="umap")
    with pytest.raises(DataError, match="2 adapters need 2 points"):
        adapter_embedding_figure(["a", "b"], [(0, 1)], method="pca")


def test_arrows_of_a_trajectory_lead_from_each_task_to_the_next_that_moved() -> None:
    figure = task_trajectory_figure(["a", "b", "c", "d"], [(0, 0), (1, 2), (1, 2), (3, 1)])
    arrows = [
        (note["ax"], note["ay"], note["x"], note["y"]) for note in data(figure)["layout"]["annotations"]
    ]
    assert arrows == [(0, 0, 1, 2), (1, 2, 3, 1)]


def test_replay_over_steps_is_stacked_and_a_task_not_named_holds_nothing() -> None:
    figure = data(replay_composition_figure([(0, {"a": 40}), (10, {"a": 30, "b": 10})], unit="rows"))
    assert [(trace["x"], trace["y"]) for trace in figure["data"]] == [([0, 10], [40, 30]), ([0, 10], [0, 10])]
    assert {trace["stackgroup"] for trace in figure["data"]} == {"held"}
    assert figure["layout"]["yaxis"]["title"]["text"] == "rows"
    assert figure["layout"]["xaxis"]["title"]["text"] == "training step (optimizer updates)"


def test_replay_over_tasks_is_one_stacked_bar_per_task() -> None:
    figure = data(replay_composition_figure([("a", {"a": 40}), ("b", {"a": 20, "b": 20})]))
    assert [trace["y"] for trace in figure["data"]] == [[40, 20], [0, 20]]
    assert figure["layout"]["barmode"] == "stack"
    assert figure["layout"]["xaxis"]["ticktext"] == ["a", "b"]
    with pytest.raises(DataError, match="no tasks to draw"):
        replay_composition_figure([])


MASKS = {
    "a": {"x": np.array([1, 1, 0, 0]), "y": np.array([0, 0, 0, 0])},
    "b": {"x": np.array([0, 1, 1, 1]), "y": np.array([0, 0, 0, 0])},
    "c": {"x": np.array([0, 0, 0, 0]), "y": np.array([0, 0, 0, 0])},
}


def test_mask_overlap_is_intersection_over_union_and_blank_where_both_are_empty() -> None:
    cells = data(mask_overlap_figure(MASKS))["data"][0]
    assert cells["z"] == [[1.0, 0.25, 0.0], [0.25, 1.0, 0.0], [0.0, 0.0, None]]
    assert (cells["zmin"], cells["zmax"]) == (0, 1)


def test_mask_capacity_splits_all_components_into_four_parts() -> None:
    figure = data(mask_capacity_figure(MASKS))
    parts = {trace["name"]: trace["y"] for trace in figure["data"]}
    # of 8 components: a takes 2; b takes 3, one of them from a; c takes none
    assert parts == {
        "earlier tasks only": [0.0, 12.5, 50.0],
        "reused": [0.0, 12.5, 0.0],
        "newly claimed": [25.0, 25.0, 0.0],
        "free": [75.0, 50.0, 50.0],
    }
    assert figure["layout"]["yaxis"]["title"]["text"] == "share of all components (%)"


def test_masks_of_different_shapes_are_refused() -> None:
    with pytest.raises(DataError, match="masks of 'b' have shapes"):
        mask_overlap_figure({"a": {"x": [True]}, "b": {"x": [True, False]}})


def test_orthogonality_is_between_0_and_1() -> None:
    cells = data(orthogonality_figure(["a", "b"], [[1, 0.1], [0.1, 1]]))["data"][0]
    assert (cells["zmin"], cells["zmax"], cells["z"][0][1]) == (0, 1, 0.1)
    with pytest.raises(DataError, match=r"must be in \[0, 1\], got -0.1"):
        orthogonality_figure(["a", "b"], [[1, -0.1], [-0.1, 1]])
