"""What others publish, as strategies, so that their step runs in the same loop on the same tensors.

Only the cost of a step is compared. The state of earlier tasks is filled in with numbers of the right shapes.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from peft import OSFConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from clcore.engine.params import Params
from clcore.engine.strategy import Strategy
from clcore.engine.tasks import Example
from clcore.strategies.none import NoStrategy

RANK = 8
PREVIOUS = "previous_A"


@dataclasses.dataclass(frozen=True)
class Peer:
    """A published implementation."""

    label: str
    make_strategy: Callable[[nn.Module, int], Strategy]
    make_model: Callable[[nn.Module], nn.Module] | None = None
    """base model -> model, where the adapter is the method; None takes LoRA."""
    module: str = ""
    """What must be importable."""

    def missing(self) -> str | None:
        """Say why the peer cannot run here, or None."""
        if not self.module:
            return None
        try:
            importlib.import_module(self.module)
        except Exception as error:  # a package that does not fit this torch fails in its own way
            return f"not installed: {type(error).__name__}: {str(error)[:200]}"
        return None


class ReleasedOLoRA(Strategy):
    """O-LoRA's penalty in the form of its released training loop (Wang et al. 2023).

    For every frozen A of earlier tasks all parameters are searched for the new A of the same module; the
    penalty sums |A_previous A_new^T|, and three numbers are logged per step. The forward pass of the earlier
    pairs, which that code also runs, is left out.
    """

    name = "released_olora"

    def __init__(self, model: nn.Module, num_previous: int) -> None:
        super().__init__(model)
        self.logged: list[tuple[float, float, float]] = []
        for module in model.modules():
            if isinstance(module, LoraLayer):
                features = module.in_features
                assert features is not None
                previous = torch.randn(RANK * num_previous, features) / features**0.5
                module.register_parameter(PREVIOUS, nn.Parameter(previous, requires_grad=False))

    def modify_loss(
        self,
        loss: Tensor,
        model: nn.Module | None = None,  # noqa: ARG002
        *,
        batch: Mapping[str, Tensor] | None = None,  # noqa: ARG002
        outputs: Any = None,  # noqa: ARG002
    ) -> Tensor:
        """Add 0.5 * sum |A_previous A_new^T|; the norm of the new pair has weight 0 but is computed."""
        overlap: Any = 0.0
        for name, previous in self.model.named_parameters():
            if PREVIOUS in name:
                for other, new in self.model.named_parameters():
                    if "lora_A" in other and name.split(PREVIOUS)[0] == other.split("lora_A")[0]:
                        overlap = overlap + (previous @ new.T).abs().sum()
                        break
        norm: Any = 0.0
        for name, new in self.model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                norm = norm + new.norm()
        self.logged = [(overlap.item(), norm.item(), loss.item())]
        total: Tensor = loss + 0.5 * overlap + 0.0 * norm
        return total


class AvalancheEWC(Strategy):
    """Avalanche's EWCPlugin, mode "separate": one importance and one anchor per earlier task."""

    name = "avalanche_ewc"

    def __init__(self, model: nn.Module, num_previous: int) -> None:
        super().__init__(model)
        plugins = importlib.import_module("avalanche.training.plugins")
        data = importlib.import_module("avalanche.training.utils").ParamData
        self.plugin = plugins.EWCPlugin(ewc_lambda=1.0)
        for task in range(num_previous):
            values = {name: p.detach().clone() for name, p in self.params.items()}
            self.plugin.saved_params[task] = {n: data(n, init_tensor=v) for n, v in values.items()}
            self.plugin.importances[task] = {
                n: data(n, init_tensor=torch.full_like(v, 1e-3)) for n, v in values.items()
            }
        self.template = _template(model, num_previous)

    def modify_loss(
        self,
        loss: Tensor,
        model: nn.Module | None = None,  # noqa: ARG002
        *,
        batch: Mapping[str, Tensor] | None = None,  # noqa: ARG002
        outputs: Any = None,  # noqa: ARG002
    ) -> Tensor:
        """Let the plugin add its penalty."""
        return _with_penalty(self.plugin, self.template, loss)


class AvalancheSI(Strategy):
    """Avalanche's SynapticIntelligencePlugin; its state does not grow with tasks."""

    name = "avalanche_si"

    def __init__(self, model: nn.Module, num_previous: int) -> None:
        super().__init__(model)
        plugins = importlib.import_module("avalanche.training.plugins")
        self.plugin = plugins.SynapticIntelligencePlugin(si_lambda=1.0)
        self.template = _template(model, num_previous)

    def bind(self, model: nn.Module, params: Params, memory: Any) -> None:
        """Start the plugin's task."""
        super().bind(model, params, memory)
        self.plugin.before_training_exp(self.template)

    def mix_batch(self, batch: list[Example], *, step: int) -> list[Example]:  # noqa: ARG002
        """Let the plugin copy the parameters before the step."""
        self.plugin.before_training_iteration(self.template)
        return batch

    def modify_loss(
        self,
        loss: Tensor,
        model: nn.Module | None = None,  # noqa: ARG002
        *,
        batch: Mapping[str, Tensor] | None = None,  # noqa: ARG002
        outputs: Any = None,  # noqa: ARG002
    ) -> Tensor:
        """Let the plugin add its penalty."""
        return _with_penalty(self.plugin, self.template, loss)

    def modify_update(self, params: Params, before: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        """Let the plugin see what the step did."""
        self.plugin.after_training_iteration(self.template)


def _template(model: nn.Module, num_previous: int) -> SimpleNamespace:
    """What the plugins read of Avalanche's own training loop."""
    clock = SimpleNamespace(train_exp_counter=num_previous)
    return SimpleNamespace(model=model, loss=None, device=torch.device("cpu"), clock=clock)


def _with_penalty(plugin: Any, template: SimpleNamespace, loss: Tensor) -> Tensor:
    template.loss = loss + 0.0  # the plugins add in place
    plugin.before_backward(template)
    total: Tensor = template.loss
    template.loss = None
    return total


def _osf(base: nn.Module) -> nn.Module:
    """PEFT's OSF on the modules that LoRA has, with its default rank."""
    config = OSFConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(base, config)


PEERS = (
    Peer("peer: O-LoRA, released form", ReleasedOLoRA),
    Peer("peer: Avalanche EWC", AvalancheEWC, module="avalanche.training.plugins"),
    Peer("peer: Avalanche SI", AvalancheSI, module="avalanche.training.plugins"),
    Peer("peer: PEFT OSF", lambda model, _: NoStrategy(model), make_model=_osf),
)
