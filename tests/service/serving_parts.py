"""Tiny random base models and adapters on disk, and registry rows for them: what the serving tests share."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from service.adapters.manifest import MANIFEST_NAME, Manifest, ManifestFile
from service.adapters.storage import Storage
from service.db.session import Sessions
from service.db.tables import Adapter, AdapterVersion, Alias, Job, Run
from service.specs import BaseModelSpec

CONTEXT_TOKENS = 4096
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_base(folder: Path, seed: int = 0, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Save a random Llama with a tokenizer of one token per byte; it prefers letters and never ends."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", additional_special_tokens=specials[1:]
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for token, number in vocabulary.items():
            if not token.isascii() or token in specials:
                model.lm_head.weight[number] = 0
    model.save_pretrained(folder)
    return folder


def save_adapter(
    folder: Path, base: Path, seed: int, *, targets: tuple[str, ...] = ("q_proj", "v_proj")
) -> Path:
    """Save a LoRA adapter with large random weights, with dropout that must not act when it is served."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.5, target_modules=list(targets), task_type="CAUSAL_LM"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return folder


def direct_tokens(
    base: Path, adapter: Path | None, prompt_ids: list[int], num_tokens: int
) -> tuple[int, ...]:
    """Greedy tokens of transformers and PEFT called directly, batch of one."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    inputs = torch.tensor([prompt_ids])
    output = model.generate(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=num_tokens, do_sample=False
    )
    return tuple(output[0, len(prompt_ids) :].tolist())


def direct_text(base: Path, adapter: Path | None, prompt: str, num_tokens: int) -> str:
    """Greedy text of a raw prompt, called directly."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = direct_tokens(base, adapter, tokenizer(prompt)["input_ids"], num_tokens)
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def vouch(storage: Storage, key: str, base: Path) -> None:
    """Write a manifest for the files that lie in a task directory, which makes them a version."""
    files = {
        name.removeprefix(f"{key}/"): storage.read_bytes(name)
        for name in storage.find(key)
        if not name.endswith(MANIFEST_NAME)
    }
    manifest = Manifest(
        job_id="job_1",
        run_id="run_1",
        attempt=1,
        task_index=0,
        task_name="t1",
        adapter="tiny",
        parent_dir=None,
        base_model=BaseModelSpec(id="org/tiny"),
        base_model_path=str(base),
        peft={},
        strategy=[],
        data_format="completion",
        files={
            name: ManifestFile(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            for name, data in files.items()
        },
        dataset_sha256={},
        memory_version=0,
        scores={},
        base_scores={},
        num_eval_rows={},
        training={},
        environment={},
        code_version="0",
        created_at="2026-01-01",
    )
    storage.write_bytes(f"{key}/{MANIFEST_NAME}", manifest.model_dump_json().encode())


def task_dir(name: str, version: int) -> str:
    """Storage key of a version's task directory."""
    return f"runs/run_{name}/a1/tasks/{version - 1}"


def commit_version(
    sessions: Sessions, storage: Storage, base: Path, name: str, version: int, *, alias: str = "live"
) -> Path:
    """Make a version: its files, its registry rows, the alias moved to it. Returns the adapter folder."""
    key = task_dir(name, version)
    folder = save_adapter(Path(storage.path(f"{key}/adapter")), base, seed=version + sum(name.encode()))
    vouch(storage, key, base)
    manifest = {"base_model": {"id": "org/tiny"}, "base_model_path": str(base), "data_format": "completion"}
    with sessions.write() as session:
        if session.get(Adapter, name) is None:
            session.add(
                Job(
                    id=f"job_{name}",
                    name=name,
                    adapter=name,
                    state="succeeded",
                    spec={},
                    base_model_path=str(base),
                    base_model_id="org/tiny",
                    labels={},
                    num_tasks=1,
                    num_committed=1,
                )
            )
            session.flush()
            session.add(
                Run(id=f"run_{name}", job_id=f"job_{name}", number=1, state="succeeded", task_indexes=[0])
            )
            session.add(Adapter(name=name, job_id=f"job_{name}", latest_version=version))
            session.flush()
        session.add(
            AdapterVersion(
                adapter=name,
                version=version,
                job_id=f"job_{name}",
                run_id=f"run_{name}",
                attempt=1,
                task_index=version - 1,
                task_name=f"t{version}",
                task_dir=key,
                manifest=manifest,
                manifest_sha256="0" * 64,
            )
        )
        session.merge(Alias(adapter=name, alias=alias, version=version))
    return folder
