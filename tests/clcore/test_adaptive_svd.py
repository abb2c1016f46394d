"""Adaptive SVD: what each source protects, how exactly, and where it finds it.

Longer than other files: the sources of directions are held to the same properties, side by side.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clcore.engine.adapters import lora_layers, read_pair
from clcore.engine.errors import ConfigError, DataError, StrategyError
from clcore.engine.loop import TrainConfig, fit_task
from clcore.engine.loss import completion_nll
from clcore.engine.memory import MemorySession
from clcore.engine.params import Params
from clcore.engine.registry import build_strategy, make_config
from clcore.engine.state import load_state, save_state
from clcore.engine.tasks import collate
from clcore.strategies import svd_sources
from clcore.strategies.adaptive_svd import SOURCES, AdaptiveSVD
from clcore.strategies.fresh_pair import FreshPairStrategy
from clcore.strategies.svd_sources import (
    current_weight,
    strongest_rows,
    trained_layers,
)
from tests.clcore.owners import TwoTasks, full_weights, make_model, share_inside, two_tasks, weights_of
from tests.clcore.tiny import (
    assert_close,
    new_session,
    tiny_llama,
    tiny_llama_base,
    tiny_stream,
    trainable,
)

KINDS = ("lora", "lora_gpt2", "full", "full_gpt2")
SHORT = TrainConfig(num_steps=6, learning_rate=1e-2, batch_size=5, micro_batch_size=3)


Directions = dict[str, tuple[Tensor, Tensor]]


def leak(done: TwoTasks, source: str, directions: Directions | None = None) -> float:
    """Return the largest share of a layer's dW inside what had to be protected."""
    assert min(float(moved.norm()) for moved in done.moved.values()) > 1e-3
    shares = []
    for name, moved in done.moved.items():
        if directions is not None:
            assert isinstance(done.strategy, AdaptiveSVD)
            rank = done.strategy.ranks[name]
            right, left = directions[name]
            shares += [share_inside(moved, right[:rank]), share_inside(moved.T, left[:rank])]
        else:
            shares.append(share_inside(moved, done.state["inputs"][name]))
        if source == "gradients" and done.state["outputs"]:
            shares.append(share_inside(moved.T, done.state["outputs"][name]))
    return max(shares)


def leak_of(kind: str, source: str, **changes: Any) -> tuple[float, TwoTasks]:
    """Train two tasks; "weights" is measured on torch's SVD of the weights that the second started from."""
    base = {name: current_weight(layer).double() for name, layer in layers_of(make_model(kind)).items()}
    done = two_tasks(kind, "adaptive_svd", {"source": source}, **changes)
    if source != "weights":
        return leak(done, source), done
    directions: Directions = {}
    for name, end in weights_of(done.model).items():
        start = end - done.moved[name] + (base[name] if kind.startswith("lora") else 0)
        u, _, vh = torch.linalg.svd(start, full_matrices=False)
        directions[name] = (vh, u.T)
    return leak(done, source, directions), done


def layers_of(model: nn.Module) -> dict[str, svd_sources.Layer]:
    return trained_layers(model, Params.of(model))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", KINDS)
def test_200_adamw_steps_move_nothing_inside_what_is_protected(kind: str, source: str) -> None:
    found, done = leak_of(kind, source)
    assert found < 1e-5
    if kind == "lora":
        for name, layer in lora_layers(done.model).items():
            a, b = (x[4:] if i == 0 else x[:, 4:] for i, x in enumerate(read_pair(layer)))
            if source == "gradients":
                assert share_inside(a, done.state["inputs"][name]) < 1e-5
                assert share_inside(b.T, done.state["outputs"][name]) < 1e-5


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_projecting_gradients_alone_leaks(kind: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FreshPairStrategy, "modify_update", lambda *_: None)
    assert leak_of(kind, source, num_steps=50)[0] > 1e-2


