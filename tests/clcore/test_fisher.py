"""The one-pass Fisher against a loop over single rows."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clcore.engine.errors import FisherError
from clcore.engine.fisher import layer_moments, squared_gradients
from clcore.engine.loss import completion_nll, sample_targets
from clcore.engine.params import Params
from clcore.engine.tasks import IGNORE, Example, collate
from tests.clcore.tiny import WORDS, tiny_dataset, tiny_gpt2, tiny_llama


def row_by_row(model: nn.Module, examples: list[Example]) -> dict[str, Tensor]:
    """Brute force: one backward pass per row, squared before summing."""
    was_training = model.training
    model.eval()
    params = Params.of(model)
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    for example in examples:
        nll, _ = completion_nll(model, collate([example], 0))
        for name, g in zip(params, torch.autograd.grad(nll.sum(), list(params.values())), strict=True):
            total[name] += g.square()
    model.train(was_training)
    return total


def in_batches(examples: list[Example], size: int) -> list[dict[str, Tensor]]:
    return [collate(examples[i : i + size], 0) for i in range(0, len(examples), size)]


def assert_same(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    assert set(ours) == set(reference)
    for name, value in reference.items():
        assert float(value.max()) > 0, name
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5 * float(value.max()))


class Toy(nn.Module):
    """A language model with one Linear used twice, a bias, and a block that may be checkpointed."""

    def __init__(self, reentrant: bool | None = None, vocab: int = len(WORDS)) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(vocab, 8).requires_grad_(False)
        self.shared, self.head = nn.Linear(8, 8), nn.Linear(8, vocab).requires_grad_(False)
        self.reentrant = reentrant

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def block(self, h: Tensor) -> Tensor:
        return torch.tanh(self.shared(torch.tanh(self.shared(h))))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Any:  # noqa: ARG002
        h = self.embed(input_ids)
        if self.reentrant is not None:
            h = checkpoint(self.block, h, use_reentrant=self.reentrant)
        else:
            h = self.block(h)
        return SimpleNamespace(logits=self.head(h))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "lora_on_llama": lambda: tiny_llama(with_b=True),
    "lora_on_llama_with_biases": lambda: tiny_llama(with_b=True, bias="all"),
    "lora_on_gpt2": tiny_gpt2,
    "lora_on_gpt2_with_conv1d_biases": lambda: tiny_gpt2(bias="lora_only"),
    "module_used_twice": Toy,
}


@pytest.mark.parametrize("name", MODELS)
def test_one_pass_with_padding_equals_a_loop_over_single_rows(name: str) -> None:
    model, examples = MODELS[name](), tiny_dataset("t0", 9)
    ours, num_rows = squared_gradients(model, Params.of(model), in_batches(examples, 4))
    assert num_rows == 9
    assert_same(ours, row_by_row(model, examples))


def test_trainable_conv1d_weights_equal_a_loop_over_single_rows() -> None:
    model, examples = tiny_gpt2(), tiny_dataset("t0", 5)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "c_proj" in name
    ours, _ = squared_gradients(model, Params.of(model), in_batches(examples, 3))
    assert_same(ours, row_by_row(model, examples))


def test_a_row_is_squared_after_its_tokens_are_summed_and_before_rows_are() -> None:
    model, examples = tiny_llama(with_b=True).eval(), tiny_dataset("t0", 6)
    ours, _ = squared_gradients(model, Params.of(model), in_batches(examples, 6))
    nll, _ = completion_nll(model, collate(examples, 0))
    params = Params.of(model)
    batched = torch.autograd.grad(nll.sum(), list(params.values()))
    name = next(iter(params))
    assert not torch.allclose(ours[name], batched[0].square(), rtol=0.1)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_sum_does_not_depend_on_the_batch_size(size: int) -> None:
    model, examples = tiny_llama(with_b=True), tiny_dataset("t0", 7)
    reference, _ = squared_gradients(model, Params.of(model), in_batches(examples, 3))
    ours, _ = squared_gradients(model, Params.of(model), in_batches(examples, size))
    assert_same(ours, reference)


def test_gradients_modes_and_hooks_are_left_as_they_were() -> None:
    model, examples = tiny_llama(with_b=True, dropout=0.5), tiny_dataset("t0", 4)
    params = Params.of(model)
    for i, parameter in enumerate(params.values()):
        parameter.grad = torch.full_like(parameter, 7.0) if i % 2 else None
    model.train()
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    first, _ = squared_gradients(model, params, in_batches(examples, 4))
    second, _ = squared_gradients(model, params, in_batches(examples, 4))
    assert [module.training for module in model.modules()] == modes
    assert {type(p.grad) for p in params.values()} == {type(None), Tensor}
    assert all(bool((p.grad == 7).all()) for p in params.values() if p.grad is not None)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(first[name], second[name]) for name in first)  # no dropout


def test_it_works_under_no_grad() -> None:
    model, examples = tiny_llama(with_b=True), tiny_dataset("t0", 3)
    with torch.no_grad():
        ours, _ = squared_gradients(model, Params.of(model), in_batches(examples, 3))
    assert_same(ours, row_by_row(model, examples))


def test_checkpointed_blocks_are_counted_once() -> None:
    examples = tiny_dataset("t0", 5)
    plain, kept = Toy(), Toy(reentrant=False)
    reference, _ = squared_gradients(plain, Params.of(plain), in_batches(examples, 5))
    ours, _ = squared_gradients(kept, Params.of(kept), in_batches(examples, 5))
    assert_same(ours, reference)


def test_gradient_checkpointing_of_the_model_changes_nothing() -> None:
    examples = tiny_dataset("t0", 5)
    plain, kept = tiny_llama(with_b=True), tiny_llama(with_b=True)
    kept.gradient_checkpointing_enable()
    kept.enable_input_require_grads()
    kept.train()
    reference, _ = squared_gradients(plain, Params.of(plain), in_batches(examples, 5))
    ours, _ = squared_gradients(kept, Params.of(kept), in_batches(examples, 5))
    assert_same(ours, reference)


def test_an_untrained_adapter_is_refused_and_one_trained_module_is_enough() -> None:
    model, batches = tiny_llama(), in_batches(tiny_dataset("t0", 2), 2)
    with pytest.raises(FisherError, match="every LoRA B is 0"):
        squared_gradients(model, Params.of(model), batches)
    last = next(p for name, p in reversed(list(model.named_parameters())) if "lora_B" in name)
    nn.init.normal_(last)
    squared_gradients(model, Params.of(model), batches)


def test_a_trainable_parameter_outside_linear_and_conv1d_is_named() -> None:
    model = tiny_llama(with_b=True)
    next(p for n, p in model.named_parameters() if n.endswith("norm.weight")).requires_grad = True
    with pytest.raises(FisherError, match=r"norm\.weight' is in neither"):
        squared_gradients(model, Params.of(model), in_batches(tiny_dataset("t0", 2), 2))


def test_a_trainable_output_head_is_refused_because_it_sees_all_rows_as_one() -> None:
    model = tiny_llama(with_b=True, targets=["q_proj", "lm_head"])
    with pytest.raises(FisherError, match=r"lm_head.* belongs to the output head"):
        squared_gradients(model, Params.of(model), in_batches(tiny_dataset("t0", 2), 2))


def test_a_module_that_mixes_rows_and_tokens_is_refused() -> None:
    model = Toy()
    model.block = lambda h: model.shared(h.flatten(0, 1)).view_as(h)  # type: ignore[method-assign]
    with pytest.raises(FisherError, match=r"'shared.weight' got \(\d+, 8\)"):
        squared_gradients(model, Params.of(model), in_batches(tiny_dataset("t0", 2), 2))


def seeded(batch: dict[str, Tensor], first: int) -> dict[str, Tensor]:
    return {**batch, "row_seeds": torch.arange(first, first + len(batch["labels"]))}


def drawn_by_hand(model: nn.Module, example: Example, seed: int) -> Example:
    """Replace labels by the first token whose cumulated probability exceeds a uniform number."""
    ids, labels = example["input_ids"], example["labels"].clone()
    logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0].detach()
    positions = [t for t in range(1, len(ids)) if labels[t] != IGNORE]
    uniform = torch.rand(len(positions), generator=torch.Generator().manual_seed(seed)).tolist()
    for position, height in zip(positions, uniform, strict=True):
        cumulated = accumulate(logits[position - 1].double().softmax(-1).tolist())
        labels[position] = next(token for token, total in enumerate(cumulated) if total > height)
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("name", ["lora_on_llama", "module_used_twice"])
def test_the_sampled_fisher_equals_a_loop_over_rows_with_the_same_sampled_targets(name: str) -> None:
    model, examples = MODELS[name]().eval(), tiny_dataset("t0", 9)
    batches = [seeded(batch, 4 * i) for i, batch in enumerate(in_batches(examples, 4))]
    ours, num_rows = squared_gradients(model, Params.of(model), batches)
    drawn = [drawn_by_hand(model, example, seed) for seed, example in enumerate(examples)]
    assert num_rows == 9
    assert any(not torch.equal(a["labels"], b["labels"]) for a, b in zip(drawn, examples, strict=True))
    assert_same(ours, row_by_row(model, drawn))


def test_the_mean_of_sampled_fishers_is_the_fisher_of_all_answers_weighted_by_the_model() -> None:
    vocab, draws = 4, 4000
    model = Toy(vocab=vocab).eval()
    with torch.no_grad():
        model.head.weight.mul_(6)  # far from uniform
    params = Params.of(model)
    ids = torch.tensor([[1, 2, 3, 0]])
    row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    log_p = model(**row).logits[0].log_softmax(-1)
    # Labels at positions 2 and 3, so 16 answers; second and fourth moments of their gradients.
    exact, fourth = ({n: torch.zeros_like(p) for n, p in params.items()} for _ in range(2))
    for first in range(vocab):
        for second in range(vocab):
            answer = log_p[1, first] + log_p[2, second]
            gradients = torch.autograd.grad(answer, list(params.values()), retain_graph=True)
            for name, g in zip(params, gradients, strict=True):
                exact[name] += float(answer.detach().exp()) * g.square()
                fourth[name] += float(answer.detach().exp()) * g**4
    batch = {key: value.repeat(500, 1) for key, value in row.items()}
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :2] = IGNORE
    ours, num_rows = squared_gradients(model, params, [seeded(batch, i) for i in range(0, draws, 500)])
    assert num_rows == draws
    for name, value in exact.items():
        error = ((fourth[name] - value.square()).clamp(min=0) / draws).sqrt()  # of the mean of the draws
        assert bool(((ours[name] / draws - value).abs() <= 4.5 * error + 1e-7).all()), name
        assert float(ours[name].sum() / draws) == pytest.approx(float(value.sum()), rel=0.08)


def test_a_token_of_probability_0_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, row, seeds = torch.tensor([[-torch.inf, 0.0, 0.0]]), torch.tensor([0]), torch.tensor([5])
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.zeros(shape))  # noqa: ARG005
    assert sample_targets(logits, row, seeds).tolist() == [1]


def moments_by_hand(model: nn.Module, layers: dict[str, nn.Module], examples: list[Example]) -> Any:
    """Row by row without padding, token by token: g from a zero that is added to the layer's output."""
    model.eval()
    totals: dict[str, tuple[Tensor, Tensor, int]] = {}
    for example in examples:
        seen: list[tuple[str, Tensor, Tensor]] = []

        def probe(name: str, seen: list[tuple[str, Tensor, Tensor]] = seen) -> Callable[..., Tensor]:
            def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                zero = torch.zeros_like(output, requires_grad=True)
                seen.append((name, args[0].detach(), zero))
                return output + zero

            return hook

        handles = [layer.register_forward_hook(probe(name)) for name, layer in layers.items()]
        nll, _ = completion_nll(model, collate([example], 0))
        for (name, x, _), g in zip(seen, torch.autograd.grad(nll.sum(), [z for *_, z in seen]), strict=True):
            a, b, count = totals.get(name, (torch.zeros(g.shape[-1]), torch.zeros(x.shape[-1]), 0))
            for t in range(len(example["input_ids"])):
                a, b = a + g[0, t] ** 2, b + x[0, t] ** 2
            totals[name] = (a, b, count + len(example["input_ids"]))
        for handle in handles:
            handle.remove()
    return totals


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize("name", ["lora_on_llama", "lora_on_gpt2", "module_used_twice"])
@pytest.mark.parametrize("size", [1, 4])
def test_moments_of_layers_equal_a_loop_over_rows_and_tokens_without_padding(name: str, size: int) -> None:
    model, examples = MODELS[name](), tiny_dataset("t0", 9)
    layers = {"shared": model.shared} if isinstance(model, Toy) else lora_layers(model)
    ours, num_rows = layer_moments(model, Params.of(model), layers, in_batches(examples, size))
    reference = moments_by_hand(model, layers, examples)
    assert num_rows == 9
    assert set(ours) == set(reference)
    for layer, (a, b, count) in reference.items():
        torch.testing.assert_close(ours[layer].gradient_O, a, rtol=1e-5, atol=1e-5 * float(a.max()))
        torch.testing.assert_close(ours[layer].input_I, b, rtol=1e-5, atol=1e-5 * float(b.max()))
        assert int(ours[layer].num_tokens) == count


