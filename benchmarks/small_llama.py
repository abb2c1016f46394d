"""A small Llama with LoRA and random rows: what the overhead is measured on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from clcore.engine.tasks import IGNORE, Example, derive_seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The model, the rows and how often is measured."""

    layers: int = 8
    hidden: int = 576
    heads: int = 9
    kv_heads: int = 3
    intermediate: int = 1536
    vocabulary: int = 2048
    """Small: the head runs on label tokens only and is the same for all."""
    rows_per_step: int = 4
    row_tokens: int = 128
    """The second half of them are labels."""
    task_rows: int = 16
    """Rows of a task whose steps are timed; other tasks have rows_per_step."""
    pairs_at: Mapping[int, int] = dataclasses.field(default_factory=lambda: {1: 10, 5: 10, 15: 30})
    """Number of earlier tasks -> pairs of steps."""


QUICK = Shape(
    layers=2,
    hidden=64,
    heads=4,
    kv_heads=2,
    intermediate=128,
    vocabulary=64,
    row_tokens=16,
    task_rows=8,
    pairs_at={1: 2, 3: 3},
)


def base_model(shape: Shape) -> LlamaForCausalLM:
    """Build the same random base model every time, in float32."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


def lora_model(shape: Shape) -> nn.Module:
    """Put LoRA of rank 8 on the queries and values of the base model."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(base_model(shape), config)


def task_rows(shape: Shape, task: int) -> list[Example]:
    """Make a task's random rows of equal length, labels in the second half."""
    num_rows = shape.task_rows if task in shape.pairs_at else shape.rows_per_step
    generator = torch.Generator().manual_seed(derive_seed("overhead", task))
    rows: list[Example] = []
    for i in range(num_rows):
        ids = torch.randint(1, shape.vocabulary, (shape.row_tokens,), generator=generator)
        labels = ids.clone()
        labels[: shape.row_tokens // 2] = IGNORE
        rows.append({"input_ids": ids, "labels": labels, "ref": f"t{task}:{i}"})
    return rows
