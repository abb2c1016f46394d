"""The demo's tasks: what they promise to a continual-learning comparison, and folders of tasks."""

from __future__ import annotations

import calendar
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from service.demo_tasks import NUM_EVAL_ROWS, NUM_TRAIN_ROWS, TASK_NAMES, make_task, write_tasks
from service.demo_tasks.folders import DemoError, load_tasks
from service.settings import Settings

MAX_ROW_TOKENS = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's tasks as files."""
    path = tmp_path_factory.mktemp("tasks")
    write_tasks(path)
    return path


def rows_of(folder: Path, task: str, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / task / f"{split}.jsonl").read_text().splitlines()]


def test_three_tasks_of_the_promised_size_in_their_order(folder: Path) -> None:
    tasks = load_tasks(folder)
    assert [task.name for task in tasks] == list(TASK_NAMES)
    assert len(tasks) == 3
    for task in tasks:
        assert task.num_rows == NUM_TRAIN_ROWS >= 600
        assert len(rows_of(folder, task.name, "test")) == NUM_EVAL_ROWS >= 60


def test_no_prompt_appears_twice_over_all_tasks_and_splits(folder: Path) -> None:
    prompts = Counter(
        row["prompt"]
        for task in TASK_NAMES
        for split in ("train", "test")
        for row in rows_of(folder, task, split)
    )
    assert [prompt for prompt, count in prompts.items() if count > 1] == []
    assert len(prompts) == 3 * (NUM_TRAIN_ROWS + NUM_EVAL_ROWS)


def test_all_tasks_ask_alike_and_answer_differently(folder: Path) -> None:
    answers = {}
    for task in TASK_NAMES:
        rows = rows_of(folder, task, "train")
        assert all(row["prompt"].endswith("\nAnswer:") for row in rows)
        assert all(row["completion"].startswith(" ") for row in rows)
        answers[task] = {row["completion"] for row in rows}
    first, second, third = answers.values()
    assert not first & second
    assert not second & third
    assert not first & third


@pytest.mark.parametrize("task", ["departments", "verdicts"])
def test_answers_of_a_choice_are_spread_evenly(folder: Path, task: str) -> None:
    for split in ("train", "test"):
        counts = Counter(row["completion"] for row in rows_of(folder, task, split))
        assert max(counts.values()) <= 1.1 * min(counts.values())


def test_a_date_is_answered_by_its_month_and_day(folder: Path) -> None:
    for row in rows_of(folder, "dates", "train"):
        month, day = (int(part) for part in row["completion"].split("-"))
        assert calendar.month_name[month] in row["prompt"]
        assert str(day) in row["prompt"]


def test_rows_fit_64_tokens_of_the_demo_model(folder: Path) -> None:
    model = Settings().models_dir / "smollm2-135m"
    if not model.is_dir():
        assert "CI" not in os.environ, "continuous integration prepares the model and must run this"
        pytest.skip("smollm2-135m is not prepared here: clpeft model prepare smollm2-135m")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    rows = [row for task in TASK_NAMES for row in rows_of(folder, task, "train")]
    lengths = [len(ids) for ids in tokenizer([r["prompt"] + r["completion"] for r in rows])["input_ids"]]
    assert max(lengths) + 1 <= MAX_ROW_TOKENS  # and the end token


def test_the_same_seed_makes_the_same_bytes_and_another_seed_others(folder: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path / "again")
    write_tasks(tmp_path / "other", seed=8)
    for task in TASK_NAMES:
        first = (folder / task / "train.jsonl").read_bytes()
        assert (tmp_path / "again" / task / "train.jsonl").read_bytes() == first
        assert (tmp_path / "other" / task / "train.jsonl").read_bytes() != first


def test_more_rows_than_the_words_can_make_are_refused() -> None:
    with pytest.raises(ValueError, match="fewer than"):
        make_task("departments", num_train_rows=10**5, num_eval_rows=10, seed=0)


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="unknown demo task 'weather': known are departments, verdicts, dates"
    ):
        make_task("weather", num_train_rows=1, num_eval_rows=1, seed=0)


def test_a_users_folder_is_read_in_name_order_and_names_become_task_names(tmp_path: Path) -> None:
    for name in ("Second Task", "first"):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            (tmp_path / name / f"{split}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n\n')
    assert [(task.name, task.num_rows) for task in load_tasks(tmp_path)] == [("second-task", 1), ("first", 1)]


def test_a_folder_without_tasks_or_with_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="no tasks in"):
        load_tasks(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DemoError, match=r"missing: .*one/test\.jsonl"):
        load_tasks(tmp_path)
    (tmp_path / "one" / "test.jsonl").write_text("")
    (tmp_path / "one" / "train.jsonl").write_text("\n")
    with pytest.raises(DemoError, match=r"no rows in .*train\.jsonl"):
        load_tasks(tmp_path)