def test_half_the_strength_leaks_more_than_all_and_less_than_none() -> None:
    leaks = []
    for strength in (1.0, 0.5, 0.0):
        params = {"source": "activations", "projection_strength": strength}
        leaks.append(leak(two_tasks("full", "adaptive_svd", params, num_steps=40), "activations"))
    assert leaks[0] < 1e-5 < 1e-2 < leaks[1] < 0.8 * leaks[2]


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_on_protected_inputs_stay_as_they_were(kind: str) -> None:
    """Threshold 0 and a large rank: every input that the first task's rows gave a layer is in the span."""
    model, session = make_model(kind), new_session()
    params = {"importance_threshold": 0.0, "svd_rank": 1000}
    first, second = (dataset for _, dataset in tiny_stream())
    first = first[:3]  # of five tokens: fewer inputs than directions
    config = TrainConfig(num_steps=10, learning_rate=1e-2)
    fit_task(
        model,
        build_strategy("adaptive_svd", params, model),
        first,
        task_id="t0",
        config=config,
        memory=session,
    )
    layers = layers_of(model)
    inputs: dict[str, Tensor] = {}
    handles = [
        layer.module.register_forward_pre_hook(lambda _, args, n=n: inputs.update({n: args[0].detach()}))
        for n, layer in layers.items()
    ]
    model.eval()
    with torch.no_grad():
        batch = collate(first, 0)
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for handle in handles:
            handle.remove()
        before = {n: layer.module(inputs[n]) for n, layer in layers.items()}
    start = trainable(model)
    config = TrainConfig(num_steps=50, learning_rate=1e-2)
    session = session.next_task(op_id="run/t1")
    fit_task(
        model,
        build_strategy("adaptive_svd", params, model),
        second,
        task_id="t1",
        config=config,
        memory=session,
    )
    model.eval()
    with torch.no_grad():
        for n, layer in layers_of(model).items():
            torch.testing.assert_close(layer.module(inputs[n]), before[n], rtol=0, atol=2e-5)
            other = torch.randn(inputs[n].shape, generator=torch.Generator().manual_seed(0))
            assert float((layer.module(other) - other @ old_weight(layer, start).T).abs().max()) > 1e-3


def old_weight(layer: svd_sources.Layer, start: dict[str, Tensor]) -> Tensor:
    """Return the weight that the layer had with these parameters; biases are 0 in tiny models."""
    if layer.input_parameter == layer.output_parameter:
        return start[layer.input_parameter].T if layer.is_transposed else start[layer.input_parameter]
    module: Any = layer.module
    a, b = start[layer.input_parameter], start[layer.output_parameter]
    return current_weight(layer) + float(module.scaling["default"]) * b @ a


@pytest.mark.parametrize("source", SOURCES)
def test_a_task_starts_as_the_function_that_the_one_before_left(source: str) -> None:
    for kind in ("lora", "full"):
        model, session = make_model(kind), new_session()
        (_, first), (_, second) = tiny_stream()
        params = {"source": source}
        fit_task(
            model,
            build_strategy("adaptive_svd", params, model),
            first,
            task_id="t0",
            config=SHORT,
            memory=session,
        )
        model.eval()
        session, start = session.next_task(op_id="run/t1"), logits(model)
        strategy = build_strategy("adaptive_svd", params, model)
        strategy.prepare_model(model, "t1", session)
        strategy.bind(model, Params.of(model), session)
        strategy.before_training("t1", second)
        torch.testing.assert_close(logits(model), start, rtol=0, atol=1e-6)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    batch = collate(tiny_stream()[0][1], 0)
    found: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return found


# ----------------------------------------------------------------------------------- source "gradients"


def planted(num_looks: int, rank: int, seed: int = 0) -> list[Tensor]:
    """Return gradients (8, 32) whose rows lie in one subspace, up to a little noise."""
    generator = torch.Generator().manual_seed(seed)
    subspace = torch.linalg.qr(torch.randn(32, rank, generator=generator)).Q.T
    return [
        torch.randn(8, rank, generator=generator) @ subspace + 1e-4 * torch.randn(8, 32, generator=generator)
        for _ in range(num_looks)
    ]


def collected(gradients: list[Tensor], **params: Any) -> dict[str, Tensor]:
    """Give a strategy these gradients of one A, one per step; B's are their left part."""
    model = tiny_llama(r=8, targets=["q_proj"])
    strategy = AdaptiveSVD(model, source="gradients", **params)
    strategy.before_training("t0")
    for gradient in gradients:
        for name, p in strategy.params.items():
            p.grad = gradient.clone() if "lora_A" in name else gradient[:, : p.shape[0]].T.clone()
        strategy.modify_gradients()
    return strategy._collected


def test_gradients_are_looked_at_on_the_second_and_every_nth_step() -> None:
    gradients = [torch.full((8, 32), float(10**i)) for i in range(6)]
    found = collected(gradients, update_frequency=4)
    for key, rows in found.items():
        assert rows.shape == (24, 32), key  # B is 0 on the first step, so the second is looked at as well
        assert sorted(set(rows[:, 0].tolist())) == [1.0, 10.0, 10000.0]
    assert {key.rpartition("/")[2] for key in found} == {"in", "out"}


