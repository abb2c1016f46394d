"""Where adaptive SVD finds directions: ranks and directions of weights, and inputs of layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clcore.engine.errors import StrategyError
from clcore.engine.loop import TrainConfig, fit_task
from clcore.engine.memory import MemorySession
from clcore.engine.params import Params
from clcore.engine.registry import build_strategy
from clcore.engine.tasks import Example
from clcore.strategies import svd_sources
from clcore.strategies.adaptive_svd import AdaptiveSVD
from clcore.strategies.svd_sources import (
    adaptive_ranks,
    current_weight,
    sample_inputs,
    trained_layers,
    weight_directions,
)
from tests.clcore.owners import make_model, share_inside, two_tasks, weights_of
from tests.clcore.tiny import (
    new_session,
    tiny_llama,
    tiny_stream,
)

KINDS = ("lora", "lora_gpt2", "full", "full_gpt2")
SHORT = TrainConfig(num_steps=6, learning_rate=1e-2, batch_size=5, micro_batch_size=3)


def layers_of(model: nn.Module) -> dict[str, svd_sources.Layer]:
    return trained_layers(model, Params.of(model))


# ------------------------------------------------------------------------------------- source "weights"


def test_the_adaptive_rank_by_hand_on_two_layers() -> None:
    """Layer a passes its inputs on: cos 1. Layer b drops 3/4 of their energy: cos(x, W^T W x) = 1/2.

    Importance over the mean 3/4: 4/3 and 2/3; shares .1 + .6 * I: .9 and .5 of 20.
    """
    eye = torch.eye(30)
    weights = {"a": torch.eye(20), "b": eye[:20]}
    inputs = {"a": 7 * torch.eye(20)[:2], "b": (eye[0] + 3**0.5 * eye[25]).repeat(3, 1)}
    assert adaptive_ranks(weights, inputs, least=0.1, target=0.7) == {"a": 18, "b": 10}
    assert adaptive_ranks(weights, inputs, least=0.1, target=0.1) == {"a": 2, "b": 2}
    # .1 + .8 * 4/3 is more than everything: .95 of 20 and .1 + .8 * 2/3 of 20 = 12.67
    assert adaptive_ranks(weights, inputs, least=0.1, target=0.9) == {"a": 19, "b": 12}
    # The same for the transposed layer: the smaller side counts. Its inputs pass, so both are average.
    turned = {"a": torch.eye(20), "c": eye[:, :20]}
    same = adaptive_ranks(turned, {"a": torch.eye(20), "c": torch.eye(20)}, least=0.1, target=0.8)
    assert same == {"a": 16, "c": 16}
    # 0.29 * 100 is 28.999999999999996
    assert adaptive_ranks({"e": torch.eye(100)}, {"e": torch.eye(100)}, least=0.0, target=0.29) == {"e": 29}


def test_importance_is_the_cosine_with_the_layer_there_and_back() -> None:
    """W = diag(2, 1), x = (1, 1): W^T W x = (4, 1), cos = 5 / sqrt(34); W x alone would give 3 / sqrt(10)."""
    weights = {"a": torch.zeros(100, 100), "b": torch.eye(100)}
    weights["a"][0, 0], weights["a"][1, 1] = 2.0, 1.0
    x = torch.zeros(1, 100)
    x[0, :2] = 1
    cosine = 5 / 34**0.5
    mean = (cosine + 1) / 2
    wanted = {"a": int(100 * (0.7 * cosine / mean)), "b": int(100 * min(0.7 / mean, 0.95))}
    assert adaptive_ranks(weights, {"a": x, "b": x}, least=0.0, target=0.7) == wanted == {"a": 64, "b": 75}


def test_inputs_that_nothing_passes_on_give_every_layer_the_target() -> None:
    weights = {"a": torch.zeros(10, 10), "b": torch.zeros(10, 20)}
    inputs = {"a": torch.ones(2, 10), "b": torch.ones(2, 20)}
    assert adaptive_ranks(weights, inputs, least=0.1, target=0.8) == {"a": 8, "b": 8}


def test_the_importance_of_random_layers_lies_between_0_and_1() -> None:
    """cos(x, W^T W x) = |W x|^2 / (|x| |W^T W x|): with a layer of cosine 1 beside it the share shows it."""
    generator = torch.Generator().manual_seed(0)
    for shape in [(40, 60), (60, 40), (50, 50)]:
        w, x = torch.randn(shape, generator=generator), torch.randn(9, shape[1], generator=generator)
        back = x @ w.T @ w
        cosine = (x * back).sum(1) / x.norm(dim=1) / back.norm(dim=1)
        assert bool(((cosine > 0) & (cosine <= 1)).all())
        mean = (float(cosine.mean()) + 1) / 2
        found = adaptive_ranks(
            {"w": w, "e": torch.eye(50)}, {"w": x, "e": torch.eye(50)}, least=0.2, target=0.5
        )
        assert found["w"] == int((0.2 + 0.3 * float(cosine.mean()) / mean) * min(shape) + 1e-6)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (16, 16)])
def test_weight_directions_are_those_of_the_svd_on_both_sides(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    for rank in (0, 1, 7):
        right, left = weight_directions(weight, rank)
        assert (right.shape, left.shape) == ((rank, shape[1]), (rank, shape[0]))
        for i in range(rank):
            assert abs(float(right[i].double() @ vh[i])) > 1 - 1e-5
            assert abs(float(left[i].double() @ u[:, i])) > 1 - 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_differ_by_layer_and_bound_what_is_protected_on_both_sides(kind: str) -> None:
    done = two_tasks(kind, "adaptive_svd", {"source": "weights"}, num_steps=2)
    strategy = done.strategy
    assert isinstance(strategy, AdaptiveSVD)
    assert len(set(strategy.ranks.values())) > 1
    for name, moved in done.moved.items():
        assert 0.1 * min(moved.shape) <= strategy.ranks[name] <= 0.95 * min(moved.shape)
    sides = [strategy.protected.right, strategy.protected.left]
    assert [len(side) for side in sides] == [len(done.moved)] * 2
    shares = [len(basis) / basis.shape[1] for side in sides for basis in side.values()]
    assert done.metrics[1]["protected_share_max"] == max(shares)
    assert done.metrics[1]["protected_share_mean"] == pytest.approx(sum(shares) / len(shares))


@pytest.mark.parametrize("kind", ["lora", "lora_gpt2"])
def test_the_second_task_decomposes_the_weight_with_the_earlier_pairs(kind: str) -> None:
    model, session = make_model(kind), new_session()
    strategy = build_strategy("adaptive_svd", {"source": "weights"}, model)
    fit_task(model, strategy, tiny_stream()[0][1], task_id="t0", config=SHORT, memory=session)
    trained = weights_of(model)
    bases = {n: layer.module.get_base_layer() for n, layer in layers_of(model).items()}  # type: ignore[operator]
    strategy.prepare_model(model, "t1", session.next_task(op_id="run/t1"))
    for name, layer in layers_of(model).items():
        base = bases[name].weight.detach()
        wanted = (base.T if kind == "lora_gpt2" else base).double() + trained[name]
        torch.testing.assert_close(current_weight(layer).double(), wanted, rtol=0, atol=1e-6)
        assert float(trained[name].norm()) > 1e-3


def test_weights_that_are_not_floating_point_are_refused() -> None:
    model = tiny_llama()
    layer = next(iter(layers_of(model).values()))
    base: Any = layer.module.get_base_layer()  # type: ignore[operator]
    base.weight = nn.Parameter(base.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(StrategyError, match=r"floating-point weights, got torch\.int8; use 'activations'"):
        current_weight(layer)


# --------------------------------------------------------------------------------- source "activations"


def reference_inputs(model: nn.Module, names: list[str], row: Example) -> dict[str, Tensor]:
    """Return each layer's inputs at the tokens of one row, by running it alone."""
    modules, found = dict(model.named_modules()), {}
    handles = [
        modules[n].register_forward_pre_hook(
            lambda _, args, n=n: found.update({n: args[0][0].detach().clone()})
        )
        for n in names
    ]
    with torch.no_grad():
        model(input_ids=row["input_ids"].unsqueeze(0))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("batch_rows", [1, 3, 8])
