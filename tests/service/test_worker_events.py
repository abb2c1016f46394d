"""Events of workers in storage: in order and without a gap, whatever storage does."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.adapters.storage import Storage, StorageError, events_key
from service.jobs.events import read_worker_events
from service.workers import events
from service.workers.events import EventWriter


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Empty storage."""
    return Storage(f"file://{tmp_path}/storage")


class FailingStorage(Storage):
    """Storage that writes but does not say so, or does not write, while it is told to fail."""

    fails: str | None = None

    def without_patience(self) -> FailingStorage:
        return self

    def write_bytes(self, key: str, data: bytes) -> None:
        if self.fails != "before":
            super().write_bytes(key, data)
        if self.fails:
            raise StorageError("the store does not answer")


@pytest.mark.parametrize("fails", ["before", "after"])
def test_events_that_storage_does_not_take_are_written_later_in_order(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "RETRY_EVERY_S", 0.0)
    storage = FailingStorage(f"file://{tmp_path}")
    writer = EventWriter(storage, "run_e", 1)
    writer.emit("step", number=1)
    storage.fails = fails
    for number in (2, 3, 4):
        writer.emit("step", number=number)
    segments = storage.names(events_key("run_e", 1))
    seen = [event.data["number"] for event in read_worker_events(storage, "run_e", 1, 0)]
    with pytest.raises(StorageError, match="does not answer"):
        writer.flush()
    storage.fails = None
    writer.emit("step", number=5)
    found = read_worker_events(storage, "run_e", 1, 0)
    assert [(event.seq, event.data["number"]) for event in found] == [(n, n) for n in range(1, 6)]
    # What a reader may have taken is not written over by something longer.
    assert storage.names(events_key("run_e", 1))[: len(segments)] == segments
    assert [event.data["number"] for event in found][: len(seen)] == seen
    later = read_worker_events(storage, "run_e", 1, seen[-1])
    assert [event.seq for event in later] == list(range(seen[-1] + 1, 6))


@pytest.mark.parametrize("kept_bytes", [0, 30, 150])
def test_a_worker_that_finds_a_torn_segment_goes_on_without_a_gap(kept_bytes: int, storage: Storage) -> None:
    writer = EventWriter(storage, "run_e", 1)
    writer.emit("step", number=1)
    writer.emit("step", flush=False, number=2)
    writer.emit("step", number=3)
    torn = f"{events_key('run_e', 1)}/000000000002.jsonl"
    whole = storage.read_bytes(torn)
    assert len(whole.splitlines()[0]) < 150 < len(whole)
    storage.write_bytes(torn, whole[:kept_bytes])
    EventWriter(storage, "run_e", 1).emit("run.started", number=9)
    found = read_worker_events(storage, "run_e", 1, 0)
    assert [event.seq for event in found] == list(range(1, len(found) + 1))
    assert (found[0].data, found[-1].data) == ({"number": 1}, {"number": 9})


def test_a_writer_knows_whether_a_worker_wrote_before_it(storage: Storage) -> None:
    first = EventWriter(storage, "run_e", 1)
    assert not first.is_continued
    first.emit("run.started")
    assert EventWriter(storage, "run_e", 1).is_continued
    assert not EventWriter(storage, "run_e", 2).is_continued
