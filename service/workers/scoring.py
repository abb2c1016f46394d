"""Score data sets on all workers: tasks, general ability, and the curve while a task trains.

Rows are spread over the workers; rank 0 gets all of them. What was answered is kept in storage and not
answered again: not after a crash, and not for the same adapter in another run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from clcore.engine import parallel
from clcore.engine.errors import DataError
from clcore.engine.params import Params
from clcore.evaluation.cache import Stored, output_key
from clcore.evaluation.general import GENERAL_NAME, evaluate_general, general_rows, general_sha256
from clcore.evaluation.questions import label_set, longest_answer
from clcore.evaluation.runner import RowScore, evaluate, set_score
from service.adapters.manifest import CurvePoint, GeneralScores
from service.specs import PlannedTask
from service.workers.outputs import StoredOutputs
from service.workers.rows import read_rows

if TYPE_CHECKING:
    from service.workers.train_loop import Worker

Rows = Sequence[tuple[int, Mapping[str, Any]]]
Scored = tuple[RowScore, ...]
"""Scored rows in the order of the data set on rank 0; empty on other workers."""


def score_task(
    worker: Worker,
    task: PlannedTask,
    *,
    with_adapter: bool = True,
    max_rows: int | None = None,
    stored: bool = True,
    shown_for: PlannedTask | None = None,
) -> Scored:
    """Score the first rows of a task's evaluation set; None takes as many as the job says.

    stored False answers afresh and does not stop: in the middle of training, no digest says what the model
    is, and the next step stops. shown_for: the trained task whose evaluation this is part of, for events.
    Raises StoppedRun on all workers.
    """
    spec = worker.plan.evaluation
    every = read_rows(worker.storage, task.eval_dataset)
    rows = every[: spec.max_rows]
    # Over all rows: neither may depend on a worker's share.
    numbered = list(enumerate(rows))
    labels = label_set(numbered) if spec.metric == "likelihood" else None
    max_length = task.training.max_length
    with _naming(task.name, spec.metric):
        longest = spec.max_new_tokens or longest_answer(numbered, worker.loaded.tokenizer, max_length)
    decoding = {"max_length": max_length, "max_new_tokens": longest, "labels": labels}
    rows = rows[:max_rows]
    mine = _share(rows)

    def on_batch(done: int) -> None:
        if stored:
            worker.stop_sign.leave()
        if shown_for is not None:
            worker.emit(
                "task.evaluating",
                flush=False,
                task=shown_for.name,
                task_index=shown_for.index,
                scored=task.name,
                done_rows=min(done * parallel.world_size(), len(rows)),
                num_rows=len(rows),
            )

    kept = None
    if stored:
        data, metric = task.eval_dataset, spec.metric
        kept = _stored(worker, data.id, data.sha256, metric, decoding, with_adapter)
    together = worker.leaving_together() if stored else nullcontext()
    with together, _naming(task.name, spec.metric):
        found = evaluate(
            worker.loaded.model,
            worker.loaded.tokenizer,
            mine,
            spec.metric,
            max_length=max_length,
            batch_size=spec.batch_size,
            max_new_tokens=longest,
            labels=labels,
            with_adapter=with_adapter,
            stored=kept,
            on_batch=on_batch,
        )
    return _on_rank0(found.rows)


def score_general(worker: Worker, *, with_adapter: bool = True) -> Scored:
    """Measure the perplexity of every row of the general set. Raises StoppedRun on all workers."""
    name, sha256, rows = _general_set(worker)
    max_length = worker.plan.training.max_length
    decoding = {"max_length": max_length, "general": True}
    with worker.leaving_together():
        found = evaluate_general(
            worker.loaded.model,
            worker.loaded.tokenizer,
            _share(rows),
            max_length=max_length,
            batch_size=worker.plan.evaluation.batch_size,
            with_adapter=with_adapter,
            stored=_stored(worker, name, sha256, "perplexity", decoding, with_adapter),
            on_batch=lambda _: worker.stop_sign.leave(),
        )
    return _on_rank0(found.rows)


def general_scores(worker: Worker, base: Scored, before: Scored, after: Scored) -> GeneralScores | None:
    """Put together what rank 0 knows about general ability around one task; None when it is not measured."""
    if worker.plan.evaluation.general is None:
        return None
    name, sha256, _ = _general_set(worker)
    return GeneralScores(
        dataset=name,
        sha256=sha256,
        num_rows=len(after),
        base=set_score("perplexity", base),
        before=set_score("perplexity", before),
        after=set_score("perplexity", after),
    )


def curve_point(worker: Worker, task: PlannedTask, step: int, *, stored: bool = False) -> CurvePoint:
    """Score the tasks so far on a few rows each, on all workers; scores on rank 0.

    stored: the model is a version's, not one in the middle of training.
    """
    spec = worker.plan.evaluation
    so_far = [
        other for other in (*worker.plan.earlier_tasks, *worker.plan.tasks) if other.index <= task.index
    ]
    answered = {o.name: score_task(worker, o, max_rows=spec.curve_rows, stored=stored) for o in so_far}
    scores = {name: set_score(spec.metric, rows) for name, rows in answered.items() if rows}
    return CurvePoint(step=step, scores=scores)


def curve_steps(num_steps: int, num_points: int) -> set[int]:
    """Spread points evenly over a task's steps, its start and its end left out."""
    steps = {round(k * num_steps / (num_points + 1)) for k in range(1, num_points + 1)}
    return steps - {0, num_steps}


def _general_set(worker: Worker) -> tuple[str, str, list[dict[str, Any]]]:
    planned = worker.plan.general_dataset
    if planned is None:
        return GENERAL_NAME, general_sha256(), list(general_rows())
    rows = read_rows(worker.storage, planned)[: worker.plan.evaluation.max_rows]
    return planned.id, planned.sha256, rows


@contextmanager
def _naming(task: str, metric: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"evaluation of task {task!r} by {metric}, rows from 0: {error}") from error


def _stored(
    worker: Worker, dataset_id: str, sha256: str, metric: str, decoding: Mapping[str, Any], with_adapter: bool
) -> Stored:
    plan = worker.plan
    template = getattr(worker.loaded.tokenizer, "chat_template", None) or ""
    key = output_key(
        base_model=f"{plan.base_model.id}:{plan.base_model_path}",
        revision=plan.base_model.revision or "",
        precision=plan.training.precision,
        adapter_sha256=_adapter_sha256(worker) if with_adapter else None,
        dataset_sha256=sha256,
        template=hashlib.sha256(str(template).encode()).hexdigest(),
        metric=metric,
        decoding=decoding,
    )
    return Stored(StoredOutputs(worker.storage, dataset_id), key)


def _adapter_sha256(worker: Worker) -> str:
    """Hash the adapter's weights and what else decides what they do."""
    settings = worker.plan.peft.model_dump_json()
    return hashlib.sha256(f"{Params.of(worker.loaded.model).digest()} {settings}".encode()).hexdigest()


def _share(rows: Sequence[Mapping[str, Any]]) -> Rows:
    """Return this worker's rows with their numbers."""
    return list(enumerate(rows))[parallel.rank() :: parallel.world_size()]


def _on_rank0(rows: Scored) -> Scored:
    if parallel.world_size() == 1:
        return rows
    gathered: list[Scored] | None = [()] * parallel.world_size() if parallel.rank() == 0 else None
    dist.gather_object(rows, gathered, dst=0)
    return tuple(sorted((row for part in gathered or [] for row in part), key=lambda row: row.row))