def test_sampled_inputs_are_those_of_evenly_spaced_tokens_without_padding_and_dropout(
    batch_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svd_sources, "BATCH_ROWS", batch_rows)
    model = tiny_llama(with_b=True, dropout=0.5).train()
    rows: list[Example] = []
    for i, length in enumerate((3, 20, 9, 8)):
        ids = (torch.arange(length) * 7 + i) % 30
        rows.append({"input_ids": ids, "labels": ids.clone()})
    layers = layers_of(model)
    found = sample_inputs(model, layers, rows)
    assert model.training
    assert all(module.training for module in model.modules())
    assert set(found) == set(layers)
    model.eval()
    tokens = {
        3: [0, 0, 1, 1, 1, 1, 2, 2],
        20: [0, 3, 5, 8, 11, 14, 16, 19],
        9: [0, 1, 2, 3, 5, 6, 7, 8],
        8: list(range(8)),
    }
    for i, row in enumerate(rows):
        wanted = reference_inputs(model, list(layers), row)
        for name, x_NI in found.items():
            chosen = wanted[name][tokens[len(row["input_ids"])]]
            torch.testing.assert_close(x_NI[8 * i : 8 * i + 8], chosen, rtol=0, atol=1e-5)


def test_a_layer_that_some_rows_do_not_reach_has_zeros_there() -> None:
    model = tiny_llama()
    layers = layers_of(model)
    name, layer = next(iter(layers.items()))
    spare = nn.Linear(5, 2)
    found = sample_inputs(
        model,
        {**layers, "spare": svd_sources.Layer(spare, "spare.weight", "spare.weight")},
        tiny_stream()[0][1][:2],
    )
    assert torch.equal(found["spare"], torch.zeros(16, 5))
    assert bool(found[name].any())
    assert layer.module is not spare


