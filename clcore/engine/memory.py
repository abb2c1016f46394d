"""Memory: what a strategy knows about earlier tasks, as numbered versions.

A MemoryStore holds, per version, one state per strategy (arrays, numbers, strings, lists, dicts) and the rows
that the state refers to by reference ("<data set>:<row>"). A task reads the version it started from and
writes one new version at its end; a repeated write with the same op_id returns the same version. The last two
versions stay readable.

MemorySession is one task's view: strategies read and stage, and rank 0 commits everything at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from clcore.engine.errors import StaleVersionError, StateError
from clcore.engine.state import as_arrays, load_state, save_state

State = dict[str, Any]
Row = Mapping[str, Any]


class MemoryStore(Protocol):
    """Versioned state of strategies; see the module's text."""

    def read(self, version: int, key: str) -> State:
        """Return a strategy's state, {} when it has none. Raises StateError for a version that is gone."""
        ...

    def rows(self, version: int, refs: Sequence[str]) -> list[Row]:
        """Return the rows behind references, in order. Raises StateError for an unknown one."""
        ...

    def write(
        self,
        op_id: str,
        base_version: int,
        states: Mapping[str, State],
        rows: Mapping[str, Mapping[str, Row]],
    ) -> int:
        """Write all states at once and return the new version, persisted.

        rows: state key -> reference -> row, everything that the state refers to. A store that can load rows
        by reference may ignore the rows themselves. Raises StaleVersionError unless base_version is the
        newest.
        """
        ...

    def snapshot(self, version: int, folder: Path) -> str:
        """Save a version's states into a folder and return the snapshot's sha256."""
        ...


@dataclasses.dataclass(frozen=True)
class _Version:
    states: dict[str, State]
    refs: dict[str, tuple[str, ...]]


class InProcessMemory:
    """A MemoryStore in this process.

    load_row: reference -> row, for references that come without a row.
    """

    def __init__(self, load_row: Callable[[str], Row] | None = None, *, generation: str = "") -> None:
        self._load_row = load_row
        self._generation = generation
        self._versions: dict[int, _Version] = {0: _Version({}, {})}
        self._operations: dict[str, int] = {}
        self._rows: dict[str, Row] = {}

    @property
    def newest(self) -> int:
        """The newest version's number; 0 is empty."""
        return max(self._versions)

    def read(self, version: int, key: str) -> State:
        return self._get(version).states.get(key, {})

    def rows(self, version: int, refs: Sequence[str]) -> list[Row]:
        known = {ref for refs_of_key in self._get(version).refs.values() for ref in refs_of_key}
        unknown = [ref for ref in refs if ref not in known]
        if unknown:
            raise StateError(f"memory version {version} refers to no row {unknown[0]!r}")
        return [self._rows[ref] for ref in refs]

    def write(
        self,
        op_id: str,
        base_version: int,
        states: Mapping[str, State],
        rows: Mapping[str, Mapping[str, Row]],
    ) -> int:
        if op_id in self._operations:
            return self._operations[op_id]
        if base_version != self.newest:
            raise StaleVersionError(
                f"memory is at version {self.newest}, write {op_id!r} is based on {base_version}"
            )
        old = self._get(base_version)
        refs = {**old.refs, **{key: tuple(of_key) for key, of_key in rows.items()}}
        given = {ref: row for of_key in rows.values() for ref, row in of_key.items() if row}
        for ref in (ref for of_key in refs.values() for ref in of_key):
            if ref not in self._rows:
                self._rows[ref] = given[ref] if ref in given else self._load(ref)
        self._versions[base_version + 1] = _Version(
            {**old.states, **{key: as_arrays(state) for key, state in states.items()}}, refs
        )
        self._operations[op_id] = base_version + 1
        self._forget_old()
        return base_version + 1

    def snapshot(self, version: int, folder: Path) -> str:
        record = self._get(version)
        operations = {op: v for op, v in self._operations.items() if v <= version}
        state = {
            "version": version,
            "operations": operations,
            "states": record.states,
            "refs": {key: list(refs) for key, refs in record.refs.items()},
        }
        return save_state(folder, "memory", state, generation=self._generation)

    def restore(self, folder: Path) -> int:
        """Load a snapshot as the newest version and return its number; StateError if it does not fit."""
        state = load_state(folder, "memory", generation=self._generation)
        version = int(state["version"])
        refs = {key: tuple(of_key) for key, of_key in state["refs"].items()}
        for ref in {ref for of_key in refs.values() for ref in of_key} - set(self._rows):
            self._rows[ref] = self._load(ref)
        kept = {number: v for number, v in self._versions.items() if 0 < number < version}
        self._versions = {**kept, version: _Version(as_arrays(state["states"]), refs)}
        self._operations = {op: int(v) for op, v in state["operations"].items()}
        self._forget_old()
        return version

    def replace_row(self, ref: str, row: Row) -> None:
        """Overwrite one stored row, for example to correct it. Raises StateError for an unknown reference."""
        if ref not in self._rows:
            raise StateError(f"memory holds no row {ref!r}")
        self._rows[ref] = row

    def _load(self, ref: str) -> Row:
        if self._load_row is None:
            raise StateError(f"row {ref!r} was given by reference, and this memory cannot load rows")
        return self._load_row(ref)

    def _get(self, version: int) -> _Version:
        if version not in self._versions:
            raise StateError(f"memory version {version} is gone; readable: {sorted(self._versions)}")
        return self._versions[version]

    def _forget_old(self) -> None:
        for version in sorted(self._versions)[:-2]:
            del self._versions[version]
        used = {ref for v in self._versions.values() for refs in v.refs.values() for ref in refs}
        self._rows = {ref: row for ref, row in self._rows.items() if ref in used}


class MemorySession:
    """One task's view of a store: read the version it starts from, stage changes, commit them once.

    encode: row -> example that the loop can train on; identity when rows are stored encoded.
    """

    def __init__(
        self,
        store: MemoryStore,
        *,
        version: int,
        op_id: str,
        seed: int = 0,
        encode: Callable[[Row, str], Any] = lambda row, ref: row,  # noqa: ARG005
    ) -> None:
        self.store, self.version, self.op_id, self.seed, self._encode = store, version, op_id, seed, encode
        self._states: dict[str, State] = {}
        self._rows: dict[str, dict[str, Row]] = {}
        self.is_committed = False

    def read(self, key: str) -> State:
        """Return a strategy's state as earlier tasks left it; {} before the first task."""
        return self.store.read(self.version, key)

    def examples(self, refs: Sequence[str]) -> list[Any]:
        """Return the rows behind references, ready to train on."""
        return [
            self._encode(row, ref) for ref, row in zip(refs, self.store.rows(self.version, refs), strict=True)
        ]

    def stage(self, key: str, state: State, rows: Mapping[str, Row] | None = None) -> None:
        """Put a strategy's new state; rows: all that it refers to (an empty row: known to the store)."""
        self._states[key] = state
        if rows is not None:
            self._rows[key] = dict(rows)

    def commit(self) -> int:
        """Write what was staged and return the new version. Only rank 0 calls it."""
        self.version = self.store.write(self.op_id, self.version, self._states, self._rows)
        self.is_committed = True
        return self.version

    def next_task(self, *, op_id: str) -> MemorySession:
        """Return a session that starts from this one's version."""
        return MemorySession(
            self.store, version=self.version, op_id=op_id, seed=self.seed, encode=self._encode
        )
