"""Rows of planned data sets on a worker: read, checked and turned into tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from clcore.engine.errors import DataError
from clcore.engine.tasks import Example, encode_row
from service.adapters.storage import Storage
from service.memory.rows import row_ref
from service.specs import PlannedDataset


def read_rows(storage: Storage, dataset: PlannedDataset) -> list[dict[str, Any]]:
    """Read all rows. Raises DataError when the file is gone or is not the one that was planned."""
    try:
        data = storage.read_bytes(dataset.path)
    except FileNotFoundError as error:
        raise DataError(f"the rows of data set {dataset.id} were deleted") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != dataset.sha256:
        raise DataError(f"data set {dataset.id} changed: sha256 {digest} instead of {dataset.sha256}")
    return [json.loads(line) for line in data.splitlines()]


def encode_rows(
    rows: Sequence[Mapping[str, Any]], dataset: PlannedDataset, tokenizer: Any, max_length: int
) -> list[Example]:
    """Turn rows into examples before training starts, so that a bad row costs no training.

    Raises DataError that names the row, counted from 1.
    """
    examples = []
    for number, row in enumerate(rows):
        try:
            examples.append(encode_row(row, tokenizer, max_length, row_ref(dataset.id, number)))
        except DataError as error:
            raise DataError(f"data set {dataset.id}, row {number + 1}: {error}") from error
    return examples
