"""No continual learning: plain sequential fine-tuning, the baseline that every strategy is compared with."""

from __future__ import annotations

from clcore.engine.strategy import Strategy


class NoStrategy(Strategy):
    """Train each task in turn and protect nothing."""

    name = "none"
