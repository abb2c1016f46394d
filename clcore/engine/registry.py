"""The table of strategies, and how a job's names and parameters become configurations.

A row is a string, so that listing the names imports nothing.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clcore.engine.errors import CompositionError, ConfigError

if TYPE_CHECKING:
    from torch import nn

    from clcore.engine.strategy import Strategy

STRATEGIES: dict[str, str] = {
    "none": "clcore.strategies.none:NoStrategy",
    "ewc": "clcore.strategies.ewc_base:BaseEWC",
    "ewc_online": "clcore.strategies.ewc_online:OnlineEWC",
    "si": "clcore.strategies.ewc_synaptic:SynapticIntelligence",
    "experience_replay": "clcore.strategies.replay_experience:ExperienceReplay",
    "prioritized_replay": "clcore.strategies.replay_prioritized:PrioritizedExperienceReplay",
    "orthogonal_lora": "clcore.strategies.orthogonal_base:OrthogonalLoRA",
    "adaptive_svd": "clcore.strategies.adaptive_svd:AdaptiveSVD",
}


def strategy_class(name: str) -> type[Strategy]:
    """Import the class of a strategy. Raises ConfigError that names the known ones."""
    if name not in STRATEGIES:
        raise ConfigError(f"unknown strategy {name!r}; known: {', '.join(sorted(STRATEGIES))}")
    module, _, attribute = STRATEGIES[name].partition(":")
    found: type[Strategy] = getattr(importlib.import_module(module), attribute)
    return found


def config_class(name: str) -> type[Any]:
    """Return the frozen dataclass of a strategy's parameters; its defaults are the job defaults."""
    return strategy_class(name).Config


def parameter_docs(config: type[Any]) -> dict[str, str]:
    """Return parameter -> the text under its field, for a configuration class and what it inherits."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                found[field.target.id] = inspect.cleandoc(str(below.value.value))
    return found


def make_config(name: str, params: Mapping[str, Any]) -> Any:
    """Build and validate the configuration. Raises ConfigError for an unknown parameter or a bad value."""
    cls = config_class(name)
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(params) - set(known))
    if unknown:
        raise ConfigError(
            f"unknown parameter of strategy {name!r}: {', '.join(unknown)}; "
            f"known: {', '.join(known) or 'none'}"
        )
    return cls(**params)


def check_composition(strategies: Sequence[tuple[str, Any]]) -> None:
    """Refuse strategies that cannot work together, before anything is loaded.

    strategies: (name, configuration) of each. Raises ConfigError for an unknown name, CompositionError for a
    conflict.
    """
    names = [name for name, _ in strategies]
    classes = [strategy_class(name) for name in names]
    if not names:
        raise CompositionError("no strategy given; use 'none' to train without one")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CompositionError(f"strategy given twice: {', '.join(twice)}")
    if "none" in names and len(names) > 1:
        raise CompositionError(f"'none' cannot be combined with {', '.join(n for n in names if n != 'none')}")
    owners = [name for name, cls in zip(names, classes, strict=True) if cls.owns_adapter]
    if len(owners) > 1:
        raise CompositionError(f"only one strategy may own the adapter's structure, got {', '.join(owners)}")
    tied = [name for name, config in strategies if getattr(config, "needs_same_adapter", False)]
    if owners and tied:
        hint = "; space='delta_w' works with it" if tied[0].startswith("ewc") else ""
        raise CompositionError(
            f"{owners[0]!r} trains a new pair of factors per task, so {tied[0]!r}, "
            f"which compares the factors with those of earlier tasks, would protect nothing{hint}"
        )


def build_strategy(name: str, params: Mapping[str, Any], model: nn.Module) -> Strategy:
    """Build a strategy for a model with job defaults for what params leaves out."""
    config = make_config(name, params)
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return strategy_class(name)(model, **values)
