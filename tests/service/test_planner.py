"""The planner: lengths, overrides and defaults."""

from __future__ import annotations

from typing import Any

import pytest

from service.errors import Invalid
from service.planner import KnownDataset, check_training, num_steps, plan_run, plan_tasks, resolve_strategies
from service.specs import BaseModelSpec, JobSpec, PlannedDataset, StrategySpec, TaskSpec, TrainingSpec


def known(dataset_id: str, num_rows: int, row_format: str = "completion") -> KnownDataset:
    """A data set as the database knows it."""
    planned = PlannedDataset(
        id=dataset_id, path=f"datasets/{dataset_id}/rows.jsonl", sha256="0", num_rows=num_rows
    )
    return KnownDataset(planned, row_format)


DATASETS = {
    row.planned.id: row for row in (known("ds_a", 20), known("ds_b", 7), known("ds_c", 5, "messages"))
}


def plan(training: TrainingSpec | None = None, **task: Any) -> Any:
    """Plan one task."""
    spec = TaskSpec(name="one", **{"dataset": "ds_a", **task})
    return plan_tasks([spec], training=training or TrainingSpec(), datasets=DATASETS)[0]


@pytest.mark.parametrize(
    ("num_rows", "epochs", "batch_size", "steps"),
    [(20, None, 8, 3), (16, 1.0, 8, 2), (20, 2.5, 8, 7), (3, 0.1, 8, 1), (240, 3.0, 16, 45)],
)
def test_epochs_become_steps_rounded_up(
    num_rows: int, epochs: float | None, batch_size: int, steps: int
) -> None:
    assert num_steps(num_rows, epochs, batch_size) == steps


def test_given_steps_are_kept_and_one_epoch_is_the_default() -> None:
    assert plan(steps=11).steps == 11
    assert plan().steps == 3


def test_overrides_change_one_task_and_its_number_of_steps() -> None:
    planned = plan(
        TrainingSpec(seed=7), overrides={"batch_size": 4, "learning_rate": 1e-3, "schedule": "constant"}
    )
    assert (planned.steps, planned.training.learning_rate, planned.training.schedule) == (5, 1e-3, "constant")
    assert planned.training.seed == 7


def test_evaluation_rows_default_to_the_training_rows() -> None:
    assert plan().eval_dataset.id == "ds_a"
    assert plan(eval_dataset="ds_b").eval_dataset.num_rows == 7


def test_every_problem_of_every_task_is_named_at_once() -> None:
    tasks = [
        TaskSpec(name="one", dataset="ds_x"),
        TaskSpec(name="two", dataset="ds_a", eval_dataset="ds_c"),
        TaskSpec(name="old", dataset="ds_a", overrides={"backend": "ddp", "warmup_steps": -1}),
        TaskSpec(name="four", dataset="ds_a", overrides={"warmup_steps": -1}),
    ]
    with pytest.raises(Invalid) as caught:
        plan_tasks(tasks, training=TrainingSpec(), datasets=DATASETS, first_index=3, taken_names=["old"])
    assert [problem.pointer for problem in caught.value.problems] == [
        "/tasks/0/dataset",
        "/tasks/1/eval_dataset",
        "/tasks/2/name",
        "/tasks/2/overrides/backend",
        "/tasks/3/overrides/warmup_steps",
    ]


def test_indexes_count_over_the_whole_job() -> None:
    tasks = [TaskSpec(name=name, dataset="ds_a") for name in ("four", "five")]
    planned = plan_tasks(tasks, training=TrainingSpec(), datasets=DATASETS, first_index=3)
    assert [task.index for task in planned] == [3, 4]


@pytest.mark.parametrize("backend", ["fsdp", "deepspeed"])
def test_backends_that_do_not_run_yet_are_refused(backend: Any) -> None:
    with pytest.raises(Invalid, match=f"backend '{backend}' is not available yet; use 'ddp'"):
        check_training(TrainingSpec(backend=backend))


def test_strategies_get_their_defaults_and_resolving_twice_changes_nothing() -> None:
    given = [StrategySpec(type="ewc", ewc_lambda=3.0), StrategySpec(type="experience_replay")]
    once = resolve_strategies(given)
    assert once[0].params["ewc_lambda"] == 3.0
    assert len(once[1].params) > 0
    assert resolve_strategies(once) == once


def test_a_run_continues_with_the_jobs_settings() -> None:
    spec = JobSpec(
        name="job", base_model=BaseModelSpec(id="tiny"), tasks=(TaskSpec(name="one", dataset="ds_a"),)
    )
    tasks = plan_tasks(spec.tasks, training=spec.training, datasets=DATASETS)
    run = plan_run(
        spec, run_id="run_1", job_id="job_1", base_model_path="/m", tasks=tasks, earlier_tasks=(), parent=None
    )
    assert (run.adapter, run.tasks, run.parent) == ("job", tasks, None)
    assert run == type(run).model_validate_json(run.model_dump_json())
