"""What was answered is never answered again: after an error, a kill, by other processes or another metric."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from clcore.engine.errors import ConfigError, StateError
from clcore.evaluation import Evaluation, LocalStore, Stored, evaluate, output_key
from tests.clcore.eval_models import MAX_LENGTH, count_passes, loud_llama, mixed_rows
from tests.clcore.tiny import tiny_tokenizer

KEY = "a" * 64
PARTS: dict[str, Any] = {
    "base_model": "tiny",
    "revision": "1",
    "precision": "fp32",
    "adapter_sha256": "b" * 64,
    "dataset_sha256": "c" * 64,
    "template": "",
    "metric": "exact_match",
    "decoding": {"max_new_tokens": 3},
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token per character."""
    return tiny_tokenizer()


def stored(folder: Path) -> Stored:
    """Outputs in a folder."""
    return Stored(LocalStore(folder), KEY)


def rows_on_disk(folder: Path) -> list[int]:
    """Every row of every segment: one that was computed twice stands twice."""
    segments = [json.loads(path.read_text()) for path in (folder / KEY).glob("*.json")]
    return [row for segment in segments for row, _, _ in segment["rows"]]


class Stop(Exception):
    """What cuts an evaluation."""


@pytest.mark.parametrize("metric", ["exact_match", "likelihood", "perplexity"])
def test_cut_after_any_batch_it_goes_on_with_the_rows_that_are_left(
    metric: str, tokenizer: Any, tmp_path: Path
) -> None:
    model, rows = loud_llama(), mixed_rows()
    labels = sorted({row["completion"] for _, row in rows})
    common: dict[str, Any] = {
        "max_length": MAX_LENGTH,
        "batch_size": 3,
        "max_new_tokens": 4,
        "labels": labels,
    }
    straight = evaluate(model, tokenizer, rows, metric, **common)
    seen: list[int] = []
    evaluate(model, tokenizer, rows, metric, on_batch=seen.append, **common)
    assert len(seen) >= 3
    for cut in seen[:-1]:
        folder = tmp_path / str(cut)

        def stop_at(done: int, cut: int = cut) -> None:
            if done == cut:
                raise Stop

        with pytest.raises(Stop):
            evaluate(model, tokenizer, rows, metric, stored=stored(folder), on_batch=stop_at, **common)
        assert len(rows_on_disk(folder)) == cut
        again = evaluate(model, tokenizer, rows, metric, stored=stored(folder), **common)
        assert again == straight
        assert sorted(rows_on_disk(folder)) == sorted(number for number, _ in rows)


def test_a_second_evaluation_makes_no_pass_and_other_metrics_of_answers_share_it(
    tokenizer: Any, tmp_path: Path
) -> None:
    model, rows = loud_llama(), mixed_rows()
    first = evaluate(model, tokenizer, rows, "exact_match", max_length=MAX_LENGTH, stored=stored(tmp_path))
    passes = count_passes(model)
    again = evaluate(model, tokenizer, rows, "exact_match", max_length=MAX_LENGTH, stored=stored(tmp_path))
    f1 = evaluate(model, tokenizer, rows, "token_f1", max_length=MAX_LENGTH, stored=stored(tmp_path))
    assert passes == []
    assert again == first
    assert [row.answer for row in f1.rows] == [row.answer for row in first.rows]


def test_processes_that_split_the_rows_otherwise_use_what_others_stored(
    tokenizer: Any, tmp_path: Path
) -> None:
    model, rows = loud_llama(), mixed_rows()
    common: dict[str, Any] = {"max_length": MAX_LENGTH, "max_new_tokens": 4, "stored": stored(tmp_path)}
    halves = [evaluate(model, tokenizer, rows[rank::2], "exact_match", **common) for rank in (0, 1)]
    passes = count_passes(model)
    thirds = [evaluate(model, tokenizer, rows[rank::3], "exact_match", **common) for rank in (0, 1, 2)]
    assert passes == []
    assert Evaluation.merge(thirds) == Evaluation.merge(halves)


