"""Models, rows and slow references for the tests of evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

from clcore.engine.tasks import prompt_and_completion
from tests.clcore.tiny import WORDS, fill_b, tiny_gpt2_base, tiny_llama, with_lora

Row = dict[str, str]
MAX_LENGTH = 48


def loud_llama(seed: int = 0) -> nn.Module:
    """Return a tiny Llama whose answers differ from row to row and end now and then."""
    return _louder(tiny_llama(seed, with_b=True))


def ending_llama() -> nn.Module:
    """Return a tiny Llama that often says the end token: wherever it would else say 6."""
    model: Any = loud_llama()
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight[1] = 1.1 * weight[WORDS.index("6")]
    return model  # type: ignore[no-any-return]


def loud_gpt2() -> nn.Module:
    """Return a tiny GPT-2, whose position embeddings are absolute."""
    return _louder(fill_b(with_lora(tiny_gpt2_base(), ["c_attn", "c_fc"])))


def loud_mistral(window: int = 6) -> nn.Module:
    """Return a tiny model whose layers see the last few tokens only."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        sliding_window=window,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return _louder(fill_b(with_lora(MistralForCausalLM(config), ["q_proj", "v_proj"])))


MODELS = {"llama": loud_llama, "gpt2": loud_gpt2, "mistral": loud_mistral}


def _louder(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter.dim() == 2:
                parameter.mul_(8)
    return model


def mixed_rows(num_rows: int = 12, begin: str = "a b c d : ") -> list[tuple[int, Row]]:
    """Return rows with prompts of many lengths, numbered backwards; all begin the same."""
    rows = []
    for i in range(num_rows):
        middle = " ".join(chr(97 + (i * k) % 26) for k in range(1 + (i * 5) % 9))
        rows.append((100 - i, {"prompt": f"{begin}{middle} ?", "completion": chr(97 + i % 4) * (1 + i % 3)}))
    return rows


def generate(model: nn.Module, tokenizer: Any, rows: Sequence[tuple[int, Row]], limit: int) -> list[str]:
    """Answer one row at a time by model.generate."""
    ids = generate_ids(model, tokenizer, rows, limit)
    return [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in ids]


@torch.no_grad()
def generate_ids(
    model: nn.Module, tokenizer: Any, rows: Sequence[tuple[int, Row]], limit: int
) -> list[list[int]]:
    """Return the tokens of answers, with the end token where there is one."""
    model.eval()
    answers = []
    for _, row in rows:
        prompt, _ = prompt_and_completion(row, tokenizer, MAX_LENGTH)
        ids = torch.tensor([prompt])
        out = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=limit,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=1,
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@torch.no_grad()
def nll_of(model: nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> float:
    """Add up -log p of a completion's tokens, one pass over one row, one token after the other."""
    model.eval()
    logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0].double()
    total = 0.0
    for i, token in enumerate(completion):
        scores = logits[len(prompt) + i - 1]
        total += math.log(float(torch.exp(scores - scores.max()).sum())) + float(scores.max() - scores[token])
    return total


def count_passes(model: nn.Module) -> list[int]:
    """Return a list that grows by the number of rows with every pass through the model."""
    passes: list[int] = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return passes
