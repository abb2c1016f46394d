"""The one-pass Fisher against a loop over single rows."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clcore.engine.errors import FisherError
from clcore.engine.fisher import squared_gradients
from clcore.engine.loss import completion_nll
from clcore.engine.params import Params
from clcore.engine.tasks import Example, collate
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

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(len(WORDS), 8).requires_grad_(False)
        self.shared, self.head = nn.Linear(8, 8), nn.Linear(8, len(WORDS)).requires_grad_(False)
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
