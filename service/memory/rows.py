"""Rows of uploaded data sets by reference, read straight from their blobs."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from clcore.engine.errors import StateError
from service.adapters.storage import Storage, dataset_key


def row_ref(dataset_id: str, row: int) -> str:
    """Return the reference of a row, "<data set>:<row>", counted from 0."""
    return f"{dataset_id}:{row}"


class RowReader:
    """Load single rows; keeps the byte offset of every line of a data set, never its text."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._offsets: dict[str, np.ndarray] = {}

    def __call__(self, ref: str) -> dict[str, Any]:
        """Return the row behind a reference. Raises StateError when there is none."""
        dataset_id, _, number = ref.partition(":")
        if not number.isdigit():
            raise StateError(f"bad row reference {ref!r}; expected <data set>:<row>")
        key = dataset_key(dataset_id)
        try:
            offsets = self._offsets_of(dataset_id, key)
            if int(number) >= len(offsets) - 1:
                raise StateError(f"data set {dataset_id} has {len(offsets) - 1} rows, no row {number}")
            start, end = int(offsets[int(number)]), int(offsets[int(number) + 1])
            row: dict[str, Any] = json.loads(self._storage.read_range(key, start, end))
        except FileNotFoundError as error:
            raise StateError(f"the rows of data set {dataset_id} were deleted") from error
        return row

    def _offsets_of(self, dataset_id: str, key: str) -> np.ndarray:
        """Return where each row starts and the last one ends; every row ends with a line feed."""
        if dataset_id not in self._offsets:
            offsets, num_bytes = [np.zeros(1, dtype=np.int64)], 0
            for chunk in self._storage.chunks(key):
                ends = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n"))
                offsets.append(ends.astype(np.int64) + num_bytes + 1)
                num_bytes += len(chunk)
            self._offsets[dataset_id] = np.concatenate(offsets)
        return self._offsets[dataset_id]
