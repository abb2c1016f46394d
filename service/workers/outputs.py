"""The model's answers in storage: what was answered once is not answered again, by any attempt or run."""

from __future__ import annotations

import posixpath

from service.adapters.storage import Storage, outputs_key


class StoredOutputs:
    """An OutputStore of clcore.evaluation over the service's storage, for one data set.

    outputs/<data set>/<key>/<segment>; the folder of a data set goes when the data set is deleted.
    """

    def __init__(self, storage: Storage, dataset_id: str) -> None:
        self._storage, self._folder = storage, outputs_key(dataset_id)

    def names(self, key: str) -> list[str]:
        """Return the segments that were written under a key."""
        return self._storage.names(posixpath.join(self._folder, key))

    def read(self, key: str, name: str) -> bytes:
        """Read a segment. Raises FileNotFoundError."""
        return self._storage.read_bytes(posixpath.join(self._folder, key, name))

    def write(self, key: str, name: str, data: bytes) -> None:
        """Write a segment, whole or not at all."""
        self._storage.write_bytes(posixpath.join(self._folder, key, name), data)
