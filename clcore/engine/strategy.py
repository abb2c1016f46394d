"""Strategy: the hooks through which a continual-learning method takes part in training.

The loop calls them in this order, once per task:

    load_state_dict   prepare_model   (wrap)   bind   before_training
      per step:  mix_batch   modify_loss   (backward, sync)   modify_gradients   (clip, step)   modify_update
    after_training   metrics   release_model   (memory commit)

Every hook is optional. A strategy never hides in a tensor hook: FSDP2 fires none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from clcore.engine.config import StrategyConfig
from clcore.engine.errors import CompositionError, StateError, StrategyError
from clcore.engine.memory import InProcessMemory, MemorySession
from clcore.engine.params import Params

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from clcore.engine.tasks import Example

# Order of modify_gradients: what reads the gradient, then what adds to it, then what projects it. A penalty
# that is added before Synaptic Intelligence reads the gradient corrupts its importance.
OBSERVES, ADDS, PROJECTS = 0, 1, 2


class Strategy:
    """A continual-learning method. See the module's text for the order of the hooks."""

    name: ClassVar[str] = ""
    Config: ClassVar[type[Any]] = StrategyConfig
    edits_update: bool = False
    """The loop copies parameters before the optimizer's step only if True."""
    owns_adapter: bool = False
    """Adds, freezes or reshapes adapters; at most one such strategy in a composition."""
    gradient_order: ClassVar[int] = ADDS
    needs_attach: ClassVar[bool] = False
    """Used alone, the method works only after attach(optimizer)."""
    adapter_is_fresh: bool = False
    """Each task trains a new pair that starts at 0, beside frozen ones of earlier tasks; set before bind."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.params = Params.of(model)
        if not self.params:
            raise StrategyError(f"strategy {self.name!r} has nothing to work on: every parameter is frozen")
        self.memory = MemorySession(InProcessMemory(), version=0, op_id="alone")
        self.is_bound = False
        self.is_attached = False
        self._attached_to: Optimizer | None = None
        self._num_steps_seen = 0
        self._hooks: list[Any] = []

    # ------------------------------------------------------------------------------------- called by the loop

    def prepare_model(self, model: nn.Module, task_id: str, memory: MemorySession) -> nn.Module:  # noqa: ARG002
        """Add, freeze or activate adapters before the model is wrapped and the optimizer is built."""
        return model

    def bind(self, model: nn.Module, params: Params, memory: MemorySession) -> None:
        """Take the wrapped model, local views of its trainable parameters and the state of earlier tasks."""
        self.model, self.params, self.memory, self.is_bound = model, params, memory, True

    def before_training(self, task_id: str, train_dataset: Any = None) -> Any:  # noqa: ARG002
        """Start a task; return the data set to train on."""
        return train_dataset

    def mix_batch(self, batch: list[Example], *, step: int) -> list[Example]:  # noqa: ARG002
        """Return the rows of the global step, the same on every rank; step counts from 0."""
        return batch

    def modify_loss(
        self,
        loss: Tensor,
        model: nn.Module | None = None,  # noqa: ARG002
        *,
        batch: Mapping[str, Tensor] | None = None,  # noqa: ARG002
        outputs: Any = None,  # noqa: ARG002
    ) -> Tensor:
        """Return the loss to differentiate."""
        return loss

    def modify_gradients(self, params: Params | None = None) -> None:
        """Change gradients in place: after synchronisation and unscaling, before clipping."""

    def modify_update(self, params: Params, before: Mapping[str, Tensor]) -> None:
        """See or change what the optimizer's step applied; before holds copies from just before it."""

    def after_training(self, task_id: str, train_dataset: Any = None) -> None:
        """End a task: estimate what matters and stage it into memory."""

    def metrics(self) -> Mapping[str, float]:
        """Return numbers worth showing; called once per task, after after_training."""
        return {}

    def release_model(self, model: nn.Module, task_id: str) -> nn.Module:  # noqa: ARG002
        """Undo what prepare_model did for training: leave one plain adapter that holds everything learnt."""
        return model

    def state_dict(self) -> dict[str, Any]:
        """Return what changes between steps: tensors, numbers, strings, lists and dicts only."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what state_dict returned. Raises StateError for anything it does not know."""
        self.refuse_unknown(state)

    def refuse_unknown(self, state: Mapping[str, Any]) -> None:
        """Raise StateError for a key that state_dict does not have."""
        known = set(self.state_dict())
        odd = sorted(set(state) - known)
        if odd:
            said = f"known: {', '.join(sorted(known))}" if known else "it keeps nothing"
            raise StateError(f"strategy {self.name!r} keeps no {odd[0]!r} between steps; {said}")

    # -------------------------------------------------------------------------- alone, in someone else's loop

    def attach(self, optimizer: Optimizer) -> Strategy:
        """Run the gradient and update hooks around optimizer.step(), for use in a loop of your own.

        Attach after gradients are synchronised and unscaled by your loop, and clip before you call step().
        Attaching to another optimizer detaches from the one before.

        Raises StrategyError when the optimizer lacks a trained parameter or is attached already.
        """
        if self.is_bound:
            raise StrategyError(
                f"strategy {self.name!r} is driven by fit_task; attach() is for a loop of your own"
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in self.params.items() if id(p) not in held]
        if missing:
            raise StrategyError(
                f"the optimizer does not hold {missing[0]!r}; build and attach it after before_training, "
                "over all trainable parameters: a strategy may give every task its own"
            )
        if self._attached_to is optimizer:
            raise StrategyError(f"strategy {self.name!r} is attached to this optimizer already")
        for hook in self._hooks:
            hook.remove()
        before: dict[str, Tensor] = {}

        def pre_step(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if any(closure is not None for closure in (*args[1:], *kwargs.values())):
                raise StrategyError(
                    "attach() needs the gradients before step(): call step() without a closure"
                )
            self._num_steps_seen += 1
            self.modify_gradients(self.params)
            if self.edits_update:
                before.update(self.params.copies())

        def post_step(*_: object) -> None:
            self.modify_update(self.params, before)
            before.clear()

        self._hooks = [
            optimizer.register_step_pre_hook(pre_step),
            optimizer.register_step_post_hook(post_step),
        ]
        self._attached_to, self.is_attached = optimizer, True
        return self

    def finish_task(self) -> None:
        """Make staged state readable when nobody else commits it.

        Raises StrategyError when a needed attach() is missing, or the attached optimizer made no step.
        """
        if self.is_bound:
            return
        if self.is_attached and not self._num_steps_seen:
            raise StrategyError(
                f"strategy {self.name!r} saw no step of the optimizer it is attached to; "
                "attach(optimizer) again for the optimizer of each task"
            )
        if self.needs_attach and not self.is_attached:
            raise StrategyError(f"strategy {self.name!r} saw no optimizer step; call attach(optimizer) first")
        self._num_steps_seen = 0
        self.memory.commit()
        self.memory = self.memory.next_task(op_id=f"alone-{self.memory.version}")


class Composed(Strategy):
    """Several strategies as one; each hook calls them in turn."""

    name = "composed"

    def __init__(self, strategies: Sequence[Strategy]) -> None:
        self.strategies = list(strategies)
        self.edits_update = any(s.edits_update for s in strategies)
        self.owns_adapter = any(s.owns_adapter for s in strategies)
        self.adapter_is_fresh = any(s.adapter_is_fresh for s in strategies)
        self.is_bound = self.is_attached = False

    def prepare_model(self, model: nn.Module, task_id: str, memory: MemorySession) -> nn.Module:
        for strategy in self.strategies:
            model = strategy.prepare_model(model, task_id, memory)
        return model

    def bind(self, model: nn.Module, params: Params, memory: MemorySession) -> None:
        super().bind(model, params, memory)
        for strategy in self.strategies:
            strategy.adapter_is_fresh = self.adapter_is_fresh
            strategy.bind(model, params, memory)

    def before_training(self, task_id: str, train_dataset: Any = None) -> Any:
        for strategy in self.strategies:
            train_dataset = strategy.before_training(task_id, train_dataset)
        return train_dataset

    def mix_batch(self, batch: list[Example], *, step: int) -> list[Example]:
        for strategy in self.strategies:
            batch = strategy.mix_batch(batch, step=step)
        return batch

    def modify_loss(
        self,
        loss: Tensor,
        model: nn.Module | None = None,
        *,
        batch: Mapping[str, Tensor] | None = None,
        outputs: Any = None,
    ) -> Tensor:
        for strategy in self.strategies:
            loss = strategy.modify_loss(loss, model, batch=batch, outputs=outputs)
        return loss

    def modify_gradients(self, params: Params | None = None) -> None:
        for strategy in sorted(self.strategies, key=lambda s: s.gradient_order):
            strategy.modify_gradients(params)

    def modify_update(self, params: Params, before: Mapping[str, Tensor]) -> None:
        # The other way round: who observes sees the update that projections left.
        for strategy in sorted(self.strategies, key=lambda s: -s.gradient_order):
            strategy.modify_update(params, before)

    def after_training(self, task_id: str, train_dataset: Any = None) -> None:
        for strategy in self.strategies:
            strategy.after_training(task_id, train_dataset)

    def metrics(self) -> Mapping[str, float]:
        return {f"{s.name}/{key}": value for s in self.strategies for key, value in s.metrics().items()}

    def release_model(self, model: nn.Module, task_id: str) -> nn.Module:
        for strategy in self.strategies:
            model = strategy.release_model(model, task_id)
        return model

    def state_dict(self) -> dict[str, Any]:
        return {s.name: s.state_dict() for s in self.strategies}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        known = {s.name for s in self.strategies}
        if state and set(state) != known:
            raise StateError(f"state of strategies {sorted(state)} does not fit strategies {sorted(known)}")
        for strategy in self.strategies:
            strategy.load_state_dict(state.get(strategy.name, {}))

    def attach(self, optimizer: Optimizer) -> Strategy:  # noqa: ARG002
        raise StrategyError("attach() each strategy by itself; a composition runs inside fit_task")


def compose(strategies: Sequence[Strategy]) -> Strategy:
    """Join strategies into one. Raises CompositionError for a conflict (see registry.check_composition)."""
    # Not at the top: the strategies that the registry names import this file.
    from clcore.engine.registry import check_composition

    check_composition([(strategy.name, getattr(strategy, "config", None)) for strategy in strategies])
    models = {id(strategy.model) for strategy in strategies}
    if len(models) > 1:
        raise CompositionError("strategies of one composition must be built for the same model")
    return strategies[0] if len(strategies) == 1 else Composed(strategies)