def test_moments_of_a_checkpointed_block_are_counted_once() -> None:
    examples, found = tiny_dataset("t0", 5), []
    for model in (Toy(), Toy(reentrant=False)):
        moments, _ = layer_moments(model, Params.of(model), {"s": model.shared}, in_batches(examples, 5))
        found.append(moments["s"])
    torch.testing.assert_close(found[0].gradient_O, found[1].gradient_O)
    torch.testing.assert_close(found[0].input_I, found[1].input_I)
    assert found[0].num_tokens == found[1].num_tokens


def test_moments_leave_gradients_modes_and_hooks_as_they_were() -> None:
    model, examples = tiny_llama(with_b=True, dropout=0.5).train(), tiny_dataset("t0", 4)
    layers, params = lora_layers(model), Params.of(model)
    first, second = (layer_moments(model, params, layers, in_batches(examples, 4))[0] for _ in range(2))
    assert all(torch.equal(first[n].gradient_O, second[n].gradient_O) for n in layers)  # no dropout
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in params.values())
    assert not any(module._forward_hooks for module in model.modules())


def test_moments_of_the_output_head_are_refused() -> None:
    model = tiny_llama(with_b=True, targets=["q_proj", "lm_head"])
    with pytest.raises(FisherError, match=r"'base_model.model.lm_head' got \(1, "):
        layer_moments(model, Params.of(model), lora_layers(model), in_batches(tiny_dataset("t0", 2), 2))
