"""What a benchmark runs: strategies of the registry, by name and with what differs from the job defaults."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from clcore.engine.errors import ConfigError
from clcore.engine.registry import STRATEGIES, config_class, make_config

VARIANTS = (
    "ewc:space=delta_w",
    "adaptive_svd:source=gradients",
    "adaptive_svd:source=weights",
)
"""Other forms of a strategy that are worth a run of their own."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """A strategy with the parameters in which it differs from its job defaults."""

    strategy: str
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        """The text that parse_arm reads: name, or name:key=value:key=value."""
        return ":".join([self.strategy, *(f"{key}={value}" for key, value in self.params.items())])

    def config(self) -> dict[str, Any]:
        """Every parameter, defaults included. Raises ConfigError for what the strategy does not take."""
        return dataclasses.asdict(make_config(self.strategy, self.params))


def parse_arm(text: str) -> Arm:
    """Read name or name:key=value:key=value. Raises ConfigError for a name or a parameter that is unknown."""
    name, *pairs = text.strip().split(":")
    params = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals and value):
            raise ConfigError(f"parameters are written key=value, got {pair!r} in {text!r}")
        params[key] = _value(value)
    arm = Arm(name, params)
    arm.config()
    return arm


def parse_arms(text: str) -> list[Arm]:
    """Read a list with commas between the arms, as parse_arm does."""
    return [parse_arm(part) for part in text.split(",")]


def registered_arms(*, with_variants: bool) -> list[Arm]:
    """Return every strategy of the registry, 'none' first, and its variants after it if asked for."""
    arms = []
    for name in sorted(STRATEGIES, key=lambda name: (name != "none", name)):
        known = {field.name for field in dataclasses.fields(config_class(name))}
        arms.append(Arm(name))
        others = [text for text in VARIANTS if with_variants and text.split(":")[0] == name]
        arms += [parse_arm(text) for text in others if text.split(":")[1].split("=")[0] in known]
    return arms


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text  # a bare word is a string