KILLED = """
import sys
from pathlib import Path
import torch
from tests.clcore.eval_models import MAX_LENGTH, loud_llama, mixed_rows
from tests.clcore.test_output_cache import stored
from tests.clcore.tiny import tiny_tokenizer
from clcore.evaluation import evaluate
torch.set_num_threads(1)
def say(done):
    sys.stdout.write(f"{done}\\n")
    sys.stdout.flush()
    sys.stdin.readline()  # the test decides when it goes on
evaluate(loud_llama(), tiny_tokenizer(), mixed_rows(), "exact_match", max_length=MAX_LENGTH, batch_size=3,
         max_new_tokens=4, stored=stored(Path(sys.argv[1])), on_batch=say)
"""


def test_killed_between_batches_nothing_that_was_answered_is_answered_again(
    tokenizer: Any, tmp_path: Path
) -> None:
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=root,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    process.stdin.write(b"\n")
    process.stdin.flush()
    done = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(rows_on_disk(tmp_path)) == done
    model, rows = loud_llama(), mixed_rows()
    passes = count_passes(model)
    common: dict[str, Any] = {"max_length": MAX_LENGTH, "batch_size": 3, "max_new_tokens": 4}
    resumed = evaluate(model, tokenizer, rows, "exact_match", stored=stored(tmp_path), **common)
    rest = len(passes)
    assert resumed == evaluate(model, tokenizer, rows, "exact_match", **common)
    assert 0 < rest < len(passes) - rest
    assert sorted(rows_on_disk(tmp_path)) == sorted(number for number, _ in rows)


def test_a_torn_segment_is_computed_again_and_a_foreign_one_is_an_error(
    tokenizer: Any, tmp_path: Path
) -> None:
    model, rows = loud_llama(), mixed_rows()
    common: dict[str, Any] = {"max_length": MAX_LENGTH, "batch_size": 3, "max_new_tokens": 4}
    straight = evaluate(model, tokenizer, rows, "exact_match", stored=stored(tmp_path), **common)
    torn = sorted((tmp_path / KEY).glob("*.json"))[0]
    torn.write_bytes(torn.read_bytes()[:-20])
    assert evaluate(model, tokenizer, rows, "exact_match", stored=stored(tmp_path), **common) == straight
    with pytest.raises(StateError, match="settings"):
        evaluate(
            model, tokenizer, rows, "exact_match", stored=stored(tmp_path), **{**common, "max_new_tokens": 3}
        )
    other = [(number, {**row, "prompt": row["prompt"] + " x"}) for number, row in rows]
    with pytest.raises(StateError, match="has other tokens now"):
        evaluate(model, tokenizer, other, "exact_match", stored=stored(tmp_path), **common)


def test_everything_that_changes_outputs_changes_the_key() -> None:
    changes: dict[str, Any] = {
        "base_model": "other",
        "revision": "2",
        "precision": "bf16",
        "adapter_sha256": None,
        "dataset_sha256": "d" * 64,
        "template": "chat",
        "metric": "perplexity",
        "decoding": {"max_new_tokens": 4},
    }
    assert set(changes) == set(PARTS)
    keys = {output_key(**PARTS), *(output_key(**{**PARTS, name: value}) for name, value in changes.items())}
    assert len(keys) == 1 + len(changes)
    assert output_key(**{**PARTS, "metric": "token_f1"}) == output_key(**PARTS)  # the same answers
    with pytest.raises(ConfigError, match="64 hex digits"):
        Stored(LocalStore(Path()), "../etc")


def test_a_local_store_shows_no_half_written_segment(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert store.names(KEY) == []
    store.write(KEY, "x.json", b"1")
    (tmp_path / KEY / f".y.json.{time.time()}.tmp").write_bytes(b"half")
    assert store.names(KEY) == ["x.json"]
    assert store.read(KEY, "x.json") == b"1"