@pytest.mark.parametrize("is_incremental", [True, False])
def test_summed_up_gradients_have_the_directions_and_scales_of_all(is_incremental: bool) -> None:
    gradients = planted(12, rank=5)
    found = collected(gradients, svd_rank=6, update_frequency=1, use_incremental_svd=is_incremental)
    whole = torch.cat(gradients).double()
    _, s, vh = torch.linalg.svd(whole, full_matrices=False)
    for rows in found.values():
        assert 5 <= len(rows) <= (6 if is_incremental else 32)  # never more than directions
        _, s_found, vh_found = torch.linalg.svd(rows.double(), full_matrices=False)
        torch.testing.assert_close(s_found[:5], s[:5], rtol=1e-4, atol=0)
        assert share_inside(vh_found[:5], vh[:5]) > 1 - 1e-6
        if not is_incremental:
            torch.testing.assert_close(rows.double().T @ rows.double(), whole.T @ whole, rtol=0, atol=1e-4)


def test_summed_up_and_full_collections_protect_the_same_subspace() -> None:
    states = []
    for is_incremental in (True, False):
        params = {"source": "gradients", "update_frequency": 1, "use_incremental_svd": is_incremental}
        states.append(two_tasks("lora", "adaptive_svd", params, num_steps=1).state)
    for side in ("inputs", "outputs"):
        for name, q in states[0][side].items():
            assert q.shape == states[1][side][name].shape
            assert share_inside(torch.tensor(q), states[1][side][name]) ** 2 > (1 - 1e-4)


def test_strongest_rows_keep_the_gram_matrix() -> None:
    rows = planted(3, rank=4)[0]
    kept = strongest_rows(rows, 4)
    assert kept.shape == (4, 32)
    torch.testing.assert_close(kept.T @ kept, rows.T @ rows, rtol=0, atol=2e-3)
    assert bool((kept.norm(dim=1).diff() <= 0).all())


def test_gradients_of_one_side_belong_to_its_factor() -> None:
    state = two_tasks("lora", "adaptive_svd", {"source": "gradients"}, num_steps=1).state
    for name, layer in lora_layers(make_model("lora")).items():
        a, b = read_pair(layer)
        assert state["inputs"][name].shape[1] == a.shape[1]
        assert state["outputs"][name].shape[1] == b.shape[0]
    state = two_tasks("full_gpt2", "adaptive_svd", {"source": "gradients"}, num_steps=1).state
    assert state["outputs"] == {}
    assert {name: q.shape[1] for name, q in state["inputs"].items()} == dict.fromkeys(state["inputs"], 32)


# ------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize(
    ("source", "is_incremental"),
    [("gradients", True), ("gradients", False), ("activations", True), ("weights", True)],
)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_resumed_task_equals_the_straight_one_and_leaves_the_same_memory(
    kind: str, source: str, is_incremental: bool, tmp_path: Path
) -> None:
    params = {"source": source, "update_frequency": 2, "use_incremental_svd": is_incremental}

    def first_task() -> tuple[nn.Module, MemorySession]:
        model, session = make_model(kind), new_session()
        strategy = build_strategy("adaptive_svd", params, model)
        fit_task(model, strategy, tiny_stream()[0][1], task_id="t0", config=SHORT, memory=session)
        return model, session.next_task(op_id="run/t1")

    def second_task(model: nn.Module, session: MemorySession, **calls: Any) -> None:
        strategy = build_strategy("adaptive_svd", params, model)
        fit_task(model, strategy, tiny_stream()[1][1], task_id="t1", config=SHORT, memory=session, **calls)

    model, session = first_task()
    second_task(model, session)
    straight, memory = trainable(model), session.read("adaptive_svd")

    model, session = first_task()
    states: list[dict[str, Any]] = []
    answers = iter([False, False, False, True])
    second_task(model, session, should_stop=lambda: next(answers), on_checkpoint=states.append)
    assert bool(states[0]["strategy"]["collected"]) == (source == "gradients")
    save_state(tmp_path, "training", states[0], generation="g")
    model, session = first_task()
    second_task(model, session, resume=load_state(tmp_path, "training", generation="g"))
    assert_close(trainable(model), straight)
    np.testing.assert_equal(session.read("adaptive_svd"), memory)


@pytest.mark.parametrize("source", SOURCES)
def test_a_new_object_per_task_leaves_the_memory_of_one_kept_over_all_tasks(source: str) -> None:
    memories = []
    for is_kept in (True, False):
        model, session = make_model("lora"), new_session()
        strategy = AdaptiveSVD(model, source=source, update_frequency=4)
        for i, (_, dataset) in enumerate(tiny_stream()):
            strategy = strategy if is_kept else AdaptiveSVD(model, source=source, update_frequency=4)
            fit_task(model, strategy, dataset, task_id=f"t{i}", config=SHORT, memory=session)
            memories.append(session.read("adaptive_svd"))
            session = session.next_task(op_id=f"run/t{i + 1}")
    np.testing.assert_equal(memories[2:], memories[:2])


