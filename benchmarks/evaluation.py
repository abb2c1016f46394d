"""How fast are rows scored? `python -m benchmarks.evaluation --json OUT`.

Three ways answer the same rows of a real model with an adapter: model.generate one row at a time,
model.generate on padded batches in the order of the file, and evaluate. They take turns, so that a drift hits
all of them; seconds are the process's, over all its threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.clbench import read_task
from benchmarks.continual import load_model
from benchmarks.report import target, write_report
from clcore.engine.loop import TrainConfig, fit_task
from clcore.engine.memory import InProcessMemory, MemorySession
from clcore.engine.tasks import encode_row, prompt_and_completion
from clcore.evaluation import Evaluation, LocalStore, Stored, evaluate, evaluate_general, general_rows
from clcore.strategies.none import NoStrategy
from service.settings import Settings
from service.specs import LoraSpec

LOG = logging.getLogger("benchmarks.evaluation")

REPOSITORY = Path(__file__).parents[1]
MODEL = "smollm2-135m"
MAX_LENGTH = 288
BATCH_ROWS = 16
LEAST_SPEEDUP = 1.3
KEY = "0" * 64

Rows = Sequence[tuple[int, dict[str, str]]]


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of one task, scored before or after a short training on it."""

    task: str
    rows: Rows
    limit: int
    """Tokens of an answer."""
    is_trained: bool


def one_by_one(model: nn.Module, tokenizer: Any, case: Case) -> list[str]:
    """Answer with model.generate, one row at a time: nothing is padded."""
    return [text for row in case.rows for text in _generate(model, tokenizer, [row], case.limit)]


def in_file_order(model: nn.Module, tokenizer: Any, case: Case) -> list[str]:
    """Answer with model.generate, BATCH_ROWS rows at a time as they come, padded on the left."""
    found: list[str] = []
    for start in range(0, len(case.rows), BATCH_ROWS):
        found += _generate(model, tokenizer, case.rows[start : start + BATCH_ROWS], case.limit)
    return found


def by_evaluate(model: nn.Module, tokenizer: Any, case: Case) -> list[str]:
    return [row.answer for row in scored(model, tokenizer, case).rows]


def scored(model: nn.Module, tokenizer: Any, case: Case, stored: Stored | None = None) -> Evaluation:
    return evaluate(
        model,
        tokenizer,
        case.rows,
        "exact_match",
        max_length=MAX_LENGTH,
        batch_size=BATCH_ROWS,
        max_new_tokens=case.limit,
        stored=stored,
    )


ARMS: dict[str, Callable[[nn.Module, Any, Case], list[str]]] = {
    "one row at a time": one_by_one,
    "padded batches in file order": in_file_order,
    "evaluate": by_evaluate,
}


@torch.inference_mode()
def _generate(model: nn.Module, tokenizer: Any, rows: Rows, limit: int) -> list[str]:
    prompts = [prompt_and_completion(row, tokenizer, MAX_LENGTH)[0] for _, row in rows]
    length = max(map(len, prompts))
    ids = torch.full((len(rows), length), tokenizer.eos_token_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, length - len(prompt) :] = torch.tensor(prompt)
        mask[i, length - len(prompt) :] = 1
    out = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=limit,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return [str(text).strip() for text in tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)]


