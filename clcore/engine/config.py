"""Configurations are frozen dataclasses whose values have the right types."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any, get_type_hints

from clcore.engine.errors import ConfigError

KINDS: dict[type, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    str: ("a string", (str,)),
}
"""Type of a parameter -> how errors call it, and the types that are accepted for it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """Parameters of a strategy in a job: none here, a subclass adds its own, with their job defaults."""

    def __post_init__(self) -> None:
        """Check the types; subclasses call this, then check ranges."""
        check_types(self)


def check_types(config: Any) -> None:
    """Raise ConfigError for a field of a dataclass that holds a value of the wrong type."""
    for name, kind in _types_of(config.__class__).items():
        if kind not in KINDS:
            continue
        value, (words, allowed) = getattr(config, name), KINDS[kind]
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{name} must be {words}, got {value!r}")


@cache
def _types_of(cls: type[Any]) -> dict[str, Any]:
    return get_type_hints(cls)
