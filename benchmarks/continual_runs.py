"""One run of the continual benchmark: train tasks one after the other and score all of them after each."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.arms import Arm
from benchmarks.clbench import Row, TaskRows
from clcore.engine.loop import TrainConfig, fit_task
from clcore.engine.memory import InProcessMemory, MemorySession
from clcore.engine.registry import build_strategy
from clcore.engine.tasks import encode_row
from clcore.evaluation import evaluate
from service.specs import LoraSpec, TrainingSpec

LOG = logging.getLogger("benchmarks.continual")

EVAL_BATCH_ROWS = 16
COMPLETION_TOKENS = 32
"""Room for the answer beside the prompt."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all runs share."""

    stage: int
    tasks: Sequence[TaskRows]
    """In the order of training."""
    steps: int
    """Per task."""
    max_prompt_tokens: int
    model_name: str
    load: Callable[[], tuple[nn.Module, Any]]
    """Return the base model with a fresh adapter, the same every time, and the tokenizer."""
    lora: LoraSpec
    training: TrainingSpec

    @property
    def max_length(self) -> int:
        """Tokens of a row."""
        return self.max_prompt_tokens + COMPLETION_TOKENS


@dataclasses.dataclass(frozen=True)
class Run:
    """A strategy at a learning rate. Without an arm: the base model as it is."""

    name: str
    arm: Arm | None
    learning_rate: float
    is_multitask: bool = False
    """Train once on the rows of all tasks, for as many steps as the sequence has."""
    has_dev_scores: bool = False

    def settings(self, setup: Setup) -> dict[str, Any]:
        """Everything that the result depends on, as far as files and arguments go; not the code."""
        rate = {"learning_rate": self.learning_rate}
        return {
            "stage": setup.stage,
            "tasks": [[task.name, task.sha256()] for task in setup.tasks],
            "steps": setup.steps,
            "max_prompt_tokens": setup.max_prompt_tokens,
            "model": setup.model_name,
            "lora": setup.lora.model_dump(mode="json"),
            "training": setup.training.model_dump(mode="json") | rate,
            "strategy": self.arm and self.arm.strategy,
            "config": self.arm and self.arm.config(),
            "is_multitask": self.is_multitask,
            "has_dev_scores": self.has_dev_scores,
        }


def result_of(run: Run, setup: Setup, folder: Path) -> dict[str, Any]:
    """Return the stored result of a run with equal settings, else run it and store the result.

    The file is <folder>/stage<n>-<run>.json.
    """
    settings = run.settings(setup)
    settings_hash = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    path = folder / f"stage{setup.stage}-{run.name.replace(':', '-').replace('=', '-')}.json"
    if path.is_file():
        stored: dict[str, Any] = json.loads(path.read_text())
        if stored["settings_hash"] == settings_hash:
            LOG.info("%s: stored", run.name)
            return stored
    LOG.info("%s: starts", run.name)
    start = time.perf_counter()
    found = _score_base(setup) if run.arm is None else _train(run, run.arm, setup)
    seconds = {"seconds": round(time.perf_counter() - start, 1)}
    result = {"run": run.name, "settings_hash": settings_hash, "settings": settings, **seconds, **found}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(result, allow_nan=False) + "\n")
    temporary.replace(path)
    LOG.info("%s: %s in %.0f s", run.name, result["matrix"], result["seconds"])
    return result


def _score_base(setup: Setup) -> dict[str, Any]:
    model, tokenizer = setup.load()
    answers = [_score(model, tokenizer, task.test, setup, with_adapter=False) for task in setup.tasks]
    return {"answers": [answers], "matrix": [[_mean(of_task) for of_task in answers]]}


def _train(run: Run, arm: Arm, setup: Setup) -> dict[str, Any]:
    """Train and score; answers[i][j] holds 1 or 0 per test row of task j after training task i."""
    model, tokenizer = setup.load()
    store = InProcessMemory()
    names = [task.name for task in setup.tasks]
    sequence = [[name] for name in names]
    answers: list[list[list[int]]] = []
    tasks = []
    for number, parts in enumerate([names] if run.is_multitask else sequence):
        dataset = [
            encode_row(row, tokenizer, setup.max_length, f"{task.name}:{i}")
            for task in setup.tasks
            if task.name in parts
            for i, row in enumerate(task.train)
        ]
        memory = MemorySession(store, version=store.newest, op_id=f"task-{number}", seed=setup.training.seed)
        fitted = fit_task(
            model,
            build_strategy(arm.strategy, arm.params, model),
            dataset,
            task_id="+".join(parts),
            config=_train_config(run, setup, tokenizer, num_parts=len(parts)),
            memory=memory,
        )
        tasks.append(
            {
                "task": "+".join(parts),
                "loss": fitted.final_loss,
                "total_tokens": fitted.total_tokens,
                "replay_tokens": fitted.replay_tokens,
                "train_s": round(fitted.train_s, 1),
                "metrics": dict(fitted.metrics),
            }
        )
        answers.append([_score(model, tokenizer, task.test, setup) for task in setup.tasks])
    result: dict[str, Any] = {
        "answers": answers,
        "matrix": [[_mean(of_task) for of_task in row] for row in answers],
        "tasks": tasks,
    }
    if run.has_dev_scores:
        result["dev"] = [_mean(_score(model, tokenizer, task.dev, setup)) for task in setup.tasks]
    return result


def _train_config(run: Run, setup: Setup, tokenizer: Any, *, num_parts: int) -> TrainConfig:
    given = setup.training.model_dump() | {"learning_rate": run.learning_rate}
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    values = {name: value for name, value in given.items() if name in known}
    return TrainConfig(**values, num_steps=setup.steps * num_parts, pad_token_id=pad)


def _score(
    model: nn.Module, tokenizer: Any, rows: Sequence[Row], setup: Setup, *, with_adapter: bool = True
) -> list[int]:
    """Return 1 per row whose greedy answer is exactly the reference, else 0."""
    found = evaluate(
        model,
        tokenizer,
        list(enumerate(rows)),
        "exact_match",
        max_length=setup.max_length,
        batch_size=EVAL_BATCH_ROWS,
        with_adapter=with_adapter,
    )
    return [int(row.score) for row in found.rows]


def _mean(scores: Sequence[int]) -> float:
    return sum(scores) / len(scores)
