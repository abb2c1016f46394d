"""Is interference predictable before training? `python -m benchmarks.interference --json OUT`.

For each of the 12 ordered pairs of four tasks: train the first, predict what the second will do to it, train
the second, and observe how much the first task's loss rose on test rows. The prediction sees stored training
rows of the first task and training rows of the second. The predictor, the measured lookahead, was fixed
before the first run, by reasoning and on tiny models; the other candidates are reported beside it, and which
of them is best is known only afterwards.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import nn

from benchmarks.clbench import TaskRows, read_task, shorten
from benchmarks.continual import MODEL, REPOSITORY, load_model
from benchmarks.report import target, write_report
from clcore.engine.errors import DataError
from clcore.engine.loop import TrainConfig, fit_task
from clcore.engine.memory import InProcessMemory, MemorySession
from clcore.engine.params import Params
from clcore.engine.tasks import Example, encode_row
from clcore.evaluation.interference import predict_interference, record_task
from clcore.evaluation.snapshots import take_snapshot
from clcore.evaluation.task_vectors import label_loss
from clcore.strategies.none import NoStrategy
from service.settings import Settings
from service.specs import LoraSpec, TrainingSpec

LOG = logging.getLogger("benchmarks.interference")

TASKS = ("agnews", "amazon", "dbpedia", "yelp")
MAX_PROMPT_TOKENS, COMPLETION_TOKENS = 64, 8
CANDIDATES = (
    *("predicted", "taylor", "first_order", "second_order"),
    *("gradient_conflict", "fisher_conflict", "subspace_overlap"),
)
BASELINES = ("old_task_mean", "new_task_mean")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How long is trained and how many rows are read."""

    steps: int = 30
    batch_size: int = 4
    trial_steps: int = 5
    stored_rows: int = 16
    """Training rows of the old task that the prediction sees, as a small replay buffer would hold."""
    test_rows: int = 32


@dataclasses.dataclass(frozen=True)
class Task:
    """A task's rows as tokens."""

    name: str
    train: Sequence[Example]
    test: Sequence[Example]


def encode(rows: TaskRows, tokenizer: Any) -> Task:
    """Shorten the prompts and turn rows into tokens."""

    def tokens(part: Sequence[Mapping[str, Any]]) -> list[Example]:
        short = [shorten(row, tokenizer, MAX_PROMPT_TOKENS) for row in part]
        return [encode_row(row, tokenizer, MAX_PROMPT_TOKENS + COMPLETION_TOKENS) for row in short]

    return Task(rows.name, tokens(rows.train), tokens(rows.test))


def run_pairs(
    model: nn.Module, tasks: Sequence[Task], plan: Plan, config: TrainConfig
) -> list[dict[str, Any]]:
    """Return one row per ordered pair: both tasks, the candidates and the observed rise of the loss."""
    untrained = take_snapshot(model)
    sizes = {"batch_size": config.batch_size, "pad_token_id": config.pad_token_id}
    found = []

    def train(task: Task) -> None:
        memory = MemorySession(InProcessMemory(), version=0, op_id=task.name, seed=config.seed)
        fit_task(model, NoStrategy(model), task.train, task_id=task.name, config=config, memory=memory)

    def loss(task: Task) -> float:
        return label_loss(model, task.test, **sizes)

    for old in tasks:
        Params.of(model).assign(untrained)
        train(old)
        trained, before = take_snapshot(model), loss(old)
        record = record_task(model, old.train[: plan.stored_rows], **sizes)
        for new in tasks:
            if new is old:
                continue
            start = time.perf_counter()
            Params.of(model).assign(trained)
            guess = predict_interference(
                model,
                new.train,
                {old.name: record},
                learning_rate=config.learning_rate,
                num_steps=plan.trial_steps,
                seed=config.seed,
                **sizes,
            )[old.name]
            predict_s = time.perf_counter() - start
            train(new)
            row: dict[str, Any] = {"old": old.name, "new": new.name}
            row |= {name: getattr(guess, name) for name in CANDIDATES}
            row |= {"loss_before": before, "observed": loss(old) - before}
            row |= {"predict_s": round(predict_s, 1), "pair_s": round(time.perf_counter() - start, 1)}
            LOG.info("%s", row)
            found.append(row)
    return found


