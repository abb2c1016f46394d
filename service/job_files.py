"""Job and task files as users write them: YAML whose data sets may be local files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from service.client import ApiError, Client

DATASET_FIELDS = ("dataset", "eval_dataset", "general")
"""Of a task, and of a job's evaluation, where "default" is no file."""


class JobFileError(ApiError):
    """A job or task file cannot be used."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a file that holds one mapping. Raises JobFileError with the line."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise JobFileError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, TypeError) as error:
        raise JobFileError(
            f"{path}: {error}; only text, finite numbers, true and false are possible (put dates in quotes)"
        ) from error
    if not isinstance(value, dict):
        raise JobFileError(f"{path} must hold fields such as 'name:', not {type(value).__name__}")
    return value


@contextmanager
def local_datasets(
    parts: list[Any], folder: Path, client: Client, *, progress: Callable[[str], None]
) -> Iterator[list[Any]]:
    """Give tasks, and a job's evaluation, with file paths replaced by the ids of uploaded data sets.

    Paths are relative to folder.

    All files are looked up before the first upload, and what was uploaded is deleted again when the service
    refuses what the block sends. Raises JobFileError for a file that is not there.
    """
    ids: dict[str, str] = {}
    try:
        yield _upload(parts, folder, client, progress, ids)
    except ApiError as error:
        if error.status:  # refused; without an answer the job may be there and need them
            for dataset_id in ids.values():
                client.delete_dataset(dataset_id)
        raise


def _upload(
    parts: list[Any], folder: Path, client: Client, progress: Callable[[str], None], ids: dict[str, str]
) -> list[Any]:
    found: dict[str, Path] = {}
    for part in parts:
        for field in DATASET_FIELDS:
            value = part.get(field) if isinstance(part, dict) else None
            if isinstance(value, str) and not re.fullmatch(r"ds_[0-9a-z]+|default", value):
                where = (
                    "evaluation.general" if field == "general" else f"{field} of task {part.get('name')!r}"
                )
                found[value] = _find_file(value, folder, where)
    for value, path in found.items():
        name = re.sub(r"[^a-z0-9_-]+", "-", f"{path.parent.name}-{path.stem}".lower()).strip("-_")[:63]
        try:
            dataset = client.upload_dataset(name or "dataset", path)
        except ApiError as error:
            raise ApiError(f"{value}: {error}", status=error.status, code=error.code) from error
        progress(f"uploaded {value}: {dataset['num_rows']} rows")
        ids[value] = dataset["id"]
    return [
        {**part, **{field: ids[part[field]] for field in DATASET_FIELDS if _is_one_of(part.get(field), ids)}}
        if isinstance(part, dict)
        else part
        for part in parts
    ]


def _is_one_of(value: Any, ids: dict[str, str]) -> bool:
    return isinstance(value, str) and value in ids


def _find_file(value: str, folder: Path, where: str) -> Path:
    path = folder / Path(value).expanduser()
    if not path.is_file():
        raise JobFileError(
            f"{where}: {value!r} is neither the id of a data set (ds_...) nor a file at {path}"
        )
    return path
