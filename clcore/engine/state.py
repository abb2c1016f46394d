"""Saving state: nested dicts of arrays, numbers and strings, as safetensors plus JSON. Never a pickle.

<name>.json holds the structure with {"$tensor": key} where an array stands, <name>.safetensors the arrays.
The JSON also holds the schema version, the generation of the adapter that the state belongs to and the sha256
of the arrays: state of another adapter, or of one that was merged and started afresh, is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from clcore.engine.errors import StateError

SCHEMA_VERSION = 1


def save_state(folder: Path, name: str, state: dict[str, Any], *, generation: str) -> str:
    """Write a state and return the sha256 of its JSON, which covers the arrays too.

    Torch tensors are stored as arrays. Raises StateError for a value that is none of the allowed types.
    """
    arrays: dict[str, np.ndarray] = {}
    tree = _split(state, arrays, "")
    data = save(arrays)
    header = {
        "schema_version": SCHEMA_VERSION,
        "generation": generation,
        "sha256": hashlib.sha256(data).hexdigest(),
        "state": tree,
    }
    text = json.dumps(header, sort_keys=True).encode()
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / f"{name}.safetensors", data)
    _write(folder / f"{name}.json", text)  # last: it vouches for the arrays
    return hashlib.sha256(text).hexdigest()


def load_state(folder: Path, name: str, *, generation: str) -> dict[str, Any]:
    """Read a state back; arrays come as numpy. Raises StateError if anything does not fit."""
    try:
        header = json.loads((folder / f"{name}.json").read_bytes())
        data = (folder / f"{name}.safetensors").read_bytes()
    except (FileNotFoundError, ValueError) as error:  # not UTF-8 and not JSON are ValueErrors
        raise StateError(f"no readable state {name!r} in {folder}: {error}") from error
    if not isinstance(header, dict):
        raise StateError(f"no readable state {name!r} in {folder}: the JSON is not an object")
    if header.get("schema_version") != SCHEMA_VERSION:
        raise StateError(
            f"state {name!r} has schema {header.get('schema_version')}, this version reads {SCHEMA_VERSION}"
        )
    if header.get("generation") != generation:
        found = header.get("generation")
        raise StateError(f"state {name!r} belongs to adapter generation {found!r}, not to {generation!r}")
    if hashlib.sha256(data).hexdigest() != header.get("sha256"):
        raise StateError(f"state {name!r} in {folder} is damaged: the arrays do not match their sha256")
    state: dict[str, Any] = _join(header["state"], load(data))
    return state


def as_arrays(state: dict[str, Any]) -> dict[str, Any]:
    """Copy a state, tensors as read-only arrays: what a save and a load would give."""
    arrays: dict[str, np.ndarray] = {}
    tree = _split(state, arrays, "")
    frozen = {path: np.array(value) for path, value in arrays.items()}
    for value in frozen.values():
        value.flags.writeable = False
    copied: dict[str, Any] = _join(tree, frozen)
    return copied


def _split(value: Any, arrays: dict[str, np.ndarray], path: str) -> Any:
    if hasattr(value, "detach"):  # a torch tensor; torch itself is not imported here
        value = value.detach().cpu().numpy()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        arrays[path] = np.ascontiguousarray(value).reshape(value.shape)
        return {"$tensor": path}
    if isinstance(value, dict):
        bad = [key for key in value if not isinstance(key, str)]
        if bad:
            raise StateError(f"state keys must be strings, got {bad[0]!r} at {path or 'the top'}")
        return {key: _split(item, arrays, f"{path}/{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_split(item, arrays, f"{path}/{i}") for i, item in enumerate(value)]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise StateError(f"cannot store a {type(value).__name__} at {path or 'the top'}")


def _join(tree: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(tree, dict):
        if set(tree) == {"$tensor"}:
            return arrays[tree["$tensor"]]
        return {key: _join(item, arrays) for key, item in tree.items()}
    if isinstance(tree, list):
        return [_join(item, arrays) for item in tree]
    return tree


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