# ------------------------------------------------------------------------------------------------- alone


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_alone_two_tasks_keep_off_what_is_protected(kind: str, source: str) -> None:
    model = make_model(kind)
    strategy = AdaptiveSVD(model, source=source, svd_rank=64, update_frequency=5)
    for i, (_, dataset) in enumerate(tiny_stream()):
        start = {name: w.clone() for name, w in weights_of(model).items()}
        strategy.before_training(f"t{i}", dataset)
        if kind == "lora" or i == 0:  # full weights keep their optimizer
            optimizer = torch.optim.AdamW(Params.of(model).values(), lr=1e-2)
            strategy.attach(optimizer)
        for _ in range(20):
            optimizer.zero_grad()
            nll, labels = completion_nll(model, collate(dataset, 0))
            (nll.sum() / labels.sum()).backward()
            optimizer.step()
        protected = strategy.protected
        strategy.after_training(f"t{i}", dataset)
    assert protected.names
    layers = layers_of(model)
    for name, w in weights_of(model).items():
        moved = w - start[name]
        assert float(moved.norm()) > 1e-3
        layer = layers[name]
        for parameter, bases, side in [
            (layer.input_parameter, protected.right, moved),
            (layer.output_parameter, protected.left, moved.T),
        ]:
            if parameter in bases:
                assert share_inside(side, bases[parameter]) < 1e-5


def test_alone_a_forgotten_attach_is_an_error() -> None:
    for kind in ("lora", "full"):
        model = make_model(kind)
        strategy = AdaptiveSVD(model, source="activations")
        strategy.before_training("t0")
        with pytest.raises(StrategyError, match="saw no optimizer step; call attach"):
            strategy.after_training("t0", tiny_stream()[0][1])


@pytest.mark.parametrize("hook", ["before_training", "after_training"])
def test_sources_that_look_at_rows_say_so_without_any(hook: str) -> None:
    source = "weights" if hook == "before_training" else "activations"
    strategy = AdaptiveSVD(tiny_llama(), source=source)
    if hook == "after_training":
        strategy.before_training("t0")
    with pytest.raises(DataError, match=f"source '{source}' needs the rows of task 't0'"):
        getattr(strategy, hook)("t0")
    with pytest.raises(DataError, match="task 't0' has no rows"):
        getattr(strategy, hook)("t0", [])


# --------------------------------------------------------------------------------------- what is refused


def test_a_task_without_a_free_direction_is_refused_by_layer() -> None:
    for side in ("inputs", "outputs"):
        model, session = make_model("lora"), new_session()
        name, layer = next(iter(lora_layers(model).items()))
        d = read_pair(layer)[0].shape[1] if side == "inputs" else read_pair(layer)[1].shape[0]
        state: dict[str, Any] = {"rank": 4, "inputs": {}, "outputs": {}, side: {name: torch.eye(d)}}
        session.stage("adaptive_svd", state)
        session.commit()
        with pytest.raises(StrategyError, match=rf"no direction is left .* '{name}': all {d} are protected"):
            fit_task(
                model,
                build_strategy("adaptive_svd", {}, model),
                tiny_stream()[1][1],
                task_id="t1",
                config=SHORT,
                memory=session.next_task(op_id="run/t1"),
            )


def test_trained_parameters_that_no_projection_reaches_are_refused() -> None:
    model = full_weights(tiny_llama_base(), "q_proj", "embed_tokens")
    with pytest.raises(StrategyError, match=r"embed_tokens.weight' is trained but is neither"):
        AdaptiveSVD(model).before_training("t0")
    model = full_weights(tiny_llama_base(attention_bias=True), "q_proj")
    model.model.layers[0].self_attn.q_proj.bias.requires_grad_(True)  # type: ignore[index, union-attr]
    with pytest.raises(StrategyError, match=r"q_proj.bias' is trained but is neither"):
        AdaptiveSVD(model).before_training("t0")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"svd_rank": 0}, "svd_rank must be at least 1, got 0"),
        ({"update_frequency": 0}, "update_frequency must be at least 1, got 0"),
        ({"sample_rows": 0}, "sample_rows must be at least 1, got 0"),
        ({"importance_threshold": 1.0}, r"importance_threshold must be in \[0, 1\), got 1.0"),
        ({"importance_threshold": float("nan")}, r"importance_threshold must be in \[0, 1\), got nan"),
        ({"projection_strength": 1.1}, r"projection_strength must be in \[0, 1\], got 1.1"),
        ({"source": "luck"}, "source must be one of gradients, activations, weights, got 'luck'"),
        ({"min_rank_ratio": 0.9}, "min_rank_ratio <= target_rank_ratio < 1 must hold, got 0.9 and 0.8"),
        ({"target_rank_ratio": 1.0}, "target_rank_ratio < 1 must hold, got 0.1 and 1.0"),
    ],
)
def test_bad_parameters_are_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config("adaptive_svd", params)
