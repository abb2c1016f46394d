"""Stored outputs: nothing is computed twice, and nothing that does not belong is used."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from clcore.engine.errors import ConfigError, StateError
from clcore.evaluation import Evaluation, LocalStore, Stored, output_key
from tests.clcore import output_runs
from tests.clcore.output_runs import KEY, NUM_ROWS, run

ROOT = Path(__file__).parents[2]
FAMILIES = ["exact_match", "likelihood", "perplexity"]


class Stop(Exception):
    """The interruption of a test."""


def same(left: Evaluation, right: Evaluation) -> bool:
    """Equal rows; likelihoods as far as rounding goes, since other rows may stand in a batch."""
    pairs = list(zip(left.rows, right.rows, strict=True))
    return all(
        (a.row, a.answer, a.reference, a.num_tokens) == (b.row, b.answer, b.reference, b.num_tokens)
        and a.score == pytest.approx(b.score, rel=1e-5)
        and (a.nll is None or a.nll == pytest.approx(b.nll, rel=1e-5))
        for a, b in pairs
    )


def stored_rows(folder: Path) -> list[int]:
    files = sorted((folder / KEY).glob("*.json"))
    return [row for file in files for row, _, _ in json.loads(file.read_bytes())["rows"]]


@pytest.mark.parametrize("metric", FAMILIES)
def test_an_evaluation_interrupted_after_any_batch_goes_on_without_computing_a_row_again(
    metric: str, tmp_path: Path
) -> None:
    whole, _ = run(tmp_path / "whole", metric)
    done: list[int] = []
    run(tmp_path / "count", metric, on_batch=done.append)
    assert len(done) >= NUM_ROWS / 2
    for stop in range(len(done)):
        folder = tmp_path / str(stop)

        def interrupt(rows: int, stop: int = stop) -> None:
            if rows == done[stop]:
                raise Stop

        with pytest.raises(Stop):
            run(folder, metric, on_batch=interrupt)
        kept = stored_rows(folder)
        assert len(kept) == done[stop]
        reported: list[int] = []
        resumed, passes = run(folder, metric, on_batch=reported.append)
        assert same(resumed, whole)
        assert reported[0] == done[stop]
        assert sorted(stored_rows(folder)) == sorted(row.row for row in whole.rows)  # each row once
        assert (passes == []) == (len(kept) == NUM_ROWS)


@pytest.mark.parametrize("metric", FAMILIES)
def test_an_evaluation_interrupted_at_every_batch_in_turn_computes_each_row_once(
    metric: str, tmp_path: Path
) -> None:
    def interrupt(_: int) -> None:
        raise Stop

    whole, _ = run(tmp_path / "whole", metric)
    attempts = 0
    while len(stored_rows(tmp_path / "parts")) < NUM_ROWS:
        before = len(stored_rows(tmp_path / "parts"))
        reported: list[int] = []

        def stop_when_new(rows: int, before: int = before, reported: list[int] = reported) -> None:
            reported.append(rows)
            if rows > before:
                raise Stop

        with pytest.raises(Stop):
            run(tmp_path / "parts", metric, on_batch=stop_when_new)
        attempts += 1
    assert attempts >= NUM_ROWS / 2
    found, passes = run(tmp_path / "parts", metric)
    assert passes == []
    assert same(found, whole)
    assert sorted(stored_rows(tmp_path / "parts")) == sorted(row.row for row in whole.rows)


def test_a_killed_process_leaves_its_batches_and_the_next_one_computes_the_others_only(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "tests.clcore.output_runs", str(tmp_path), "3"]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=240)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    kept = stored_rows(tmp_path)
    assert 3 <= len(kept) < NUM_ROWS
    found, passes = run(tmp_path, "exact_match")
    computed = [row for row in stored_rows(tmp_path) if row not in kept]
    assert len(computed) == NUM_ROWS - len(kept)
    assert passes[0] == 1  # the shared beginning
    assert max(passes) <= 2
    whole, all_passes = run(tmp_path / "whole", "exact_match")
    assert same(found, whole)
    assert sum(passes) < sum(all_passes)


def test_metrics_of_answers_share_what_was_answered_and_a_finished_evaluation_needs_no_pass(
    tmp_path: Path,
) -> None:
    first, passes = run(tmp_path, "exact_match")
    assert passes
    for metric in ("token_f1", "rouge_l", "exact_match"):
        found, passes = run(tmp_path, metric)
        assert passes == []
        assert [row.answer for row in found.rows] == [row.answer for row in first.rows]
        fresh, _ = run(tmp_path / "fresh" / metric, metric)
        assert found == fresh


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_segment_that_is_not_whole_is_computed_again(damage: str, tmp_path: Path) -> None:
    whole, _ = run(tmp_path, "exact_match")
    victim = sorted((tmp_path / KEY).glob("*.json"))[0]
    data = victim.read_bytes()
    lost = [row for row, _, _ in json.loads(data)["rows"]]
    victim.write_bytes(
        {
            "cut": data[: len(data) // 2],
            "changed": data.replace(b'"answer": "', b'"answer": "x'),
            "empty": b"",
        }[damage]
    )
    found, passes = run(tmp_path, "exact_match")
    assert found == whole
    assert passes
    assert max(passes) <= len(lost)
    _, passes = run(tmp_path, "exact_match")
    assert passes == []


def test_a_file_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write(KEY, "b.json", b"1")
    (tmp_path / KEY / ".c.json.1.tmp").write_bytes(b"half")
    assert store.names(KEY) == ["b.json"]
    assert store.names("c" * 64) == []
    assert store.read(KEY, "b.json") == b"1"


def test_outputs_under_other_settings_another_key_or_of_other_rows_are_refused(tmp_path: Path) -> None:
    run(tmp_path, "exact_match")
    with pytest.raises(StateError, match=r"settings is .*'max_new_tokens': 4.*, not .*'max_new_tokens': 7"):
        run(tmp_path, "exact_match", max_new_tokens=7)
    with pytest.raises(StateError, match="settings is"):
        run(tmp_path, "perplexity")
    with pytest.raises(StateError, match=r"row \d+ has other tokens now"):
        run(tmp_path, "exact_match", max_length=8)
    other = "b" * 64
    (tmp_path / KEY).rename(tmp_path / other)
    with pytest.raises(StateError, match="key is"):
        run(tmp_path, "exact_match", stored=Stored(LocalStore(tmp_path), other))


def test_rows_outside_the_call_do_not_count(tmp_path: Path) -> None:
    run(tmp_path, "exact_match", rank=0, world_size=2)
    found, passes = run(tmp_path, "exact_match", rank=1, world_size=2)
    assert passes
    assert len(found.rows) == NUM_ROWS // 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Evaluation]]]:
    """Two processes with half of the rows each; what every metric found on both."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(output_runs.rank_main, args=(port, str(folder)), nprocs=2)
    return folder, torch.load(folder / "parts.pt", weights_only=False)


