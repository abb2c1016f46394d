"""What a model answered, kept so that nothing is computed twice: batch by batch, in immutable segments.

A segment is a JSON file named by its own sha256, so that one that is not whole is seen and computed again.
It holds outputs (answers or likelihoods), not scores: metrics of answers share them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from clcore.engine.errors import ConfigError, StateError
from clcore.evaluation.metrics import metric_family

SCHEMA = 1

Output = Mapping[str, Any]
"""{"answer": str}, {"nll": float, "num_tokens": int} or {"nlls": list of float}."""


class OutputStore(Protocol):
    """Where segments lie. A key is a hex digest, a name is a file name. Any process may write at any time."""

    def names(self, key: str) -> list[str]:
        """Return the names under a key; none for a key that was never written."""
        ...

    def read(self, key: str, name: str) -> bytes: ...

    def write(self, key: str, name: str, data: bytes) -> None:
        """Write whole or not at all, as far as the store can; the same name again replaces it."""
        ...


@dataclasses.dataclass(frozen=True)
class LocalStore:
    """Segments in a folder of this machine: <folder>/<key>/<name>."""

    folder: Path

    def names(self, key: str) -> list[str]:
        folder = self.folder / key
        return sorted(path.name for path in folder.glob("*.json")) if folder.is_dir() else []

    def read(self, key: str, name: str) -> bytes:
        return (self.folder / key / name).read_bytes()

    def write(self, key: str, name: str, data: bytes) -> None:
        path = self.folder / key / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{name}.{uuid.uuid4().hex}.tmp")
        temporary.write_bytes(data)
        os.replace(temporary, path)


@dataclasses.dataclass(frozen=True)
class Stored:
    """Outputs of one model on one data set in a store. Raises ConfigError for a key that is no hex digest."""

    store: OutputStore
    key: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.key):
            raise ConfigError(f"key must be 64 hex digits, as output_key returns, got {self.key!r}")

    def load(self, settings: Mapping[str, Any], digests: Mapping[int, str]) -> dict[int, Output]:
        """Return the stored outputs of these rows: row -> output.

        settings: what outputs depend on beside the key, as it was given to save. digests: row -> digest of
        its tokens. A segment that is not whole is left out. Raises StateError for a whole one under another
        key, with other settings, or for other tokens of a row: the key does not say what it must say.
        """
        found: dict[int, Output] = {}
        for name in sorted(self.store.names(self.key)):
            segment = _whole(name, self.store.read(self.key, name))
            if segment is None:
                continue
            expected = {"schema": SCHEMA, "key": self.key, "settings": dict(settings)}
            for field, value in expected.items():
                if segment[field] != value:
                    raise StateError(f"stored outputs {name}: {field} is {segment[field]!r}, not {value!r}")
            for row, digest, output in segment["rows"]:
                if row in digests and digests[row] != digest:
                    raise StateError(f"stored outputs {name}: row {row} has other tokens now")
                if row in digests:
                    found.setdefault(row, output)
        return found

    def save(self, settings: Mapping[str, Any], rows: Sequence[tuple[int, str, Output]]) -> None:
        """Write one segment: (row, digest of its tokens, output)."""
        content = {"schema": SCHEMA, "key": self.key, "settings": dict(settings), "rows": list(rows)}
        data = json.dumps(content, allow_nan=False).encode()
        self.store.write(self.key, f"{hashlib.sha256(data).hexdigest()}.json", data)


def output_key(
    *,
    base_model: str,
    revision: str,
    precision: str,
    adapter_sha256: str | None,
    dataset_sha256: str,
    template: str,
    metric: str | Callable[[str, str], float],
    decoding: Mapping[str, Any],
) -> str:
    """Return the key of outputs, a hex digest of all that they depend on.

    adapter_sha256 None: without an adapter. template: what turns rows into text, such as the chat template.
    Of the metric its family counts: metrics of answers share a key. decoding: JSON values, such as
    max_new_tokens and max_length; not the batch size, which changes no answer.
    """
    parts = {
        "schema": SCHEMA,
        "base_model": base_model,
        "revision": revision,
        "precision": precision,
        "adapter_sha256": adapter_sha256,
        "dataset_sha256": dataset_sha256,
        "template": template,
        "family": metric_family(metric),
        "decoding": dict(decoding),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _whole(name: str, data: bytes) -> dict[str, Any] | None:
    if hashlib.sha256(data).hexdigest() != name.removesuffix(".json"):
        return None
    segment: dict[str, Any] = json.loads(data)
    return segment
