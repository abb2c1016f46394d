"""Resolve what a user asked for into what workers do: pure functions, no database, no storage."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from clcore.engine.errors import ConfigError
from clcore.engine.registry import check_composition, config_class, make_config
from service.errors import Invalid, Problem
from service.specs import (
    JobSpec,
    ParentVersion,
    PlannedDataset,
    PlannedTask,
    RunPlan,
    StrategySpec,
    TaskSpec,
    TrainingSpec,
)

DEFAULT_EPOCHS = 1.0
BACKENDS = ("ddp",)
WHOLE_JOB_FIELDS = ("backend", "num_workers", "precision")
"""Fields of TrainingSpec that one fit shares over its tasks."""


@dataclass(frozen=True)
class KnownDataset:
    """A data set as the planner needs it."""

    planned: PlannedDataset
    format: str


def check_training(training: TrainingSpec) -> None:
    """Refuse what no worker can run. Raises Invalid."""
    if training.backend not in BACKENDS:
        allowed = ", ".join(repr(name) for name in BACKENDS)
        _refuse("/training/backend", f"backend {training.backend!r} is not available yet; use {allowed}")
    if training.batch_size < training.num_workers:
        _refuse(
            "/training/batch_size",
            f"batch_size {training.batch_size} leaves some of {training.num_workers} workers without a row; "
            f"give at least {training.num_workers}",
        )


def resolve_strategies(strategies: Sequence[StrategySpec]) -> tuple[StrategySpec, ...]:
    """Check names, parameters and composition and fill in every default. Raises Invalid."""
    resolved, configs = [], []
    for position, spec in enumerate(strategies):
        pointer = f"/strategy/{position}"
        _check_finite(spec.params, pointer)
        try:
            # For the types: it says which field, but takes unknown names.
            _types_of(spec.type).validate_json(json.dumps(spec.params), strict=True)
            config = make_config(spec.type, spec.params)
        except ValidationError as error:
            first = error.errors(include_context=False)[0]
            where = "".join(f"/{part}" for part in first["loc"])
            said = first["msg"].removeprefix("Value error, ")
            _refuse(f"{pointer}{where}", said if where == "" else f"{said}, got {first['input']!r}")
        except (ConfigError, TypeError) as error:
            _refuse(pointer, str(error))
        resolved.append(StrategySpec(type=spec.type, **dataclasses.asdict(config)))
        configs.append((spec.type, config))
    try:
        check_composition(configs)
    except ConfigError as error:
        _refuse("/strategy", str(error))
    return tuple(resolved)


@cache
def _types_of(strategy: str) -> TypeAdapter[Any]:
    """Return what checks the types of a strategy's parameters; making it takes longer than a whole check."""
    return TypeAdapter(config_class(strategy))


def plan_tasks(
    tasks: Sequence[TaskSpec],
    *,
    training: TrainingSpec,
    datasets: Mapping[str, KnownDataset],
    first_index: int = 0,
    taken_names: Collection[str] = (),
) -> tuple[PlannedTask, ...]:
    """Resolve data sets, lengths and overrides of tasks that start at first_index.

    Raises Invalid with all problems.
    """
    problems: list[Problem] = []
    planned = []
    seen = set(taken_names)
    for offset, task in enumerate(tasks):
        pointer = f"/tasks/{offset}"
        if task.name in seen:
            problems.append(Problem(f"{pointer}/name", f"duplicate task name: {task.name}"))
        seen.add(task.name)
        task_training, found = _override(task, training, pointer)
        problems += found
        train, evaluate, found = _find_datasets(task, datasets, pointer)
        problems += found
        if train is None or evaluate is None or task_training is None:
            continue
        planned.append(
            PlannedTask(
                index=first_index + offset,
                name=task.name,
                dataset=train.planned,
                eval_dataset=evaluate.planned,
                steps=task.steps or num_steps(train.planned.num_rows, task.epochs, task_training.batch_size),
                training=task_training,
            )
        )
    if problems:
        raise Invalid(f"{problems[0].pointer}: {problems[0].detail}", problems=problems)
    return tuple(planned)


def num_steps(num_rows: int, epochs: float | None, batch_size: int) -> int:
    """Return the optimizer steps that show every row `epochs` times, rounded up."""
    return max(1, math.ceil(num_rows * (DEFAULT_EPOCHS if epochs is None else epochs) / batch_size))


def plan_run(
    spec: JobSpec,
    *,
    run_id: str,
    job_id: str,
    base_model_path: str,
    tasks: Sequence[PlannedTask],
    earlier_tasks: Sequence[PlannedTask],
    parent: ParentVersion | None,
    general_dataset: PlannedDataset | None = None,
) -> RunPlan:
    """Put together everything that one run does; the spec's strategies are resolved already."""
    return RunPlan(
        run_id=run_id,
        job_id=job_id,
        adapter=spec.adapter or spec.name,
        base_model=spec.base_model,
        base_model_path=base_model_path,
        peft=spec.peft,
        strategy=spec.strategy,
        tasks=tuple(tasks),
        earlier_tasks=tuple(earlier_tasks),
        training=spec.training,
        evaluation=spec.evaluation,
        general_dataset=general_dataset,
        logging=spec.logging,
        parent=parent,
    )


def _override(
    task: TaskSpec, training: TrainingSpec, pointer: str
) -> tuple[TrainingSpec | None, list[Problem]]:
    if not task.overrides:
        return training, []
    allowed = [name for name in TrainingSpec.model_fields if name not in WHOLE_JOB_FIELDS]
    wrong = [name for name in task.overrides if name not in allowed]
    if wrong:
        return None, [
            Problem(
                f"{pointer}/overrides/{name}",
                f"{name!r} cannot differ per task; allowed: {', '.join(allowed)}",
            )
            for name in wrong
        ]
    try:
        result = TrainingSpec.model_validate({**training.model_dump(), **task.overrides})
        check_training(result)
    except ValidationError as error:
        return None, [
            Problem(
                f"{pointer}/overrides/{'/'.join(str(part) for part in found['loc'])}",
                f"{found['msg']}, got {found['input']!r}",
            )
            for found in error.errors()
        ]
    except Invalid as error:
        return None, [Problem(f"{pointer}/overrides", error.detail)]
    return result, []


def _find_datasets(
    task: TaskSpec, datasets: Mapping[str, KnownDataset], pointer: str
) -> tuple[KnownDataset | None, KnownDataset | None, list[Problem]]:
    problems = []
    found = {}
    wanted = {"dataset": task.dataset, "eval_dataset": task.eval_dataset or task.dataset}
    for field, dataset_id in wanted.items():
        found[field] = datasets.get(dataset_id)
        if found[field] is None and (field == "dataset" or task.eval_dataset is not None):
            problems.append(
                Problem(f"{pointer}/{field}", f"no data set {dataset_id!r}; upload one to POST /v1/datasets")
            )
    train, evaluate = found["dataset"], found["eval_dataset"]
    if train is not None and evaluate is not None and train.format != evaluate.format:
        problems.append(
            Problem(
                f"{pointer}/eval_dataset",
                f"has {evaluate.format} rows, but {task.dataset} has {train.format} rows",
            )
        )
    return train, evaluate, problems


def _check_finite(params: Mapping[str, Any], pointer: str) -> None:
    for name, value in params.items():
        if isinstance(value, float) and not math.isfinite(value):
            _refuse(f"{pointer}/{name}", f"{name} must be a finite number, got {value!r}")


def _refuse(pointer: str, detail: str) -> None:
    raise Invalid(f"{pointer}: {detail}", problems=[Problem(pointer, detail)])
