"""Fixtures over the builders of tiny.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from clcore.engine.tasks import Example
from tests.clcore.tiny import tiny_dataset, tiny_llama, tiny_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character that is not a space."""
    return tiny_tokenizer()


@pytest.fixture
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose chat template writes the role's first letter, ':', the content and the end token."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] + ': ' + m['content'] + ' <eos>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    return tokenizer


@pytest.fixture
def make_model() -> Callable[..., nn.Module]:
    """Return a factory of equal tiny LoRA models: make_model(seed=0, r=4, with_b=False)."""
    return tiny_llama


@pytest.fixture
def make_dataset() -> Callable[..., list[Example]]:
    """Return a factory: make_dataset("t0", num_rows=16, shift=1); a letter's answer is shifted by shift."""
    return tiny_dataset