def with_baselines(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Add what the other pairs say: the mean observed rise of the same old task, and of the same new task."""

    def others(pair: Mapping[str, Any], key: str) -> float:
        values = [p["observed"] for p in pairs if p is not pair and p[key] == pair[key]]
        return float(np.mean(values))

    return [
        {**pair, "old_task_mean": others(pair, "old"), "new_task_mean": others(pair, "new")} for pair in pairs
    ]


def rank_correlation(first: Any, second: Any) -> Any:
    """Return Spearman's rank correlation along the last axis, in -1..1; 0 where one side does not vary."""
    x, y = (rankdata(side, axis=-1) for side in (first, second))
    x, y = (side - side.mean(-1, keepdims=True) for side in (x, y))
    scale = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.divide((x * y).sum(-1), scale, out=np.zeros_like(scale), where=scale > 0)


def summarise(
    pairs: Sequence[Mapping[str, Any]], *, draws: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """Return the rank correlation of every candidate and baseline with what was observed.

    low, high: 95 % percentile bootstrap over pairs (they share tasks, so the truth is wider). p: share of
    permutations of the observed values with a correlation at least as high. minus_baseline: difference to
    the baseline that turned out better, with its interval from the same draws.
    """
    rng = np.random.default_rng(seed)
    observed = np.array([pair["observed"] for pair in pairs])
    names = [name for name in (*CANDIDATES, *BASELINES) if all(pair[name] is not None for pair in pairs)]
    values = {name: np.array([pair[name] for pair in pairs]) for name in names}
    point = {name: float(rank_correlation(values[name], observed)) for name in names}
    chosen = rng.integers(len(pairs), size=(draws, len(pairs)))
    drawn = {name: rank_correlation(x[chosen], observed[chosen]) for name, x in values.items()}
    shuffled = rng.permuted(np.tile(observed, (draws, 1)), axis=1)
    best = max(BASELINES, key=point.__getitem__)
    found = []
    for name in names:
        chance = rank_correlation(np.broadcast_to(values[name], shuffled.shape), shuffled)
        low, high = np.quantile(drawn[name], [0.025, 0.975])
        difference = np.quantile(drawn[name] - drawn[best], [0.025, 0.975])
        found.append(
            {
                "predictor": name,
                "spearman": point[name],
                "low": float(low),
                "high": float(high),
                "p": float(1 + (chance >= point[name] - 1e-12).sum()) / (1 + draws),
                "best_baseline": best,
                "minus_baseline": point[name] - point[best],
                "minus_baseline_low": float(difference[0]),
                "minus_baseline_high": float(difference[1]),
            }
        )
    return found


def targets_of(summary: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Say whether the chosen predictor beats the means of tasks."""
    ours = next(row for row in summary if row["predictor"] == "predicted")
    name = "rank correlation of predicted and observed rise of the loss"
    difference, low = ours["minus_baseline"], ours["minus_baseline_low"]
    return [
        target(f"{name}, permutation p", ours["p"], "< 0.05", ours["p"] < 0.05),
        target(f"{name}, minus that of {ours['best_baseline']}", difference, "> 0", difference > 0),
        target(f"{name}, minus that of {ours['best_baseline']}, lower end of 95 %", low, "> 0", low > 0),
    ]


def main() -> None:
    """Run the pairs, write the report and a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the report goes")
    parser.add_argument("--model", type=Path, default=Settings().models_dir / MODEL)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data" / "clbench")
    parser.add_argument("--steps", type=int, default=Plan.steps, help="per task, for a trial")
    parser.add_argument("--tasks", default=",".join(TASKS), help="with commas between")
    parser.add_argument("--threads", type=int, help="of torch; default: all cores")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if not (options.model / "config.json").is_file():
        parser.error(f"no model in {options.model}; fetch it with: clpeft model prepare {MODEL}")
    if options.threads:
        torch.set_num_threads(options.threads)
    plan, training = Plan(steps=options.steps), TrainingSpec()
    model, tokenizer = load_model(options.model, LoraSpec(), training.seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    config = TrainConfig(
        num_steps=plan.steps,
        learning_rate=training.learning_rate,
        batch_size=plan.batch_size,
        seed=training.seed,
        pad_token_id=pad,
    )
    counts = {"num_train": plan.steps * config.batch_size, "num_dev": 0, "num_test": plan.test_rows}
    names = options.tasks.split(",")
    if len(names) < 3:
        parser.error(f"three tasks or more are needed, so that other pairs can be a baseline; got {names}")
    try:
        rows = [read_task(options.data, name, **counts, seed=training.seed) for name in names]
    except DataError as error:
        parser.error(str(error))
    tasks = [encode(task, tokenizer) for task in rows]
    pairs = with_baselines(run_pairs(model, tasks, plan, config))
    summary = summarise(pairs)
    settings = {**dataclasses.asdict(plan), "max_prompt_tokens": MAX_PROMPT_TOKENS, "tasks": names}
    found = [{"settings": settings}, *summary, *pairs]
    write_report(options.json, "interference", found, targets_of(summary))
    lines = [
        f"{row['predictor']:18} {row['spearman']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
        for row in summary
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