def race(model: nn.Module, tokenizer: Any, case: Case, num_rounds: int) -> dict[str, Any]:
    """Time the arms in turn, each round beginning with another one; medians over rounds, in rows per second.

    Raises RuntimeError when arms differ in an answer.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    answers: dict[str, list[str]] = {}
    names = list(ARMS)
    for i in range(num_rounds):
        for name in [*names[i % len(names) :], *names[: i % len(names)]]:
            start = time.process_time()
            found = ARMS[name](model, tokenizer, case)
            seconds[name].append(time.process_time() - start)
            if answers.setdefault(name, found) != found:
                raise RuntimeError(f"{name}: the answers changed from round to round")
    references = [
        tokenizer.decode(prompt_and_completion(row, tokenizer, MAX_LENGTH)[1], skip_special_tokens=True)
        for _, row in case.rows
    ]
    differing = {name: _num_different(answers[name], answers["one row at a time"]) for name in names[1:]}
    if any(differing.values()):
        raise RuntimeError(f"{case.task}: answers that differ from those of one row at a time: {differing}")
    rates = {name: len(case.rows) / statistics.median(of_arm) for name, of_arm in seconds.items()}
    fastest = max(rates[name] for name in names[:2])
    return {
        "task": case.task,
        "is_trained": case.is_trained,
        "num_rows": len(case.rows),
        "num_rounds": num_rounds,
        "accuracy": sum(a == r.strip() for a, r in zip(answers["evaluate"], references, strict=True))
        / len(references),
        "rows_per_s": {name: round(rate, 3) for name, rate in rates.items()},
        "speedup_over_the_faster": round(rates["evaluate"] / fastest, 3),
        "answers_equal": True,
    }


def _num_different(left: Sequence[str], right: Sequence[str]) -> int:
    return sum(a != b for a, b in zip(left, right, strict=True))


def stored_cost(model: nn.Module, tokenizer: Any, case: Case) -> dict[str, Any]:
    """Time an evaluation that stores its outputs and the same again, which finds them all."""
    with tempfile.TemporaryDirectory() as folder:
        stored = Stored(LocalStore(Path(folder)), KEY)
        start = time.process_time()
        first = scored(model, tokenizer, case, stored)
        middle = time.process_time()
        again = scored(model, tokenizer, case, stored)
        end = time.process_time()
    if first != again:
        raise RuntimeError("stored outputs give other scores")
    return {
        "what": "an evaluation whose outputs are stored",
        "task": case.task,
        "num_rows": len(case.rows),
        "computed_s": round(middle - start, 3),
        "stored_s": round(end - middle, 4),
    }


def general_cost(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """Time general ability on the project's own texts."""
    rows = list(enumerate(general_rows()))
    start = time.process_time()
    found = evaluate_general(model, tokenizer, rows, max_length=MAX_LENGTH)
    seconds = time.process_time() - start
    return {
        "what": "general ability on the project's own texts",
        "num_rows": len(rows),
        "seconds": round(seconds, 3),
        "rows_per_s": round(len(rows) / seconds, 2),
        "perplexity": round(1 / found.score, 3),
    }


def read_cases(folder: Path, tokenizer: Any, tasks: Sequence[str], num_rows: int) -> list[Case]:
    """Return each task before training and after it, with the same rows."""
    found = []
    for name in tasks:
        test = read_task(folder, name, num_train=0, num_dev=0, num_test=num_rows, seed=0).test
        rows = [(i, dict(row)) for i, row in enumerate(test)]
        limit = max(len(prompt_and_completion(row, tokenizer, MAX_LENGTH)[1]) for _, row in rows)
        found += [Case(name, rows, limit, is_trained) for is_trained in (False, True)]
    return found


def train(model: nn.Module, tokenizer: Any, folder: Path, task: str, num_steps: int) -> None:
    """Train the adapter so that most answers are of the task's kind."""
    rows = read_task(folder, task, num_train=8 * num_steps, num_dev=0, num_test=0, seed=0).train
    dataset = [encode_row(row, tokenizer, MAX_LENGTH, f"{task}:{i}") for i, row in enumerate(rows)]
    config = TrainConfig(
        num_steps=num_steps, learning_rate=1e-3, batch_size=8, pad_token_id=tokenizer.eos_token_id
    )
    memory = MemorySession(InProcessMemory(), version=0, op_id="train", seed=0)
    fit_task(model, NoStrategy(model), dataset, task_id=task, config=config, memory=memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True, type=Path, help="where to write the report")
    parser.add_argument("--data", type=Path, default=REPOSITORY / ".." / "shared" / "data" / "clbench")
    parser.add_argument("--model", type=Path, help=f"folder of the model; the prepared {MODEL} if left out")
    parser.add_argument("--tasks", default="dbpedia,yelp")
    parser.add_argument("--rows", type=int, default=48, help="test rows of each task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="training steps before a task is scored again")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    model, tokenizer = load_model(arguments.model or Settings().models_dir / MODEL, LoraSpec(), seed=0)
    rows: list[dict[str, Any]] = []
    for case in read_cases(arguments.data, tokenizer, arguments.tasks.split(","), arguments.rows):
        if case.is_trained:
            train(model, tokenizer, arguments.data, case.task, arguments.steps)
        rows.append(race(model, tokenizer, case, arguments.rounds))
        LOG.info("%s", rows[-1])
    slowest = min(row["speedup_over_the_faster"] for row in rows)
    rows += [stored_cost(model, tokenizer, case), general_cost(model, tokenizer)]
    LOG.info("%s", rows[-2:])
    write_report(
        arguments.json,
        "evaluation",
        rows,
        [
            target(
                "rows per second against the faster way of model.generate, the worst case",
                slowest,
                f">= {LEAST_SPEEDUP}",
                slowest >= LEAST_SPEEDUP,
            ),
            target(
                "stored evaluation, share of a computed one",
                rows[-2]["stored_s"] / rows[-2]["computed_s"],
                "<= 0.05",
                rows[-2]["stored_s"] <= 0.05 * rows[-2]["computed_s"],
            ),
        ],
    )


if __name__ == "__main__":
    main()
