"""The demo's three small text tasks, made from the project's own words: the same rows for the same seed.

    departments   a customer's message -> which department answers it     (choice of five)
    verdicts      a customer's sentence about a product -> good, bad, mixed   (tone)
    dates         a customer's message with a date -> month and day as MM-DD  (reading and rewriting)

All prompts look alike, a short message and "Answer:", and only the tasks' answers differ. So a model that
learns the last task alone answers the first one in the wrong style: that is what a continual-learning
strategy has to prevent.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from service.demo_tasks import words

TASK_NAMES = ("departments", "verdicts", "dates")
NUM_TRAIN_ROWS = 600
NUM_EVAL_ROWS = 90
SEED = 7

Row = dict[str, str]


def write_tasks(
    folder: Path,
    *,
    num_train_rows: int = NUM_TRAIN_ROWS,
    num_eval_rows: int = NUM_EVAL_ROWS,
    seed: int = SEED,
) -> None:
    """Write <task>/train.jsonl and <task>/test.jsonl for the three tasks, and order.txt with their order."""
    for name in TASK_NAMES:
        train, evaluation = make_task(
            name, num_train_rows=num_train_rows, num_eval_rows=num_eval_rows, seed=seed
        )
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file_name, rows in (("train.jsonl", train), ("test.jsonl", evaluation)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name / file_name).write_text(text, encoding="utf-8")
    (folder / "order.txt").write_text("".join(f"{name}\n" for name in TASK_NAMES), encoding="utf-8")


def make_task(
    name: str, *, num_train_rows: int, num_eval_rows: int, seed: int
) -> tuple[list[Row], list[Row]]:
    """Return training and evaluation rows of a task: no prompt twice, answers spread evenly.

    Raises ValueError for an unknown task, or for more rows than the words can make.
    """
    makers: dict[str, Callable[[random.Random], Iterator[tuple[str, str]]]] = {
        "departments": _departments,
        "verdicts": _verdicts,
        "dates": _dates,
    }
    if name not in makers:
        raise ValueError(f"unknown demo task {name!r}: known are {', '.join(TASK_NAMES)}")
    wanted = num_train_rows + num_eval_rows
    rows: list[Row] = []
    seen: set[str] = set()
    repeats = 0
    for raw_text, answer in makers[name](random.Random(f"{seed} {name}")):
        text = raw_text[0].upper() + raw_text[1:]
        if text in seen:
            repeats += 1
            if repeats > 50 * wanted:
                raise ValueError(f"the words of {name!r} make fewer than {wanted} different rows")
            continue
        seen.add(text)
        rows.append({"prompt": f"{text}\nAnswer:", "completion": f" {answer}"})
        if len(rows) == wanted:
            break
    return rows[num_eval_rows:], rows[:num_eval_rows]


def _departments(rng: random.Random) -> Iterator[tuple[str, str]]:
    while True:
        for department, requests in words.DEPARTMENTS.items():
            parts = [rng.choice(words.GREETINGS), rng.choice(requests), rng.choice(words.CLOSINGS)]
            yield _fill(rng, " ".join(part for part in parts if part)), department


def _verdicts(rng: random.Random) -> Iterator[tuple[str, str]]:
    while True:
        good, bad = (rng.sample(phrases, 2) for phrases in (words.PRAISE, words.BLAME))
        for verdict in ("good", "bad", "mixed"):
            first, second = {"good": good, "bad": bad}.get(verdict) or rng.sample([good[0], bad[0]], 2)
            link = ", but it " if verdict == "mixed" else " and it "
            yield _fill(rng, f"{rng.choice(words.OPINIONS)} {first}{link}{second}."), verdict


def _dates(rng: random.Random) -> Iterator[tuple[str, str]]:
    while True:
        month = rng.randrange(12)
        day = rng.randint(1, 28)
        date = rng.choice(words.DATE_FORMS).format(day=day, ordinal=_ordinal(day), month=words.MONTHS[month])
        parts = [rng.choice(words.GREETINGS), rng.choice(words.PLANS).replace("{date}", date)]
        yield _fill(rng, " ".join(part for part in parts if part)), f"{month + 1:02d}-{day:02d}"


def _fill(rng: random.Random, text: str) -> str:
    return text.replace("{item}", rng.choice(words.ITEMS)).replace("{city}", rng.choice(words.CITIES))


def _ordinal(day: int) -> str:
    ending = "th" if 10 <= day <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"