@pytest.mark.parametrize("metric", ["rouge_l", "likelihood", "perplexity"])
def test_two_ranks_merged_are_one_process_and_one_process_reuses_what_two_ranks_stored(
    metric: str, ranks: Any, tmp_path: Path
) -> None:
    folder, parts = ranks
    assert [part.num_rows for part in parts[metric]] == [(NUM_ROWS + 1) // 2, NUM_ROWS // 2]
    merged = Evaluation.merge(parts[metric])
    alone, _ = run(tmp_path, metric)
    assert same(merged, Evaluation.merge([alone]))
    assert merged.score == pytest.approx(alone.score, rel=1e-5)
    assert merged.interval() == pytest.approx(Evaluation.merge([alone]).interval(), rel=1e-5)
    again, passes = run(folder / metric, metric, batch_size=5)
    assert passes == []
    assert Evaluation.merge([again]) == merged


def test_the_key_changes_with_everything_that_outputs_depend_on_and_with_nothing_else() -> None:
    given: dict[str, Any] = {
        "base_model": "m",
        "revision": "1",
        "precision": "bf16",
        "adapter_sha256": "a",
        "dataset_sha256": "d",
        "template": "t",
        "metric": "exact_match",
        "decoding": {"max_new_tokens": 4, "max_length": 64},
    }
    key = output_key(**given)
    changes = {name: "other" for name in given if name not in ("metric", "decoding")}
    changes |= {"metric": "perplexity", "decoding": {"max_new_tokens": 5, "max_length": 64}}
    others = [output_key(**{**given, name: value}) for name, value in changes.items()]
    others.append(output_key(**{**given, "adapter_sha256": None}))
    assert len({key, *others}) == len(others) + 1
    for metric in ("token_f1", "rouge_l", lambda *_: 1.0):
        assert output_key(**{**given, "metric": metric}) == key
    assert output_key(**{**given, "decoding": {"max_length": 64, "max_new_tokens": 4}}) == key
    Stored(LocalStore(Path()), key)
    with pytest.raises(ConfigError, match=r"64 hex digits, .* got '\.\./x'"):
        Stored(LocalStore(Path()), "../x")