def test_inputs_without_rows_and_tokens_are_refused() -> None:
    """Experts of a mixture see tokens without their rows."""
    model = tiny_llama()
    layers = layers_of(model)
    name, layer = next(iter(layers.items()))
    handle = layer.module.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1),))
    with pytest.raises(StrategyError, match=r"sees inputs of shape \(10, 32\), not \(rows, tokens, in\)"):
        sample_inputs(model, {name: layer}, tiny_stream()[0][1][:2])
    handle.remove()


def test_the_basis_keeps_the_energy_of_the_sampled_inputs_and_grows_by_svd_rank_at_most() -> None:
    for params in ({"importance_threshold": 0.05}, {"importance_threshold": 0.0, "svd_rank": 3}):
        model, session = make_model("lora"), new_session()
        strategy = build_strategy("adaptive_svd", params, model)
        sizes = []
        for i, (_, dataset) in enumerate(tiny_stream()):
            fit_task(model, strategy, dataset, task_id=f"t{i}", config=SHORT, memory=session)
            state = session.read("adaptive_svd")
            session = session.next_task(op_id=f"run/t{i + 1}")
            assert state["outputs"] == {}
            sizes.append({name: len(q) for name, q in state["inputs"].items()})
            inputs = sample_inputs(model, layers_of(model), dataset)
            for name, x in inputs.items():
                share = share_inside(x, state["inputs"][name]) ** 2
                assert share > 0.95 if "svd_rank" not in params else share < 1
        if "svd_rank" in params:
            assert set(sizes[0].values()) == {3}
            assert set(sizes[1].values()) == {6}
        else:
            assert all(sizes[1][name] >= size > 0 for name, size in sizes[0].items())


def test_rows_are_sampled_by_seed_and_task_and_not_more_than_asked() -> None:
    model = tiny_llama()
    seen = []
    dataset = tiny_stream()[0][1]
    for seed, task in [(0, "t0"), (0, "t0"), (1, "t0"), (0, "t1")]:
        strategy = AdaptiveSVD(model, source="activations", sample_rows=4)
        strategy.memory = MemorySession(strategy.memory.store, version=0, op_id="x", seed=seed)
        rows = strategy._rows(task, dataset)
        seen.append([row["ref"] for row in rows])
        assert len(set(seen[-1])) == 4
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]
    assert seen[0] != seen[3]
    assert len(AdaptiveSVD(model, sample_rows=100)._rows("t0", dataset)) == len(dataset)
