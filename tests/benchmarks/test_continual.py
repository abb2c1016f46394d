"""The continual benchmark on a tiny model: fair rows, stored runs, one table."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from benchmarks import continual
from benchmarks.arms import Arm
from benchmarks.clbench import TaskRows, read_task, shorten, split_rows
from benchmarks.continual import run_all, table
from benchmarks.continual_runs import Run, Setup, result_of
from clcore.engine.errors import DataError
from service.specs import LoraSpec, TrainingSpec
from tests.clcore.tiny import tiny_llama, tiny_rows, tiny_tokenizer

RATE = 1e-3


class Tiny:
    """A setup over a tiny model that counts how often it is loaded."""

    def __init__(self, steps: int = 2) -> None:
        self.num_loads = 0
        tasks = [
            TaskRows(name, tiny_rows(8, shift), tiny_rows(3, shift), tiny_rows(4, shift))
            for name, shift in (("one", 1), ("two", 2))
        ]
        self.setup = Setup(1, tasks, steps, 32, "tiny", self.load, LoraSpec(), TrainingSpec())

    def load(self) -> tuple[nn.Module, Any]:
        self.num_loads += 1
        return tiny_llama(0), tiny_tokenizer()


def numbered(count: int, prefix: str) -> list[dict[str, str]]:
    return [{"prompt": f"{prefix}{i}", "completion": str(i)} for i in range(count)]


def prompts(rows: Any) -> set[str]:
    return {row["prompt"] for row in rows}


def test_a_run_is_stored_and_not_repeated(tmp_path: Path) -> None:
    tiny, run = Tiny(), Run("ewc", Arm("ewc"), RATE)
    first = result_of(run, tiny.setup, tmp_path)
    assert tiny.num_loads == 1
    assert result_of(run, tiny.setup, tmp_path) == first
    assert tiny.num_loads == 1
    assert [file.name for file in tmp_path.iterdir()] == ["stage1-ewc.json"]
    assert [[len(rows) for rows in row] for row in first["answers"]] == [[4, 4], [4, 4]]
    assert first["matrix"][1] == [sum(rows) / 4 for rows in first["answers"][1]]


@pytest.mark.parametrize(
    "change",
    [
        lambda setup, run: (dataclasses.replace(setup, steps=3), run),
        lambda setup, run: (dataclasses.replace(setup, model_name="other"), run),
        lambda setup, run: (dataclasses.replace(setup, training=TrainingSpec(seed=1)), run),
        lambda setup, run: (dataclasses.replace(setup, tasks=setup.tasks[::-1]), run),
        lambda setup, run: (setup, dataclasses.replace(run, arm=Arm("ewc", {"ewc_lambda": 3.0}))),
        lambda setup, run: (setup, dataclasses.replace(run, learning_rate=1e-4)),
    ],
    ids=["steps", "model", "seed", "order", "parameter", "rate"],
)
def test_a_run_with_other_settings_is_repeated(tmp_path: Path, change: Any) -> None:
    tiny, run = Tiny(steps=1), Run("ewc", Arm("ewc"), RATE)
    result_of(run, tiny.setup, tmp_path)
    setup, run = change(tiny.setup, run)
    result = result_of(run, setup, tmp_path)
    assert tiny.num_loads == 2
    stored = json.loads((tmp_path / "stage1-ewc.json").read_text())
    assert stored["settings_hash"] == result["settings_hash"]


def test_an_interrupted_benchmark_goes_on_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = Tiny(steps=1)
    real = result_of

    def fail_at_ewc(run: Run, setup: Setup, folder: Path) -> Mapping[str, Any]:
        if run.name == "ewc":
            raise KeyboardInterrupt
        return real(run, setup, folder)

    monkeypatch.setattr(continual, "result_of", fail_at_ewc)
    with pytest.raises(KeyboardInterrupt):
        run_all(tiny.setup, [Arm("none"), Arm("ewc")], tmp_path)
    assert tiny.num_loads == 5  # the base, three rates and multi-task training
    monkeypatch.setattr(continual, "result_of", real)
    rows, targets = run_all(tiny.setup, [Arm("none"), Arm("ewc")], tmp_path)
    assert tiny.num_loads == 6
    names = ["base", "none-0.0003", "none-0.001", "none-0.003", "multitask", "ewc"]
    assert [row["run"] for row in rows] == names  # "none" is none-0.001: the job's default rate
    assert [t["what"].split(":")[0] for t in targets] == ["ewc"]
    assert len(table(rows).splitlines()) == 2 + len(names)


def test_the_rate_of_plain_training_is_chosen_by_development_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On test rows 3e-3 is best, on development rows 1e-3 is.
    test = {"none-0.0003": 0, "none-0.001": 0, "none-0.003": 1}
    dev = {"none-0.0003": 0.2, "none-0.001": 0.6, "none-0.003": 0.4}

    def stored(run: Run, setup: Setup, folder: Path) -> Mapping[str, Any]:  # noqa: ARG001
        score = test.get(run.name, 0)
        answers = [[[score] * 4, [0] * 4], [[score] * 4, [score] * 4]]
        matrix = [[float(score), 0.0], [float(score)] * 2]
        found = {"run": run.name, "answers": answers, "matrix": matrix, "seconds": 1.0, "settings_hash": ""}
        return {**found, "dev": [dev[run.name]] * 2} if run.has_dev_scores else found

    monkeypatch.setattr(continual, "result_of", stored)
    rows, targets = run_all(Tiny().setup, [Arm("ewc")], tmp_path)
    assert [row["run"] for row in rows if row.get("is_tuned_none")] == ["none-0.001"]
    by_name = {row["run"]: row for row in rows}
    assert (by_name["none-0.003"]["difference"], by_name["none-0.003"]["wins"]) == (1.0, True)
    assert (by_name["ewc"]["difference"], by_name["ewc"]["loses"]) == (0.0, False)
    assert [t["ok"] for t in targets] == [True]


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([1] * 50 + [0] * 50, [0] * 50 + [1] * 50, (False, False)),
        ([0] * 100, [1] * 50 + [0] * 50, (True, False)),
        ([1] * 50 + [0] * 50, [0] * 100, (False, True)),
    ],
    ids=["open", "loses", "wins"],
)
def test_a_verdict_needs_an_interval_beside_0_at_the_end_of_the_sequence(
    ours: list[int], theirs: list[int], verdict: tuple[bool, bool]
) -> None:
    def result(final: list[int]) -> dict[str, Any]:
        early = [1 - score for score in final]  # says the opposite
        answers = [[early, early], [final, final]]
        matrix = [[sum(rows) / len(rows) for rows in row] for row in answers]
        return {"run": "x", "answers": answers, "matrix": matrix, "seconds": 1.0, "settings_hash": ""}

    found = continual.summary(result(ours), {"matrix": [[0.0, 0.0]]}, result(theirs))
    assert (found["loses"], found["wins"]) == verdict
    assert found["difference_low"] <= found["difference"] <= found["difference_high"]


def test_multitask_training_sees_all_rows_once_and_knows_no_forgetting(tmp_path: Path) -> None:
    run = Run("multitask", Arm("none"), RATE, is_multitask=True)
    result = result_of(run, Tiny().setup, tmp_path)
    assert [task["task"] for task in result["tasks"]] == ["one+two"]
    assert len(result["matrix"]) == 1
    summary = continual.summary(result, {"matrix": [[0.0, 0.0]]}, result)
    assert summary["forgetting"] is None
    assert summary["learning_accuracy"] is None  # one row says nothing about the moment each task was learnt
    assert summary["average_accuracy"] == pytest.approx(sum(result["matrix"][0]) / 2)


def test_rows_of_a_task_never_share_a_prompt() -> None:
    train = [*numbered(20, "a"), *numbered(5, "b"), *numbered(5, "a")]
    task = split_rows(
        "t", train, [*numbered(5, "b"), *numbered(5, "c")], num_train=15, num_dev=4, num_test=8, seed=0
    )
    parts = [prompts(task.train), prompts(task.dev), prompts(task.test)]
    assert [len(part) for part in parts] == [15, 4, 8]
    assert len(set.union(*parts)) == 27


def test_more_training_rows_leave_the_others_as_they_are() -> None:
    small, large = (
        split_rows("t", numbered(50, "a"), numbered(20, "c"), num_train=n, num_dev=5, num_test=8, seed=0)
        for n in (10, 30)
    )
    assert (small.dev, small.test) == (large.dev, large.test)
    assert small.train == large.train[:10]
    other = split_rows("t", numbered(50, "a"), numbered(20, "c"), num_train=10, num_dev=5, num_test=8, seed=1)
    assert other.test != small.test


def test_too_few_rows_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="task 't' has 3 training rows, 4 are asked for"):
        split_rows("t", numbered(5, "a"), numbered(2, "c"), num_train=4, num_dev=2, num_test=2, seed=0)
    with pytest.raises(DataError, match=r"task 'x' has no .*train.jsonl"):
        read_task(tmp_path, "x", num_train=1, num_dev=1, num_test=1, seed=0)


def test_a_shortened_prompt_keeps_its_question_and_its_tail() -> None:
    tokenizer = tiny_tokenizer()
    row = {"prompt": f"which one?\n\n{'ab ' * 40}\n\nAnswer:", "completion": " x"}
    short = shorten(row, tokenizer, 30)
    assert short["prompt"].startswith("which one?\n\nab ab")
    assert short["prompt"].endswith("\n\nAnswer:")
    assert 29 <= len(tokenizer(short["prompt"])["input_ids"]) <= 30
    assert short["completion"] == " x"
    assert shorten(row, tokenizer, 1000) == row
    with pytest.raises(DataError, match="the question alone has more than 10 tokens"):
        shorten(row, tokenizer, 10)


def test_an_unknown_stage_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["continual", "--stage", "7", "--json", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit):
        continual.main()
    assert "there is no stage 7; stages: 1" in capsys.readouterr().err
