"""Files of a base model: is this one we can use, and the conversion from GGUF."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
SAMPLE_TEXT = "The printer on the second floor prints 12 blank pages. Who repairs it?"


class ModelError(ValueError):
    """A base model is unknown, cannot be fetched, or is not what it should be."""


def check_causal_model(folder: Path) -> None:
    """Raise ModelError unless the folder holds a causal language model in safetensors with its tokenizer."""
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as causal_types

    if not (folder / "config.json").is_file():
        raise ModelError(f"no config.json in {folder}")
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"config.json in {folder} is not JSON: {error}") from error
    if not isinstance(raw, dict) or raw.get("model_type") not in causal_types:
        found = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
        raise ModelError(
            f"{folder}: model_type {found!r} is not a causal language model that transformers knows"
        )
    if "auto_map" in raw:
        raise ModelError(f"{folder}: the model wants to run its own code (auto_map), which is not allowed")
    weights = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        wanted = {
            folder / shard for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        }
        missing = sorted(shard.name for shard in wanted if not shard.is_file())
        if missing:
            raise ModelError(f"{folder}: weights are missing: {', '.join(missing)}")
    if not weights:
        raise ModelError(f"no .safetensors file in {folder}; other weight formats are not taken")
    for path in weights:
        try:
            with safe_open(path, framework="np"):
                pass
        except SafetensorError as error:
            raise ModelError(f"{path} is damaged: {error}") from error
    if not any((folder / tokenizer).is_file() for tokenizer in TOKENIZER_FILES):
        raise ModelError(f"no tokenizer in {folder}: one of {', '.join(TOKENIZER_FILES)} is needed")
    try:
        AutoConfig.from_pretrained(str(folder), local_files_only=True)
        AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: transformers cannot read the model: {first_line(error)}") from error


def check_sha256(path: Path, expected: str, what: str) -> None:
    """Raise ModelError unless the file has this checksum; `what` names it in the error."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ModelError(f"{what} is not the file we know: sha256 is {found}, expected {expected}")


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write a GGUF model as plain fp32 safetensors and check that reading it back gives the same logits."""
    logging.disable(logging.WARNING)  # libraries tell of accelerators that are not here
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    import transformers
    from transformers import AutoTokenizer

    quiet: Any = transformers.logging
    quiet.disable_progress_bar()
    AutoModelForCausalLM: Any = transformers.AutoModelForCausalLM  # its methods carry no types
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    packed = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
    ).eval()
    config = type(packed.config).from_dict(
        {key: value for key, value in packed.config.to_dict().items() if key != "quantization_config"}
    )
    config.name_or_path = ""
    # save_pretrained refuses a model that remembers its GGUF quantization: move the weights into a fresh one
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    plain.load_state_dict(packed.state_dict())
    plain.tie_weights()
    plain.generation_config = packed.generation_config
    plain.save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))

    again = AutoModelForCausalLM.from_pretrained(str(target), dtype=torch.float32).eval()
    read_back = AutoTokenizer.from_pretrained(str(target))
    ids = tokenizer(SAMPLE_TEXT, return_tensors="pt")["input_ids"]
    if (
        read_back(SAMPLE_TEXT)["input_ids"] != ids[0].tolist()
        or read_back.chat_template != tokenizer.chat_template
    ):
        raise ModelError("the converted tokenizer differs from the one in the GGUF file")
    with torch.inference_mode():
        if not torch.equal(packed(ids).logits, again(ids).logits):
            raise ModelError("the converted model's logits differ from those of the GGUF file")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
