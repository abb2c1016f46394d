"""MemoryStore over the memory actor's handle: what strategies on training workers read and write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from clcore.engine.errors import ClError
from clcore.engine.memory import Row, State
from clcore.engine.state import as_arrays
from service.adapters.storage import StorageError


class ActorMemory:
    """A MemoryStore whose data lives in the actor; errors are raised as the actor raised them."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def read(self, version: int, key: str) -> State:
        state: State = _call(self._handle.read, version, key)
        return state

    def rows(self, version: int, refs: Sequence[str]) -> list[Row]:
        rows: list[Row] = _call(self._handle.rows, version, list(refs))
        return rows

    def write(
        self,
        op_id: str,
        base_version: int,
        states: Mapping[str, State],
        rows: Mapping[str, Mapping[str, Row]],
    ) -> int:
        arrays = {key: as_arrays(state) for key, state in states.items()}
        refs = {key: list(of_key) for key, of_key in rows.items()}
        return int(_call(self._handle.write, op_id, base_version, arrays, refs))

    def snapshot(self, version: int, folder: Path) -> str:
        digest, files = _call(self._handle.snapshot, version)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return str(digest)


def _call(method: Any, *args: Any) -> Any:
    try:
        return ray.get(method.remote(*args))
    except RayTaskError as error:
        if isinstance(error.cause, ClError | StorageError):
            raise error.cause from error
        raise
