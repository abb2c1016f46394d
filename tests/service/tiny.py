"""A tiny random model on disk, data sets in storage and run plans for it: what worker tests share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.adapters.storage import Storage, dataset_key, desired_key, plan_key
from service.specs import (
    BaseModelSpec,
    EvaluationSpec,
    LoggingSpec,
    LoraSpec,
    ParentVersion,
    PlannedDataset,
    PlannedTask,
    RunPlan,
    StrategySpec,
    TrainingSpec,
)

STRATEGY = (
    StrategySpec(type="ewc", ewc_lambda=10.0, fisher_sample_size=16),
    StrategySpec(type="experience_replay", buffer_size=6, replay_ratio=0.3),
)


def save_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Save a random Llama of two layers with a tokenizer of one token per character."""
    from tests.clcore.tiny import tiny_llama_base, tiny_tokenizer  # torch, for those who need it

    tiny_llama_base(seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def letter_rows(num_rows: int, shift: int) -> list[dict[str, str]]:
    """Rows of a task that a tiny model can start to learn: answer with a letter shifted by shift."""
    return [
        {
            "prompt": f"{chr(97 + (i * 7) % 26)} {chr(97 + i % 26)} {shift} :",
            "completion": f" {chr(97 + (i + shift) % 26)}",
        }
        for i in range(num_rows)
    ]


def put_dataset(storage: Storage, dataset_id: str, rows: Sequence[dict[str, Any]]) -> PlannedDataset:
    """Write rows as the control plane does."""
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    storage.write_bytes(dataset_key(dataset_id), data)
    digest = hashlib.sha256(data).hexdigest()
    return PlannedDataset(id=dataset_id, path=dataset_key(dataset_id), sha256=digest, num_rows=len(rows))


def put_plan(
    storage: Storage,
    model: Path,
    run_id: str,
    *,
    num_tasks: int = 2,
    first: int = 0,
    steps: int = 6,
    num_workers: int = 2,
    strategy: tuple[StrategySpec, ...] = STRATEGY,
    parent: ParentVersion | None = None,
    num_eval_rows: int = 7,
    evaluation: EvaluationSpec | None = None,
    logging: LoggingSpec | None = None,
    **training: Any,
) -> RunPlan:
    """Write the data sets and the plan of a run over tasks first .. first + num_tasks; returns the plan."""
    settings = TrainingSpec(
        num_workers=num_workers,
        learning_rate=1e-2,
        max_length=32,
        **{"batch_size": 6, "micro_batch_size": 2, **training},
    )

    def task(index: int) -> PlannedTask:
        return PlannedTask(
            index=index,
            name=f"t{index}",
            dataset=put_dataset(storage, f"ds_train{index}", letter_rows(20, index + 1)),
            eval_dataset=put_dataset(storage, f"ds_eval{index}", letter_rows(num_eval_rows, index + 1)),
            steps=steps,
            training=settings,
        )

    plan = RunPlan(
        run_id=run_id,
        job_id="job_tiny",
        adapter="tiny",
        base_model=BaseModelSpec(id="tiny"),
        base_model_path=str(model),
        peft=LoraSpec(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj")),
        strategy=strategy,
        tasks=tuple(task(i) for i in range(first, first + num_tasks)),
        earlier_tasks=tuple(task(i) for i in range(first)),
        training=settings,
        evaluation=evaluation or EvaluationSpec(),
        logging=logging or LoggingSpec(),
        parent=parent,
    )
    storage.write_bytes(plan_key(run_id), plan.model_dump_json().encode())
    storage.write_json(desired_key(run_id), {"state": "running"})
    return plan
