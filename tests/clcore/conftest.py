"""A tiny model, a tiny tokenizer and small data sets, made in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clcore.engine.tasks import Example, encode_row

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", *map(str, range(10)), ":", "?", "."]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character that is not a space."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture
def make_model() -> Callable[..., nn.Module]:
    """Return a factory of equal tiny LoRA models: make_model(seed=0, r=4, with_b=False)."""

    def make(seed: int = 0, r: int = 4, *, with_b: bool = False) -> nn.Module:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
        lora = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(LlamaForCausalLM(config), lora)
        if with_b:
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.1)
        return model

    return make


@pytest.fixture
def make_dataset(tokenizer: PreTrainedTokenizerFast) -> Callable[..., list[Example]]:
    """Return a factory of tasks: make_dataset("t0", num_rows=16, shift=1); a letter's answer is shifted by shift."""

    def make(name: str, num_rows: int = 16, shift: int = 1) -> list[Example]:
        rows = []
        for i in range(num_rows):
            letter, other = chr(97 + i % 26), chr(97 + (i * 7) % 26)
            answer = chr(97 + (i + shift) % 26) * (1 + i % 3)
            rows.append({"prompt": f"{other} {letter} {i % 10} : ", "completion": answer})
        return [encode_row(row, tokenizer, 64, f"{name}:{i}") for i, row in enumerate(rows)]

    return make
