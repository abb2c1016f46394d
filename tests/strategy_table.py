"""One row per strategy: what the contract tests run it with, and how little it must forget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class StrategyRow:
    """A strategy of the registry on the two-task stream of tests/clcore/tiny.py, 60 steps per task."""

    name: str
    params: Mapping[str, object] = dataclasses.field(default_factory=dict)
    """Parameters in which the contract tests differ from the job defaults."""
    max_forgetting: float
    """Bound on the rise of the first task's loss while the second is learnt, in nats per label token."""
    max_new_loss: float
    """Bound on the second task's loss at the end: learning nothing protects everything."""


ROWS = [
    # Measured: 1.15 forgotten, new loss 1.18.
    StrategyRow(name="none", max_forgetting=2.0, max_new_loss=1.3),
    # Measured: 0.33 and 1.18.
    StrategyRow(name="ewc", max_forgetting=0.6, max_new_loss=1.3),
    # Measured: 0.01 and 1.18.
    StrategyRow(name="experience_replay", max_forgetting=0.1, max_new_loss=1.3),
]
