"""Memory versions, and the files they are saved in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clcore.engine.errors import StaleVersionError, StateError
from clcore.engine.memory import InProcessMemory, MemorySession
from clcore.engine.state import as_arrays, load_state, save_state
from tests.clcore.tiny import new_session


def test_a_write_makes_the_next_version_and_keeps_states_it_does_not_name() -> None:
    store = InProcessMemory()
    assert store.read(0, "ewc") == {}
    assert store.write("a", 0, {"ewc": {"x": 1}}, {}) == 1
    assert store.write("b", 1, {"replay": {"y": 2}}, {}) == 2
    assert store.read(2, "ewc") == {"x": 1}
    assert store.read(1, "replay") == {}


def test_a_repeated_operation_returns_its_version_and_changes_nothing() -> None:
    store = InProcessMemory()
    store.write("a", 0, {"ewc": {"x": 1}}, {})
    assert store.write("a", 0, {"ewc": {"x": 99}}, {}) == 1
    assert store.newest == 1
    assert store.read(1, "ewc") == {"x": 1}


def test_a_write_based_on_an_old_version_is_stale() -> None:
    store = InProcessMemory()
    store.write("a", 0, {}, {})
    with pytest.raises(StaleVersionError, match="version 1, write 'b' is based on 0"):
        store.write("b", 0, {}, {})


def test_the_last_two_versions_stay_readable_and_an_older_one_is_gone() -> None:
    store = InProcessMemory()
    for i in range(3):
        store.write(f"op{i}", i, {"ewc": {"x": i}}, {"replay": {f"r{i}": {"text": i}}})
    assert [store.read(v, "ewc") for v in (2, 3)] == [{"x": 1}, {"x": 2}]
    assert store.rows(2, ["r1"]) == [{"text": 1}]
    with pytest.raises(StateError, match=r"version 1 is gone; readable: \[2, 3\]"):
        store.read(1, "ewc")
    with pytest.raises(StateError, match="no row 'r0'"):
        store.rows(3, ["r0"])
    with pytest.raises(StateError, match="no row 'r0'"):
        store.replace_row("r0", {})


def test_a_row_may_come_by_reference_and_an_unloadable_one_is_refused() -> None:
    store = InProcessMemory(load_row=lambda ref: {"loaded": ref})
    store.write("a", 0, {}, {"replay": {"r0": {}, "r1": {"given": 1}}})
    assert store.rows(1, ["r1", "r0"]) == [{"given": 1}, {"loaded": "r0"}]
    with pytest.raises(StateError, match="'r0' was given by reference"):
        InProcessMemory().write("a", 0, {}, {"replay": {"r0": {}}})


def test_states_are_copies_with_read_only_arrays() -> None:
    weights = torch.ones(2)
    store = InProcessMemory()
    store.write("a", 0, {"ewc": {"w": weights, "n": np.float32(2), "names": ("a", "b")}}, {})
    weights.zero_()
    state = store.read(1, "ewc")
    assert state["w"].tolist() == [1, 1]
    assert state["names"] == ["a", "b"]
    with pytest.raises(ValueError, match="read-only"):
        state["w"][0] = 5


def test_a_snapshot_restores_version_states_rows_and_operations(tmp_path: Path) -> None:
    store = InProcessMemory(load_row=lambda ref: {"text": ref}, generation="g1")
    store.write(
        "a", 0, {"ewc": {"w": torch.arange(3.0), "deep": {"list": [1, None, "x"]}}}, {"replay": {"r": {}}}
    )
    digest = store.snapshot(1, tmp_path)
    other = InProcessMemory(load_row=lambda ref: {"text": ref}, generation="g1")
    assert other.restore(tmp_path) == 1
    assert other.read(1, "ewc")["w"].tolist() == [0, 1, 2]
    assert other.read(1, "ewc")["deep"] == {"list": [1, None, "x"]}
    assert other.rows(1, ["r"]) == [{"text": "r"}]
    assert other.write("a", 0, {}, {}) == 1
    assert other.write("b", 1, {}, {}) == 2
    assert store.snapshot(1, tmp_path / "again") == digest
    with pytest.raises(ValueError, match="read-only"):
        other.read(1, "ewc")["w"][0] = 5


def test_a_session_stages_and_commits_everything_at_once() -> None:
    session = new_session(op_id="run/t0")
    session.stage("ewc", {"x": 1})
    session.stage("replay", {"refs": ["r"]}, rows={"r": {"text": "hello"}})
    assert session.read("ewc") == {}
    assert session.commit() == 1
    following = session.next_task(op_id="run/t1")
    assert following.read("ewc") == {"x": 1}
    assert following.examples(["r"]) == [{"text": "hello"}]


def test_a_replaced_row_is_what_the_session_trains_on() -> None:
    store = InProcessMemory()
    store.write("a", 0, {}, {"replay": {"r": {"text": "old"}}})
    session = MemorySession(store, version=1, op_id="b", encode=lambda row, ref: (ref, row["text"]))
    assert session.examples(["r"]) == [("r", "old")]
    store.replace_row("r", {"text": "new"})
    assert session.examples(["r"]) == [("r", "new")]


VALUES = {
    "tensor": torch.arange(6.0).reshape(2, 3).t(),  # not contiguous
    "scalar_tensor": torch.tensor(3),
    "array": np.arange(3, dtype=np.int64),
    "numpy_number": np.float64(0.5),
    "nested": {"a": [1, 2.5, None, True, "x"], "b": (torch.zeros(0),)},
    "empty": {},
}


def test_every_allowed_value_survives_a_save_and_a_load(tmp_path: Path) -> None:
    save_state(tmp_path, "s", VALUES, generation="g")
    for loaded in (load_state(tmp_path, "s", generation="g"), as_arrays(VALUES)):
        np.testing.assert_array_equal(loaded["tensor"], [[0, 3], [1, 4], [2, 5]])
        assert loaded["scalar_tensor"].shape == ()
        assert loaded["array"].dtype == np.int64
        assert loaded["numpy_number"] == 0.5
        assert loaded["nested"]["a"] == [1, 2.5, None, True, "x"]
        assert loaded["nested"]["b"][0].shape == (0,)
        assert loaded["empty"] == {}


@pytest.mark.parametrize(
    ("state", "said"),
    [({"a": {1: 2}}, "keys must be strings, got 1 at /a"), ({"f": print}, "cannot store a")],
)
def test_a_value_that_cannot_be_stored_is_named(tmp_path: Path, state: dict[str, Any], said: str) -> None:
    with pytest.raises(StateError, match=said):
        save_state(tmp_path, "s", state, generation="g")


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    save_state(tmp_path, "s", VALUES, generation="g")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.json", "s.safetensors"]
    json.loads((tmp_path / "s.json").read_text())


def test_damaged_missing_foreign_and_future_files_are_refused(tmp_path: Path) -> None:
    save_state(tmp_path, "s", VALUES, generation="g")
    with pytest.raises(StateError, match="belongs to adapter generation 'g', not to 'other'"):
        load_state(tmp_path, "s", generation="other")
    with pytest.raises(StateError, match="no readable state 'absent'"):
        load_state(tmp_path, "absent", generation="g")
    arrays, header = tmp_path / "s.safetensors", tmp_path / "s.json"
    good_arrays, good_header = arrays.read_bytes(), header.read_text()
    arrays.write_bytes(good_arrays[:-1] + bytes([good_arrays[-1] ^ 1]))
    with pytest.raises(StateError, match="damaged"):
        load_state(tmp_path, "s", generation="g")
    arrays.write_bytes(good_arrays)
    header.write_text(json.dumps({**json.loads(good_header), "schema_version": 99}))
    with pytest.raises(StateError, match="schema 99, this version reads 1"):
        load_state(tmp_path, "s", generation="g")
    for text in (good_header[: len(good_header) // 2], "[]", '{"schema_version": 1}'):
        header.write_text(text)
        with pytest.raises(StateError):
            load_state(tmp_path, "s", generation="g")


def test_the_digest_covers_structure_and_arrays(tmp_path: Path) -> None:
    digests = {
        save_state(tmp_path, "s", state, generation=generation)
        for state, generation in [
            ({"a": torch.zeros(2)}, "g"),
            ({"a": torch.ones(2)}, "g"),
            ({"b": torch.zeros(2)}, "g"),
            ({"a": torch.zeros(2)}, "h"),
        ]
    }
    assert len(digests) == 4
