"""Online EWC (Schwarz et al. 2018, "Progress & Compress"): earlier tasks fade, all share the latest anchor.

    F <- gamma * F + F_t,    penalty = lambda/2 * sum_i F_i (theta_i - theta*_i)^2

theta* are the parameters at the end of the latest task. gamma 1 remembers all tasks alike, gamma 0 the latest
one only. Unlike EWC's, the penalty of an old task is moved to the latest anchor: it does not pull back.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import nn

from clcore.engine.errors import ConfigError
from clcore.strategies.ewc_base import BaseEWC, EWCConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineEWCConfig(EWCConfig):
    """Parameters of Online EWC in a job; the defaults are tuned for LoRA with AdamW."""

    online_gamma: float = 0.95
    """What is left of the importance of earlier tasks when one is added, in [0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.online_gamma <= 1:
            raise ConfigError(f"online_gamma must be in [0, 1], got {self.online_gamma}")


class OnlineEWC(BaseEWC):
    """Elastic weight consolidation with one anchor and fading importance; used as BaseEWC is."""

    name = "ewc_online"
    Config: ClassVar[type[Any]] = OnlineEWCConfig

    def __init__(
        self,
        model: nn.Module,
        ewc_lambda: float = 5000.0,
        fisher_sample_size: int = 200,
        fisher_estimation_method: str = "empirical",
        normalize_fisher: bool = True,
        online_gamma: float = 0.95,
        *,
        space: str = "factors",
    ) -> None:
        super().__init__(
            model, ewc_lambda, fisher_sample_size, fisher_estimation_method, normalize_fisher, space=space
        )
        self.config = OnlineEWCConfig(**dataclasses.asdict(self.config), online_gamma=online_gamma)
        self.online_gamma = online_gamma
