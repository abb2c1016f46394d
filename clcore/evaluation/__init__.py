"""Scores of tasks, what follows from them, and pictures of both.

Names load on first use: the scalars need neither torch nor plotly.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "average_accuracy": "scalars",
    "backward_transfer": "scalars",
    "forgetting": "scalars",
    "forward_transfer": "scalars",
    "learning_accuracy": "scalars",
    "matrix_scalars": "scalars",
}
"""Public name -> the module of this package that defines it."""

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
