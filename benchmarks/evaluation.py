"""How fast are rows scored? `python -m benchmarks.evaluation --json OUT`.

Three ways answer the same rows of a real model with an adapter: model.generate one row at a time,
model.generate on padded batches in the order of the file, and evaluate. They take turns, so that a drift hits
all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import statistics
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
from benchmarks.stats import median_of_ratios
from clcore.engine.loop import TrainConfig, fit_task
from clcore.engine.memory import InProcessMemory, MemorySession
from clcore.engine.tasks import encode_row, prompt_and_completion
from clcore.evaluation import (
    Evaluation,
    LocalStore,
    Stored,
    evaluate,
    evaluate_general,
    general_rows,
    longest_answer,
)
from clcore.strategies.none import NoStrategy
from service.settings import Settings
from service.specs import LoraSpec

LOG = logging.getLogger("benchmarks.evaluation")

REPOSITORY = Path(__file__).parents[1]
MODEL = "smollm2-135m"
TASKS = {"dbpedia": False, "yelp": True}
"""Task -> whether the adapter is trained on it first. Untrained, no answer is right."""
MAX_LENGTH = 288
BATCH_ROWS = 16
LEAST_SPEEDUP = 1.3
KEY = "0" * 64

Rows = Sequence[tuple[int, dict[str, str]]]


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of one task, scored as they are or after a short training on it."""

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
    """Time the arms in turn, each round beginning with another one; medians over rounds.

    A speed-up is the median of the rounds' ratios: a slower machine hits a whole round.
    Raises RuntimeError when arms differ in an answer.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    answers: dict[str, list[str]] = {}
    names = list(ARMS)
    for i in range(num_rounds):
        for name in [*names[i % len(names) :], *names[: i % len(names)]]:
            start = time.perf_counter()
            found = ARMS[name](model, tokenizer, case)
            seconds[name].append(time.perf_counter() - start)
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
    speedups = {
        name: round(median_of_ratios(list(zip(seconds["evaluate"], seconds[name], strict=True))).median, 3)
        for name in names[:2]
    }
    return {
        "task": case.task,
        "is_trained": case.is_trained,
        "num_rows": len(case.rows),
        "num_rounds": num_rounds,
        "accuracy": sum(a == r.strip() for a, r in zip(answers["evaluate"], references, strict=True))
        / len(references),
        "rows_per_s": {name: round(rate, 3) for name, rate in rates.items()},
        "speedup_over": speedups,
        "answers_equal": True,
    }


def _num_different(left: Sequence[str], right: Sequence[str]) -> int:
    return sum(a != b for a, b in zip(left, right, strict=True))


def stored_cost(model: nn.Module, tokenizer: Any, case: Case) -> dict[str, Any]:
    """Time an evaluation that stores its outputs and the same again, which finds them all."""
    with tempfile.TemporaryDirectory() as folder:
        stored = Stored(LocalStore(Path(folder)), KEY)
        start = time.perf_counter()
        first = scored(model, tokenizer, case, stored)
        middle = time.perf_counter()
        again = scored(model, tokenizer, case, stored)
        end = time.perf_counter()
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
    start = time.perf_counter()
    found = evaluate_general(model, tokenizer, rows, max_length=MAX_LENGTH)
    seconds = time.perf_counter() - start
    return {
        "what": "general ability on the project's own texts",
        "num_rows": len(rows),
        "seconds": round(seconds, 3),
        "rows_per_s": round(len(rows) / seconds, 2),
        "perplexity": round(1 / found.score, 3),
    }


def read_case(folder: Path, tokenizer: Any, task: str, num_rows: int, *, is_trained: bool) -> Case:
    """Draw test rows of a task."""
    test = read_task(folder, task, num_train=0, num_dev=0, num_test=num_rows, seed=0).test
    rows = [(i, dict(row)) for i, row in enumerate(test)]
    return Case(task, rows, longest_answer(rows, tokenizer, MAX_LENGTH), is_trained)


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
    """Race the arms on two tasks, the second after training on it, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the report goes")
    parser.add_argument("--model", type=Path, default=Settings().models_dir / MODEL)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data" / "clbench")
    parser.add_argument("--rows", type=int, default=32, help="of each task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="of training before the second task is scored")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if not (options.model / "config.json").is_file():
        parser.error(f"no model in {options.model}; fetch it with: clpeft model prepare {MODEL}")
    model, tokenizer = load_model(options.model, LoraSpec(), seed=0)
    rows: list[dict[str, Any]] = []
    for task, is_trained in TASKS.items():
        case = read_case(options.data, tokenizer, task, options.rows, is_trained=is_trained)
        if is_trained:
            train(model, tokenizer, options.data, task, options.steps)
        rows.append(race(model, tokenizer, case, options.rounds))
        LOG.info("%s", rows[-1])
    slowest = min(min(row["speedup_over"].values()) for row in rows)
    stored, general = stored_cost(model, tokenizer, case), general_cost(model, tokenizer)
    LOG.info("%s %s", stored, general)
    share = stored["stored_s"] / stored["computed_s"]
    what = "rows per second against the faster way of model.generate, worst case"
    targets = [
        target(what, slowest, f">= {LEAST_SPEEDUP}", slowest >= LEAST_SPEEDUP),
        target("a stored evaluation, share of a computed one", share, "<= 0.05", share <= 0.05),
    ]
    write_report(options.json, "evaluation", [*rows, stored, general], targets)


if __name__ == "__main__":
    main()
