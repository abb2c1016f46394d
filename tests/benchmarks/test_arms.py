"""How the benchmarks name what they run."""

from __future__ import annotations

import pytest

from benchmarks.arms import Arm, parse_arm, parse_arms, registered_arms
from clcore.engine.errors import ConfigError
from clcore.engine.registry import STRATEGIES


def test_parameters_keep_their_types_and_labels_read_back() -> None:
    arm = parse_arm("ewc:ewc_lambda=3:normalize_fisher=false:fisher_estimation_method=empirical")
    assert arm.params == {
        "ewc_lambda": 3,
        "normalize_fisher": False,
        "fisher_estimation_method": "empirical",
    }
    assert parse_arm(parse_arm("ewc:ewc_lambda=0.5").label) == Arm("ewc", {"ewc_lambda": 0.5})


def test_a_list_is_split_at_commas() -> None:
    assert [arm.label for arm in parse_arms("none, ewc:ewc_lambda=3")] == ["none", "ewc:ewc_lambda=3"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("magic", "unknown strategy 'magic'; known: "),
        ("ewc:colour=red", "unknown parameter of strategy 'ewc': colour"),
        ("ewc:ewc_lambda", "key=value, got 'ewc_lambda'"),
        ("ewc:ewc_lambda=-1", "ewc_lambda must be .* got -1"),
    ],
)
def test_what_cannot_run_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_arm(text)


def test_all_arms_are_the_registry_with_plain_training_first() -> None:
    labels = [arm.label for arm in registered_arms(with_variants=False)]
    assert labels[0] == "none"
    assert sorted(labels) == sorted(STRATEGIES)


def test_variants_follow_their_strategy_and_exist() -> None:
    arms = registered_arms(with_variants=True)
    assert {arm.strategy for arm in arms if not arm.params} == set(STRATEGIES)
    for arm in arms:
        arm.config()
