"""The base model with its adapter on a worker: fresh from the seed, or from a committed version."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.train.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from clcore.engine.errors import ConfigError
from clcore.engine.tasks import Example, derive_seed, encode_row
from service.adapters.manifest import ADAPTER
from service.adapters.storage import Storage
from service.adapters.version_files import fetch_folder
from service.scratch import scratch_folder
from service.specs import RunPlan


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model with a trainable adapter, and its tokenizer."""

    model: nn.Module
    tokenizer: Any
    pad_token_id: int

    def encode(self, row: Mapping[str, Any], ref: str, max_length: int) -> Example:
        """Turn a row into tokens."""
        return encode_row(row, self.tokenizer, max_length, ref)


def load_model(storage: Storage, plan: RunPlan, task_dir: str | None) -> LoadedModel:
    """Load the base model with the adapter of a version, or a fresh one that depends on the seed alone.

    Raises ConfigError when max_length does not fit the model, or no module has the target names; DamagedFile
    when the version's files are not those of its manifest.
    """
    dtype = torch.bfloat16 if plan.training.precision == "bf16" else torch.float32
    source: dict[str, Any] = {"trust_remote_code": False, "revision": plan.base_model.revision}
    tokenizer = AutoTokenizer.from_pretrained(plan.base_model_path, **source)
    base = AutoModelForCausalLM.from_pretrained(
        plan.base_model_path, dtype=dtype, use_safetensors=True, **source
    )
    limit = getattr(base.config, "max_position_embeddings", None)
    longest = max(task.training.max_length for task in plan.tasks)
    if limit is not None and longest > limit:
        raise ConfigError(f"max_length is {longest}, {plan.base_model.id} has {limit} positions")
    if task_dir is None:
        model = _fresh_adapter(base, plan)
    else:
        with scratch_folder() as folder:
            fetch_folder(storage, task_dir, ADAPTER, folder)
            model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    model.to(ray.train.torch.get_device())
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return LoadedModel(model, tokenizer, pad or 0)


def _fresh_adapter(base: Any, plan: RunPlan) -> PeftModel:
    torch.manual_seed(derive_seed(plan.training.seed, "adapter"))
    config = LoraConfig(
        r=plan.peft.r,
        lora_alpha=plan.peft.lora_alpha,
        lora_dropout=plan.peft.lora_dropout,
        target_modules=sorted(plan.peft.target_modules) if plan.peft.target_modules else None,
        task_type="CAUSAL_LM",
    )
    try:
        model = get_peft_model(base, config)
    except ValueError as error:  # PEFT names the target modules that match nothing
        raise ConfigError(f"the adapter does not fit {plan.base_model.id}: {error}") from error
    assert isinstance(model, PeftModel)
    return model


def save_adapter(model: nn.Module, folder: Path, base_model_id: str) -> None:
    """Write the adapter in PEFT's format, the same bytes for the same weights."""
    assert isinstance(model, PeftModel)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base_model_id  # not a path of the machine that trained it
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])  # PEFT keeps sets
    path.write_text(json.dumps(config, indent=1, sort_keys=True))
