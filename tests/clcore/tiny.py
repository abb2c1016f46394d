"""Tiny models, a tiny tokenizer and small tasks, made in memory; the same in every process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clcore.engine.loss import completion_nll
from clcore.engine.memory import InProcessMemory, MemorySession
from clcore.engine.tasks import Example, collate, encode_row

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", *map(str, range(10)), ":", "?", "."]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character that is not a space."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def with_lora(
    model: nn.Module, targets: Sequence[str] | str, r: int = 4, *, bias: str = "none", dropout: float = 0.0
) -> nn.Module:
    targets = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(
        r=r,
        lora_alpha=2 * r,
        target_modules=targets,
        lora_dropout=dropout,
        bias=bias,  # type: ignore[arg-type]
        fan_in_fan_out=isinstance(model, GPT2LMHeadModel),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)  # type: ignore[arg-type]


def tiny_llama(
    seed: int = 0,
    r: int = 4,
    *,
    with_b: bool = False,
    targets: Sequence[str] | str = ("q_proj", "v_proj"),
    bias: str = "none",
    dropout: float = 0.0,
) -> nn.Module:
    base = tiny_llama_base(seed, attention_bias=bias != "none")
    model = with_lora(base, targets, r, bias=bias, dropout=dropout)
    return fill_b(model) if with_b else model


def tiny_llama_base(seed: int = 0, *, attention_bias: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attention_bias=attention_bias,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def tiny_gpt2_base(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(WORDS), n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1
    )
    return GPT2LMHeadModel(config)


def tiny_gpt2(seed: int = 0, *, bias: str = "none") -> nn.Module:
    return fill_b(with_lora(tiny_gpt2_base(seed), ["c_attn", "c_fc"], bias=bias))


def fill_b(model: nn.Module) -> nn.Module:
    """Give every LoRA B values other than 0."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def tiny_rows(num_rows: int = 16, shift: int = 1) -> list[dict[str, str]]:
    rows = []
    for i in range(num_rows):
        letter, other = chr(97 + i % 26), chr(97 + (i * 7) % 26)
        answer = chr(97 + (i + shift) % 26) * (1 + i % 3)
        rows.append({"prompt": f"{other} {letter} {i % 10} : ", "completion": answer})
    return rows


def tiny_dataset(name: str, num_rows: int = 16, shift: int = 1) -> list[Example]:
    tokenizer: Any = tiny_tokenizer()
    return [encode_row(row, tokenizer, 64, f"{name}:{i}") for i, row in enumerate(tiny_rows(num_rows, shift))]


def tiny_stream(num_tasks: int = 2) -> list[tuple[list[dict[str, str]], list[Example]]]:
    """Return tasks that a model can hold side by side: each has its own letters and its own shift."""
    tokenizer: Any = tiny_tokenizer()
    tasks = []
    for t in range(num_tasks):
        letters = "abcdefghijklmnop"[8 * t : 8 * t + 8]
        rows = [{"prompt": f"{a} {t} :", "completion": chr(97 + (ord(a) - 97 + 1 + t) % 26)} for a in letters]
        tasks.append((rows, [encode_row(row, tokenizer, 16, f"t{t}:{i}") for i, row in enumerate(rows)]))
    return tasks


def new_session(**changes: Any) -> MemorySession:
    values: dict[str, Any] = {"version": 0, "op_id": "run/t0", "seed": 0, **changes}
    store = values.pop("store", None)
    return MemorySession(InProcessMemory() if store is None else store, **values)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], atol: float = 0.0) -> None:
    """Compare tensors by name; with atol 0 every bit counts."""
    assert set(left) == set(right)
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def differ(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return any(not torch.equal(left[name], right[name]) for name in left)


@torch.no_grad()
def mean_nll(model: nn.Module, examples: Sequence[Example]) -> float:
    """Return nats per label token."""
    nll, labels = completion_nll(model, collate(examples, 0))
    return float(nll.sum() / labels.sum())


def tiny_learner(seed: int = 0) -> nn.Module:
    """Return a model that learns a task of tiny_stream in 60 steps: larger base weights carry information."""
    model = tiny_llama(seed, 8, targets="all-linear")
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter.dim() == 2:
                parameter.mul_(5)
    return model
