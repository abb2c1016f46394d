"""Snapshots hold adapters only; a visit to one leaves no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

from clcore.engine.adapters import lora_layers as layers_of
from clcore.engine.adapters import read_pair, set_pairs
from clcore.engine.errors import StateError
from clcore.engine.params import Params
from clcore.evaluation.snapshots import restore, take_snapshot
from tests.clcore.tiny import assert_close, fill_b, tiny_llama, tiny_llama_base, trainable


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(3, 9).unsqueeze(0)).logits
    return found


def everything(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_snapshot_holds_the_adapter_on_the_cpu_and_no_base_weight_and_nothing_is_deep_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_llama(with_b=True)

    def refuse(*_: Any) -> None:
        raise AssertionError("deepcopy was called")

    monkeypatch.setattr(copy, "deepcopy", refuse)
    snapshot = take_snapshot(model)
    with restore(model, snapshot):
        pass
    adapter = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert set(snapshot) == set(adapter)
    assert 0 < len(adapter) < len(list(model.parameters()))
    # No view of something larger, and nothing shared with the model.
    held = sum(value.untyped_storage().nbytes() for value in snapshot.values())
    assert held == sum(p.numel() * p.element_size() for p in adapter.values())
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not owned & {value.untyped_storage().data_ptr() for value in snapshot.values()}
    assert all(value.device.type == "cpu" and not value.requires_grad for value in snapshot.values())
    assert_close(snapshot, trainable(model))


def test_training_on_does_not_change_a_snapshot() -> None:
    model = tiny_llama(with_b=True)
    snapshot = take_snapshot(model)
    before = {name: value.clone() for name, value in snapshot.items()}
    with torch.no_grad():
        for p in Params.of(model).values():
            p.add_(1)
    assert_close(snapshot, before)


def test_of_a_plain_model_the_trainable_parameters_are_kept() -> None:
    model = tiny_llama_base()
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name)
    snapshot = take_snapshot(model)
    assert set(snapshot) == {name for name, _ in model.named_parameters() if "norm" in name}


def test_frozen_adapters_belong_to_a_snapshot_too() -> None:
    model: Any = tiny_llama(with_b=True)
    model.add_adapter("earlier", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("default")
    names = set(take_snapshot(model))
    assert any("lora_A.earlier" in name for name in names)
    assert any("lora_A.default" in name for name in names)


def test_adaloras_ranks_belong_to_a_snapshot_because_they_scale_the_output() -> None:
    model = get_peft_model(
        tiny_llama_base(),
        AdaLoraConfig(init_r=4, target_modules=["q_proj"], total_step=10, tinit=1, tfinal=1),
    )
    fill_b(model)
    snapshot = take_snapshot(model)
    expected = logits(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "ranknum" in name or "lora_E" in name:
                p.fill_(2.0)
    assert not torch.equal(logits(model), expected)
    with restore(model, snapshot):
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("fails", [False, True])
def test_a_visit_computes_with_the_snapshot_and_puts_every_bit_back_also_after_an_exception(
    fails: bool,
) -> None:
    model = tiny_llama(with_b=True)
    then, snapshot = logits(model), take_snapshot(model)
    with torch.no_grad():
        for p in Params.of(model).values():
            p.mul_(1.1).add_(1e-3)
    next(iter(Params.of(model).values())).data[0, 0] = float("nan")  # NaN comes back too
    parameters, before = dict(model.named_parameters()), everything(model)

    def visit() -> None:
        with restore(model, snapshot):
            assert torch.equal(logits(model), then)
            if fails:
                raise RuntimeError("inside")

    if fails:
        with pytest.raises(RuntimeError, match="inside"):
            visit()
    else:
        visit()
    after = everything(model)
    assert all(after[name].numpy().tobytes() == value.numpy().tobytes() for name, value in before.items())
    assert all(p is parameters[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_a_snapshot_of_another_rank_can_be_visited_and_the_pairs_of_now_come_back(fails: bool) -> None:
    model: Any = tiny_llama(r=4, with_b=True)
    then, snapshot = logits(model), take_snapshot(model)
    with torch.no_grad():
        wider = {}
        for name, layer in layers_of(model).items():
            a, b = read_pair(layer)
            wider[name] = (torch.cat([a, a + 1]), torch.cat([b, b + 1], dim=1))
        set_pairs(model, wider)
    now, parameters, before = logits(model), dict(model.named_parameters()), everything(model)
    try:
        with restore(model, snapshot):
            torch.testing.assert_close(logits(model), then, rtol=0, atol=0)
            assert model.peft_config["default"].r == 4
            if fails:
                raise RuntimeError("inside")
    except RuntimeError:
        assert fails
    assert torch.equal(logits(model), now)
    assert model.peft_config["default"].r == 8
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert_close(everything(model), before)


def test_a_snapshot_that_does_not_fit_is_refused_and_nothing_is_changed() -> None:
    model = tiny_llama(with_b=True)
    snapshot = take_snapshot(model)
    before = everything(model)
    name = next(iter(snapshot))
    for wrong, words in (
        ({n: v for n, v in snapshot.items() if n != name}, "the snapshot has no"),
        ({**snapshot, "other": torch.zeros(1)}, "the model has no 'other'"),
    ):
        with pytest.raises(StateError, match=words), restore(model, wrong):
            pass
    plain = tiny_llama_base()
    other = take_snapshot(plain)
    other["model.norm.weight"] = torch.zeros(3)
    with pytest.raises(StateError, match=r"'model.norm.weight' has shape \(3,\)"), restore(plain, other):
        pass
    assert_close(everything(model), before)
