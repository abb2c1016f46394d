"""Names become strategies: what is refused, what order hooks run in, and errors that cross processes."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clcore.engine import errors, registry
from clcore.engine.errors import ClError, CompositionError, ConfigError, StateError, StrategyError
from clcore.engine.loop import TrainConfig, fit_task
from clcore.engine.memory import MemorySession
from clcore.engine.params import Params
from clcore.engine.registry import (
    build_strategy,
    check_composition,
    config_class,
    make_config,
    parameter_docs,
    strategy_class,
)
from clcore.engine.strategy import ADDS, OBSERVES, PROJECTS, Composed, Strategy, compose
from clcore.engine.tasks import Example
from tests.clcore.tiny import new_session, tiny_dataset, tiny_llama


def test_an_unknown_strategy_is_refused_with_the_known_ones() -> None:
    for refuse in (
        strategy_class,
        config_class,
        lambda name: make_config(name, {}),
        lambda n: check_composition([(n, None)]),
    ):
        with pytest.raises(
            ConfigError, match=f"unknown strategy 'magic'; known: {', '.join(sorted(registry.STRATEGIES))}"
        ):
            refuse("magic")


@pytest.mark.parametrize("name", registry.STRATEGIES)
def test_every_parameter_of_a_job_is_explained_inherited_ones_too(name: str) -> None:
    fields = {field.name for field in dataclasses.fields(config_class(name))}
    texts = parameter_docs(config_class(name))
    assert set(texts) == fields
    assert all(text.endswith(".") and len(text) > 20 for text in texts.values())


def test_an_unknown_parameter_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="of strategy 'ewc': lamda; known: ewc_lambda, "):
        make_config("ewc", {"lamda": 1.0})
    with pytest.raises(ConfigError, match="of strategy 'none': x; known: none"):
        make_config("none", {"x": 1})


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("ewc", {"ewc_lambda": "strong"}, "ewc_lambda must be a number, got 'strong'"),
        ("ewc", {"ewc_lambda": True}, "ewc_lambda must be a number, got True"),
        ("ewc", {"fisher_sample_size": 1.5}, "fisher_sample_size must be a whole number, got 1.5"),
        ("ewc", {"normalize_fisher": "no"}, "normalize_fisher must be true or false, got 'no'"),
        ("ewc", {"fisher_estimation_method": 3}, "fisher_estimation_method must be a string, got 3"),
        ("experience_replay", {"buffer_size": None}, "buffer_size must be a whole number, got None"),
        ("experience_replay", {"replay_ratio": 1}, r"replay_ratio must be in \[0, 1\), got 1"),
    ],
)
def test_a_bad_value_is_a_config_error_whatever_its_type(
    name: str, params: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        make_config(name, params)


def test_a_whole_number_is_good_where_a_fraction_is_meant() -> None:
    assert make_config("ewc", {"ewc_lambda": 5}).ewc_lambda == 5


def test_a_strategy_is_built_with_job_defaults_and_the_given_parameters() -> None:
    model = tiny_llama()
    ewc: Any = build_strategy("ewc", {"fisher_sample_size": 7}, model)
    assert ewc.config == make_config("ewc", {"fisher_sample_size": 7})
    assert ewc.config.ewc_lambda == config_class("ewc")().ewc_lambda
    replay: Any = build_strategy("experience_replay", {"replay_ratio": 0.1}, model)
    assert (replay.replay.replay_ratio, replay.replay.replay_frequency) == (0.1, 1)


@pytest.mark.parametrize("owner", ["orthogonal_lora", "adaptive_svd"])
def test_what_compares_factors_is_refused_beside_a_strategy_that_makes_new_ones(owner: str) -> None:
    for name, params in [("ewc", {}), ("ewc_online", {}), ("si", {})]:
        both = [(owner, make_config(owner, {})), (name, make_config(name, params))]
        with pytest.raises(CompositionError, match=f"{owner!r} trains a new pair .* so {name!r}"):
            check_composition(both)
    model = tiny_llama()
    with pytest.raises(CompositionError, match=r"space='delta_w' works"):
        compose([build_strategy(owner, {}, model), build_strategy("ewc", {}, model)])
    for name in ("ewc", "ewc_online"):
        delta_w = build_strategy(name, {"space": "delta_w"}, model)
        replay = build_strategy("prioritized_replay", {}, model)
        compose([build_strategy(owner, {}, model), delta_w, replay])


class OwnerOne(Strategy):
    name, owns_adapter = "owner_one", True


class OwnerTwo(Strategy):
    name, owns_adapter = "owner_two", True


def test_strategies_that_cannot_work_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, cls in (("owner_one", OwnerOne), ("owner_two", OwnerTwo)):
        monkeypatch.setitem(registry.STRATEGIES, name, f"{cls.__module__}:{cls.__qualname__}")
    for names, said in [
        ([], "no strategy given"),
        (["ewc", "ewc"], "given twice: ewc"),
        (["none", "ewc"], "'none' cannot be combined with ewc"),
        (["owner_one", "ewc", "owner_two"], "only one strategy may own .* owner_one, owner_two"),
    ]:
        with pytest.raises(CompositionError, match=said):
            check_composition([(name, None) for name in names])
    check_composition([("ewc", None), ("experience_replay", None), ("owner_one", None)])
    check_composition([("none", None)])


def test_composing_one_strategy_gives_it_back_and_two_models_are_refused() -> None:
    first, second = tiny_llama(), tiny_llama()
    ewc = build_strategy("ewc", {}, first)
    assert compose([ewc]) is ewc
    with pytest.raises(CompositionError, match="same model"):
        compose([ewc, build_strategy("experience_replay", {}, second)])


class Recorder(Strategy):
    """Writes every call into a shared list."""

    def __init__(
        self, model: nn.Module, name: str, order: int, calls: list[str], edits: bool = False
    ) -> None:
        super().__init__(model)
        self.name, self.gradient_order, self.calls, self.edits_update = name, order, calls, edits  # type: ignore[misc]
        self.taken: Any = None

    def note(self, hook: str) -> None:
        self.calls.append(f"{hook}:{self.name}")

    def prepare_model(self, model: nn.Module, task_id: str, memory: MemorySession) -> nn.Module:  # noqa: ARG002
        self.note("prepare")
        return model

    def bind(self, model: nn.Module, params: Params, memory: MemorySession) -> None:
        super().bind(model, params, memory)
        self.note("bind")

    def before_training(self, task_id: str, train_dataset: Any = None) -> Any:  # noqa: ARG002
        self.note("before")
        return train_dataset

    def mix_batch(self, batch: list[Example], *, step: int) -> list[Example]:  # noqa: ARG002
        self.note("mix")
        return batch

    def modify_loss(
        self,
        loss: Tensor,
        model: nn.Module | None = None,  # noqa: ARG002
        *,
        batch: Mapping[str, Tensor] | None = None,  # noqa: ARG002
        outputs: Any = None,  # noqa: ARG002
    ) -> Tensor:
        self.note("loss")
        return loss

    def modify_gradients(self, params: Params | None = None) -> None:
        assert params is None or all(p.grad is not None for p in params.values())
        self.note("gradients")

    def modify_update(self, params: Params, before: Mapping[str, Tensor]) -> None:
        self.taken = {
            name: (before[name].clone(), p.detach().clone()) for name, p in params.items() if before
        }
        self.note("update")

    def after_training(self, task_id: str, train_dataset: Any = None) -> None:  # noqa: ARG002
        self.note("after")

    def metrics(self) -> Mapping[str, float]:
        return {"value": 1.0}

    def release_model(self, model: nn.Module, task_id: str) -> nn.Module:  # noqa: ARG002
        self.note("release")
        return model

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.taken = state


def test_hooks_run_in_order_gradients_from_observers_to_projectors_and_updates_back() -> None:
    model, calls = tiny_llama(), []
    parts = [
        Recorder(model, "p", PROJECTS, calls),
        Recorder(model, "o", OBSERVES, calls),
        Recorder(model, "a", ADDS, calls),
    ]
    config = TrainConfig(num_steps=1, learning_rate=1e-3, batch_size=4, micro_batch_size=2)
    result = fit_task(
        model, Composed(parts), tiny_dataset("t0", 4), task_id="t0", config=config, memory=new_session()
    )
    given, sorted_ = ["p", "o", "a"], ["o", "a", "p"]
    once = [
        ("prepare", given),
        ("bind", given),
        ("before", given),
        ("mix", given),
        ("loss", given),
        ("loss", given),
    ]
    rest = [("gradients", sorted_), ("update", sorted_[::-1]), ("after", given), ("release", given)]
    assert calls == [f"{hook}:{name}" for hook, names in [*once, *rest] for name in names]
    assert result.metrics == {"p/value": 1.0, "o/value": 1.0, "a/value": 1.0}
    assert parts[0].taken == {}  # nobody edits updates: nothing was copied


def test_the_update_hook_sees_parameters_before_and_after_the_step_if_it_asks() -> None:
    model = tiny_llama()
    editor = Recorder(model, "e", ADDS, [], edits=True)
    start = {name: p.detach().clone() for name, p in Params.of(model).items()}
    config = TrainConfig(num_steps=1, learning_rate=1e-3)
    fit_task(model, editor, tiny_dataset("t0", 4), task_id="t0", config=config, memory=new_session())
    assert all(torch.equal(before, start[name]) for name, (before, _) in editor.taken.items())
    assert any(not torch.equal(before, after) for before, after in editor.taken.values())


def test_attached_alone_the_update_hook_sees_the_step_too() -> None:
    model, calls = nn.Linear(2, 1), []
    editor = Recorder(model, "e", ADDS, calls, edits=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    editor.attach(optimizer)
    for _ in range(2):
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert all(torch.equal(before, start[name]) for name, (before, _) in editor.taken.items())
        assert all(not torch.equal(before, after) for before, after in editor.taken.values())
    assert calls == ["gradients:e", "update:e"] * 2


class NeedsAttach(Strategy):
    name, needs_attach = "needs_attach", True

    def after_training(self, task_id: str, train_dataset: Any = None) -> None:  # noqa: ARG002
        self.finish_task()


def test_a_strategy_that_needs_attach_raises_when_it_was_forgotten() -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(StrategyError, match="saw no optimizer step; call attach"):
        NeedsAttach(model).after_training("t0")
    attached = NeedsAttach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached.attach(optimizer)
    optimizer.step()
    attached.after_training("t0")
    with pytest.raises(StrategyError, match="saw no step of the optimizer it is attached to"):
        attached.after_training("t1")  # its task ran with another optimizer


def test_a_composition_keeps_states_apart_and_refuses_those_of_another() -> None:
    model = tiny_llama()
    parts = [Recorder(model, "a", ADDS, []), Recorder(model, "b", ADDS, [])]
    both = Composed(parts)
    assert both.state_dict() == {"a": {"name": "a"}, "b": {"name": "b"}}
    both.load_state_dict(both.state_dict())
    assert [part.taken for part in parts] == [{"name": "a"}, {"name": "b"}]
    with pytest.raises(StateError, match=r"\['a', 'c'\] does not fit strategies \['a', 'b'\]"):
        both.load_state_dict({"a": {}, "c": {}})
    with pytest.raises(StrategyError, match="by itself"):
        both.attach(torch.optim.SGD(model.parameters(), lr=0.1))


ERRORS = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, ClError)]


@pytest.mark.parametrize("cls", ERRORS)
def test_every_error_survives_pickling_with_its_message(cls: type[ClError]) -> None:
    copy = pickle.loads(pickle.dumps(cls("what was wrong")))
    assert type(copy) is cls
    assert str(copy) == "what was wrong"


def test_user_errors_are_value_errors_or_runtime_errors() -> None:
    assert len(ERRORS) == 11
    assert all(issubclass(cls, ValueError | RuntimeError) for cls in ERRORS if cls is not ClError)
