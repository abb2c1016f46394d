"""Names and defaults that users of the original module arrive with."""

from __future__ import annotations

import importlib
import inspect

import pytest

REPLAY = {"replay_ratio": 0.3, "replay_frequency": 10}
EWC = {
    "ewc_lambda": 5000.0,
    "fisher_sample_size": 200,
    "fisher_estimation_method": "empirical",
    "normalize_fisher": True,
}
BUFFER = {"buffer_size": 1000, **REPLAY}
ARGUMENTS = {
    "ewc_base:BaseEWC": EWC,
    "ewc_online:OnlineEWC": {**EWC, "online_gamma": 0.95},
    "ewc_synaptic:SynapticIntelligence": {"si_lambda": 1.0, "xi": 0.1, "normalize_importance": True},
    "replay_base:ReplayStrategy": REPLAY,
    "replay_experience:ExperienceReplay": {**BUFFER, "sampling_strategy": "uniform"},
    "replay_prioritized:PrioritizedExperienceReplay": {
        **BUFFER,
        "alpha": 0.6,
        "beta": 0.4,
        "beta_annealing": True,
        "beta_annealing_steps": 1000,
    },
    "replay_quality:QualityController": {
        "quality_threshold": 0.7,
        "diversity_threshold": 0.8,
        "min_length": 10,
        "max_length": 1000,
        "embedding_model_name": None,
        "embedding_batch_size": 8,
    },
    "orthogonal_base:OrthogonalLoRA": {
        "orthogonal_constraint_lambda": 1.0,
        "orthogonal_projection_alpha": 1.0,
        "use_gradient_projection": True,
        "use_loss_regularization": True,
    },
    "adaptive_svd:AdaptiveSVD": {
        "svd_rank": 10,
        "importance_threshold": 0.01,
        "projection_strength": 1.0,
        "update_frequency": 50,
        "use_incremental_svd": False,
    },
}
METHODS = {
    "ewc_base:BaseEWC": ("compute_forgetting", "get_importance_visualization"),
    "ewc_online:OnlineEWC": ("compute_forgetting", "get_importance_visualization"),
    "replay_base:ReplayStrategy": ("get_replay_batch",),
    "replay_experience:ExperienceReplay": ("update_importance_scores", "get_buffer_statistics"),
    "replay_prioritized:PrioritizedExperienceReplay": ("update_priorities", "get_buffer_statistics"),
    "replay_quality:QualityController": ("filter_examples",),
    "orthogonal_base:OrthogonalLoRA": ("get_orthogonality_visualization",),
}


def find(path: str) -> type:
    module, _, name = path.partition(":")
    found: type = getattr(importlib.import_module(f"clcore.strategies.{module}"), name)
    return found


@pytest.mark.parametrize("path", ARGUMENTS)
def test_arguments_come_in_the_original_order_with_the_original_defaults_and_new_ones_by_keyword(
    path: str,
) -> None:
    parameters = dict(inspect.signature(find(path)).parameters)
    parameters.pop("model", None)
    positional = {n: p.default for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(positional.items()) == list(ARGUMENTS[path].items())


@pytest.mark.parametrize("path", METHODS)
def test_methods_of_the_original_exist(path: str) -> None:
    assert [name for name in METHODS[path] if not callable(getattr(find(path), name, None))] == []
