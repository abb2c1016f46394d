"""Pairs are exchanged, frozen and joined without a change of what the model computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from clcore.engine.adapters import (
    EARLIER,
    TRAINED,
    assign_trained,
    check_pairs,
    folded_pairs,
    freeze_pairs,
    has_frozen_pairs,
    join_pairs,
    lora_layers,
    parameter_names,
    read_pair,
    set_pairs,
)
from clcore.engine.errors import StrategyError
from clcore.engine.params import Params
from clcore.engine.tasks import collate
from tests.clcore.tiny import (
    assert_close,
    differ,
    fill_b,
    tiny_dataset,
    tiny_gpt2_base,
    tiny_llama,
    tiny_llama_base,
    trainable,
    with_lora,
)

BASES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (tiny_llama_base, ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (tiny_gpt2_base, ["c_attn", "c_fc", "c_proj"]),
}


def lora_model(base: str, **options: Any) -> nn.Module:
    """Return a tiny model with rank 4, scaling 2.5 and B other than 0."""
    build, targets = BASES[base]
    values = {
        "r": 4,
        "lora_alpha": 10,
        "target_modules": targets,
        "fan_in_fan_out": base == "gpt2",
        **options,
    }
    return fill_b(get_peft_model(build(), LoraConfig(task_type="CAUSAL_LM", **values)))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    batch = collate(tiny_dataset("t0", 4), 0)
    found: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return found


def fresh(model: nn.Module, rank: int, *, zero: bool) -> None:
    """Give every layer a random pair, with B = 0 if told."""
    torch.manual_seed(7)
    pairs = {}
    for name, layer in lora_layers(model).items():
        a, b = read_pair(layer)
        b_new = torch.zeros(b.shape[0], rank) if zero else torch.randn(b.shape[0], rank) / 10
        pairs[name] = (torch.randn(rank, a.shape[1]) / 10, b_new)
    set_pairs(model, pairs)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_freezing_adding_a_pair_and_joining_keep_the_models_outputs(
    base: str, use_rslora: bool, tmp_path: Path
) -> None:
    model = lora_model(base, use_rslora=use_rslora).eval()
    start = logits(model)
    freeze_pairs(model)
    fresh(model, 3, zero=True)
    torch.testing.assert_close(logits(model), start, rtol=0, atol=1e-6)

    fresh(model, 3, zero=False)
    with_both = logits(model)
    assert (with_both - start).abs().max() > 1e-3
    earlier = {
        name: [x.clone() for x in read_pair(layer, EARLIER)] for name, layer in lora_layers(model).items()
    }
    join_pairs(model)
    torch.testing.assert_close(logits(model), with_both, rtol=0, atol=1e-6)
    for name, layer in lora_layers(model).items():
        a, b = read_pair(layer)
        assert (a.shape[0], b.shape[1], layer.r[TRAINED]) == (7, 7, 7)
        assert layer.scaling[TRAINED] == (5.0 if use_rslora else 2.5)  # 10 / sqrt(4), 10 / 4
        assert torch.equal(a[:4], earlier[name][0])
        assert torch.equal(b[:, :4], earlier[name][1])

    # What was saved loads in plain PEFT, on a fresh base, and computes the same.
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BASES[base][0](), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), with_both, rtol=0, atol=1e-6)
    config = loaded.peft_config["default"]
    assert (config.r, list(loaded.peft_config)) == (7, ["default"])
    assert config.lora_alpha == pytest.approx(5 * 7**0.5 if use_rslora else 17.5)


@pytest.mark.parametrize("base", BASES)
def test_folded_pairs_compute_the_same_and_leave_the_base_bit_for_bit(base: str) -> None:
    model = lora_model(base).eval()
    weights = {name: p for name, p in model.named_parameters() if "base_layer" in name}
    held = {name: p.detach().clone() for name, p in weights.items()}
    freeze_pairs(model)
    fresh(model, 3, zero=False)
    stacked, params = logits(model), dict(Params.of(model))
    earlier_calls: list[Any] = []
    for layer in lora_layers(model).values():
        layer.lora_A[EARLIER].register_forward_hook(lambda *args: earlier_calls.append(args))
    with folded_pairs(model):
        torch.testing.assert_close(logits(model), stacked, rtol=0, atol=1e-5)
        assert not earlier_calls  # nothing is left to compute for them
        assert all(a is b for a, b in zip(Params.of(model).values(), params.values(), strict=True))
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(params)
    now = dict(model.named_parameters())
    assert all(now[name] is p and torch.equal(p, held[name]) for name, p in weights.items())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(params)
    assert torch.equal(logits(model), stacked)
    assert earlier_calls


def test_an_error_while_folding_puts_the_weights_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_model("llama")
    freeze_pairs(model)
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    reads = iter(range(100))

    def failing(*args: Any) -> Any:
        if next(reads) == 2:  # two layers are folded already
            raise torch.OutOfMemoryError
        return read_pair(*args)

    monkeypatch.setattr("clcore.engine.adapters.read_pair", failing)
    with pytest.raises(torch.OutOfMemoryError), folded_pairs(model):
        pass
    assert all(
        before[name][0] is p and torch.equal(p, before[name][1]) for name, p in model.named_parameters()
    )


@pytest.mark.parametrize("kind", ["bfloat16 base", "no frozen pairs", "no adapter"])
def test_nothing_is_folded_where_it_would_lose_or_has_nothing_to_fold(kind: str) -> None:
    model = lora_model("llama") if kind != "no adapter" else tiny_llama_base()
    if kind == "bfloat16 base":
        for layer in lora_layers(model).values():
            layer.get_base_layer().to(torch.bfloat16)
        freeze_pairs(model)
    before = dict(model.named_parameters())
    with folded_pairs(model):
        assert all(before[name] is p for name, p in model.named_parameters())
    if kind == "bfloat16 base":
        assert all(set(layer.active_adapters) == {EARLIER, TRAINED} for layer in lora_layers(model).values())


def test_alpha_stays_a_whole_number_where_it_is_one() -> None:
    model = lora_model("llama", lora_alpha=8)
    fresh(model, 6, zero=True)
    alpha = model.peft_config["default"].lora_alpha
    assert (alpha, type(alpha)) == (12, int)


def test_frozen_pairs_are_not_trained_and_not_among_the_parameters() -> None:
    model = lora_model("llama")
    names = set(Params.of(model))
    freeze_pairs(model)
    fresh(model, 2, zero=True)
    assert (
        set(Params.of(model)) == names == {n for layer in lora_layers(model) for n in parameter_names(layer)}
    )
    held = {name: p.detach().clone() for name, p in model.named_parameters() if f".{EARLIER}." in name}
    assert held
    assert not any(p.requires_grad for name, p in model.named_parameters() if name in held)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    start = trainable(model)
    batch = collate(tiny_dataset("t0", 4), 0)
    model(**batch).loss.backward()
    optimizer.step()
    assert_close({n: p.detach() for n, p in model.named_parameters() if n in held}, held)
    assert differ(trainable(model), start)
    join_pairs(model)
    assert set(Params.of(model)) == names
    assert not has_frozen_pairs(model)
    assert model.active_adapters == ["default"]


def test_dropout_falls_on_the_trained_pair_only() -> None:
    model = lora_model("llama", lora_dropout=0.5).train()
    freeze_pairs(model)
    fresh(model, 2, zero=True)
    model.train()
    torch.manual_seed(0)
    first = logits(model)
    torch.manual_seed(1)
    assert torch.equal(logits(model), first)  # the trained pair is 0: dropout on the frozen one would show
    fresh(model, 2, zero=False)
    model.train()
    torch.manual_seed(0)
    first = logits(model)
    torch.manual_seed(1)
    assert not torch.equal(logits(model), first)


def test_freezing_pairs_that_started_from_the_base_leaves_the_base_alone() -> None:
    model = lora_model("llama", init_lora_weights="pissa").eval()
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}
    start = logits(model)
    freeze_pairs(model)
    fresh(model, 2, zero=True)
    assert_close({n: p.detach() for n, p in model.named_parameters() if n in base}, base)
    torch.testing.assert_close(logits(model), start, rtol=0, atol=1e-6)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "use_dora=True is not supported"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern={'q_proj': 2} is not supported"),
    ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern={'q_proj': 2} is not supported"),
    ({"lora_bias": True, "target_modules": ["c_attn"]}, "lora_bias=True is not supported"),
    ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*'lm_head'.* is not supported"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens' has no LoRA pair 'default' of Linear"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[next(iter(o)) for o, _ in REFUSED])
@pytest.mark.parametrize("verb", [check_pairs, freeze_pairs])
def test_what_is_no_plain_pair_is_refused_by_name(
    verb: Callable[[nn.Module], None], options: dict[str, Any], message: str
) -> None:
    model = lora_model("gpt2" if options.get("target_modules") == ["c_attn"] else "llama", **options)
    with pytest.raises(StrategyError, match=message):
        verb(model)


def test_dora_is_named_by_its_layer_too() -> None:
    with pytest.raises(StrategyError, match=r"q_proj' has no plain LoRA pair but the variant Dora"):
        lora_layers(lora_model("llama", use_dora=True))


def test_models_without_a_lora_adapter_named_default_are_refused() -> None:
    with pytest.raises(StrategyError, match="a PEFT model is needed, got LlamaForCausalLM"):
        check_pairs(tiny_llama_base())
    ia3 = get_peft_model(
        tiny_llama_base(), IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    )
    with pytest.raises(StrategyError, match=r"named 'default' is needed, got \{'default': 'IA3'\}"):
        check_pairs(ia3)
    with pytest.raises(StrategyError, match="no layer of PeftModelForCausalLM has a LoRA pair"):
        lora_layers(ia3)
    other = get_peft_model(tiny_llama_base(), LoraConfig(target_modules=["q_proj"]), adapter_name="mine")
    with pytest.raises(StrategyError, match=r"got \{'mine': 'LORA'\}"):
        check_pairs(other)


def test_pairs_that_do_not_fit_are_refused() -> None:
    model = lora_model("llama")
    pairs = {name: read_pair(layer) for name, layer in lora_layers(model).items()}
    name = next(iter(pairs))
    a, b = pairs[name]
    for a_bad, b_bad in [(a[:2], b), (a[:, :5], b), (a, b[:5])]:
        with pytest.raises(StrategyError, match="does not fit layer"):
            set_pairs(model, {**pairs, name: (a_bad, b_bad)})
    with pytest.raises(StrategyError, match=r"all layers need one rank and one scaling, got \[2, 4\]"):
        set_pairs(model, {**pairs, name: (a[:2], b[:, :2])})
    with pytest.raises(KeyError, match="q_proj"):
        set_pairs(model, {key: pair for key, pair in pairs.items() if key != name})
    lora_layers(model)[name].scaling[TRAINED] = 9.0
    with pytest.raises(StrategyError, match=r"one scaling, got \[4\] and \[2.5, 9.0\]"):
        set_pairs(model, pairs)


def test_stored_values_of_another_rank_are_assigned() -> None:
    model, stored = lora_model("llama").eval(), lora_model("llama").eval()
    freeze_pairs(stored)
    fresh(stored, 3, zero=False)
    join_pairs(stored)
    assign_trained(model, trainable(stored))
    assert torch.equal(logits(model), logits(stored))
    assert model.peft_config["default"].r == 7
    values = trainable(stored)
    values.popitem()
    with pytest.raises(KeyError, match="lora_B"):
        assign_trained(model, values)


def test_values_of_the_same_shapes_are_assigned_to_any_adapter() -> None:
    """Biases and DoRA are no obstacle where no pair changes its rank; the parameters stay the objects."""
    for options in ({"bias": "lora_only"}, {"use_dora": True}):
        model = lora_model("gpt2", **options)
        stored = {name: torch.full_like(p, 0.5) for name, p in trainable(model).items()}
        objects = list(map(id, Params.of(model).values()))
        assign_trained(model, stored)
        assert_close(trainable(model), stored)
        assert list(map(id, Params.of(model).values())) == objects


def test_a_new_pair_is_a_copy_of_the_layers_type_and_need_for_gradients() -> None:
    model = with_lora(tiny_llama_base(), ["q_proj"]).to(torch.bfloat16)
    pairs = {n: (torch.ones(2, 32), torch.ones(32, 2)) for n in lora_layers(model)}
    set_pairs(model, pairs)
    for name, layer in lora_layers(model).items():
        parameter = layer.lora_A[TRAINED].weight
        assert (parameter.dtype, parameter.requires_grad) == (torch.bfloat16, True)
        with torch.no_grad():
            parameter.zero_()
        assert pairs[name][0].sum() == 64
    freeze_pairs(model)
    join_pairs(model)  # PEFT may hold the frozen pair in float32
    assert {p.dtype for p in Params.of(model).values()} == {torch.bfloat16}


def test_a_new_pair_shares_no_memory_with_its_source_and_stays_frozen_if_the_old_one_was() -> None:
    model = with_lora(tiny_llama_base(), ["q_proj"]).requires_grad_(False)
    pairs = {n: (torch.ones(2, 32), torch.ones(32, 2)) for n in lora_layers(model)}
    set_pairs(model, pairs)
    assert len(Params.of(model)) == 0
    for name, layer in lora_layers(model).items():
        layer.lora_A[TRAINED].weight.zero_()
        assert pairs[name][0].sum() == 64


def test_a_pair_of_the_first_adapter_is_read_without_a_copy() -> None:
    model = tiny_llama()
    layer = next(iter(lora_layers(model).values()))
    a, _ = read_pair(layer)
    assert a.data_ptr() == layer.lora_A[TRAINED].weight.data_ptr()
    assert not a.requires_grad
