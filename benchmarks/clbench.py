"""Rows of the continual benchmark: which are trained on, which choose a learning rate, which are scored."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clcore.engine.errors import DataError
from clcore.engine.tasks import derive_seed

Row = Mapping[str, Any]
ANSWER = "\n\nAnswer:"


@dataclasses.dataclass(frozen=True)
class TaskRows:
    """One task; no prompt stands in two of the lists."""

    name: str
    train: Sequence[Row]
    dev: Sequence[Row]
    """Cut from the training file: choosing anything on test rows is tuning on the test."""
    test: Sequence[Row]

    def sha256(self) -> str:
        """Name the rows, for the settings of a result."""
        return hashlib.sha256(json.dumps([self.train, self.dev, self.test]).encode()).hexdigest()


def read_task(folder: Path, name: str, *, num_train: int, num_dev: int, num_test: int, seed: int) -> TaskRows:
    """Read <folder>/<name>/train.jsonl and test.jsonl and draw rows by seed.

    Raises DataError for a missing file or too few rows.
    """
    files = {part: folder / name / f"{part}.jsonl" for part in ("train", "test")}
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        raise DataError(f"task {name!r} has no {missing[0]}")
    rows = {
        part: [json.loads(line) for line in file.read_text().splitlines()] for part, file in files.items()
    }
    return split_rows(
        name, rows["train"], rows["test"], num_train=num_train, num_dev=num_dev, num_test=num_test, seed=seed
    )


def split_rows(
    name: str,
    train: Sequence[Row],
    test: Sequence[Row],
    *,
    num_train: int,
    num_dev: int,
    num_test: int,
    seed: int,
) -> TaskRows:
    """Shuffle by seed and take test rows first, then dev and training rows with other prompts.

    More training or development rows never change which test rows are drawn. Raises DataError for too few.
    """
    taken: set[str] = set()

    def take(rows: list[Row], count: int, part: str) -> list[Row]:
        chosen: list[Row] = []
        while rows and len(chosen) < count:
            row = rows.pop()
            if row["prompt"] not in taken:
                taken.add(row["prompt"])
                chosen.append(row)
        if len(chosen) < count:
            raise DataError(f"task {name!r} has {len(chosen)} {part} rows, {count} are asked for")
        return chosen

    shuffled_test, shuffled_train = list(test), list(train)
    random.Random(derive_seed(seed, name, "test")).shuffle(shuffled_test)
    random.Random(derive_seed(seed, name, "train")).shuffle(shuffled_train)
    test_rows = take(shuffled_test, num_test, "test")
    dev_rows = take(shuffled_train, num_dev, "development")
    return TaskRows(name, take(shuffled_train, num_train, "training"), dev_rows, test_rows)


def shorten(row: Row, tokenizer: Any, max_prompt_tokens: int) -> dict[str, Any]:
    """Cut the end of the text between the question and "Answer:" so that the prompt fits.

    The loop's own cut takes a prompt's middle, which here is half of the question. Raises DataError when the
    prompt is too long without any text.
    """

    def num_tokens(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    prompt = row["prompt"]
    if num_tokens(prompt) <= max_prompt_tokens:
        return dict(row)
    question, _, text = prompt.removesuffix(ANSWER).partition("\n\n")
    words = text.split(" ")
    fits, too_many = 0, len(words)
    while too_many - fits > 1:  # more words never have fewer tokens
        middle = (fits + too_many) // 2
        if num_tokens(_prompt(question, words[:middle])) <= max_prompt_tokens:
            fits = middle
        else:
            too_many = middle
    shorter = _prompt(question, words[:fits])
    if num_tokens(shorter) > max_prompt_tokens:
        raise DataError(f"the question alone has more than {max_prompt_tokens} tokens: {question[:60]!r}")
    return {**row, "prompt": shorter}


def _prompt(question: str, words: Sequence[str]) -> str:
    return f"{question}\n\n{' '.join(words)}{ANSWER}"
