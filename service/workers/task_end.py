"""After a task is trained: score all tasks on all workers, then store the version with its manifest last."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from clcore.engine import parallel
from clcore.engine.tasks import DataFormat, row_format
from clcore.evaluation.exact_match import Answer, exact_match_answers
from service.adapters.manifest import MANIFEST_NAME, Manifest, ManifestFile
from service.adapters.storage import task_key
from service.specs import PlannedTask
from service.workers.model import save_adapter
from service.workers.rows import read_rows

if TYPE_CHECKING:
    from service.workers.train_loop import Worker


@dataclasses.dataclass
class Scores:
    """One row of the accuracy matrix and what stands behind it. Filled on every worker; answers on rank 0."""

    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    base_scores: dict[str, float] = dataclasses.field(default_factory=dict)
    num_rows: dict[str, int] = dataclasses.field(default_factory=dict)
    answers: dict[str, list[Answer]] = dataclasses.field(default_factory=dict)


def finish_task(
    worker: Worker, task: PlannedTask, version: int, parent_dir: str | None, summary: dict[str, float]
) -> str:
    """Evaluate after a task and store it; returns the task's folder on every worker once it is complete.

    Raises CancelledRun when the run is cancelled between two evaluations.
    """
    start = time.perf_counter()
    found = _evaluate_all(worker, task)
    summary = {**summary, "evaluate_s": time.perf_counter() - start}
    worker.emit(
        "task.evaluated",
        task=task.name,
        task_index=task.index,
        scores=found.scores,
        base_scores=found.base_scores,
        seconds=summary["evaluate_s"],
    )
    key = task_key(worker.plan.run_id, worker.attempt, task.index)
    if parallel.rank() == 0:
        _store(worker, task, key, version, parent_dir, found, summary)
    if parallel.world_size() > 1:
        dist.barrier()
    return key


# ------------------------------------------------------------------------------------------------- evaluation


def _evaluate_all(worker: Worker, task: PlannedTask) -> Scores:
    """Score every task of the job; the untrained model only once, after the run's first task."""
    found = Scores()
    plan = worker.plan
    for other in (*plan.earlier_tasks, *plan.tasks):
        worker.stop_if_cancelled()
        rows = read_rows(worker.storage, other.eval_dataset)[: plan.evaluation.max_rows]
        answers = _answer(worker, other, rows, with_adapter=True)
        found.scores[other.name] = _share_right(answers)
        found.num_rows[other.name] = len(rows)
        found.answers[other.name] = _on_rank0(answers)
        if task.index == plan.tasks[0].index and other in plan.tasks:
            found.base_scores[other.name] = _share_right(_answer(worker, other, rows, with_adapter=False))
    return found


def _answer(
    worker: Worker, task: PlannedTask, rows: list[dict[str, Any]], *, with_adapter: bool
) -> list[Answer]:
    """Answer this worker's share of a task's rows."""
    rank, world = parallel.rank(), parallel.world_size()

    def on_batch(done: int) -> None:
        if with_adapter:
            done_rows = min(done * world, len(rows))
            worker.emit(
                "task.evaluating", flush=False, task=task.name, done_rows=done_rows, num_rows=len(rows)
            )

    return exact_match_answers(
        worker.loaded.model,
        worker.loaded.tokenizer,
        list(enumerate(rows))[rank::world],
        max_length=task.training.max_length,
        batch_size=worker.plan.evaluation.batch_size,
        max_new_tokens=worker.plan.evaluation.max_new_tokens or _longest_answer(worker, rows),
        with_adapter=with_adapter,
        on_batch=on_batch,
    )


def _longest_answer(worker: Worker, rows: list[dict[str, Any]]) -> int:
    """Tokens of the longest reference over all rows: the limit must not depend on a worker's share."""
    tokenizer = worker.loaded.tokenizer
    texts = [row["messages"][-1]["content"] if "messages" in row else row["completion"] for row in rows]
    return max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts) + 1


def _share_right(answers: list[Answer]) -> float:
    right, count = parallel.sum_over_ranks([sum(answer.score for answer in answers), len(answers)])
    return right / count


def _on_rank0(answers: list[Answer]) -> list[Answer]:
    if parallel.world_size() == 1:
        return answers
    gathered: list[list[Answer]] | None = [[]] * parallel.world_size() if parallel.rank() == 0 else None
    dist.gather_object(answers, gathered, dst=0)
    return sorted((a for part in gathered or [] for a in part), key=lambda answer: answer.row)


# ---------------------------------------------------------------------------------------------------- storing


def _store(
    worker: Worker,
    task: PlannedTask,
    key: str,
    version: int,
    parent_dir: str | None,
    found: Scores,
    summary: dict[str, float],
) -> None:
    """Write adapter, memory snapshot and answers, then the manifest that makes them a version."""
    plan, storage = worker.plan, worker.storage
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_adapter(worker.loaded.model, folder / "adapter", plan.base_model.id)
        worker.memory.snapshot(version, folder / "state")
        (folder / "predictions").mkdir()
        for task_name, answers in found.answers.items():
            lines = (json.dumps(dataclasses.asdict(answer)) + "\n" for answer in answers)
            (folder / "predictions" / f"{task_name}.jsonl").write_text("".join(lines))
        files = {
            path.relative_to(folder).as_posix(): _describe(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        storage.put_folder(str(folder), key)
    manifest = Manifest(
        job_id=plan.job_id,
        run_id=plan.run_id,
        attempt=worker.attempt,
        task_index=task.index,
        task_name=task.name,
        adapter=plan.adapter,
        parent_dir=parent_dir,
        base_model=plan.base_model,
        base_model_path=plan.base_model_path,
        peft=plan.peft.model_dump(mode="json"),
        strategy=[spec.model_dump(mode="json") for spec in plan.strategy],
        data_format=_data_format(worker, task),
        files=files,
        dataset_sha256={task.dataset.id: task.dataset.sha256, task.eval_dataset.id: task.eval_dataset.sha256},
        memory_version=version,
        scores=found.scores,
        base_scores=found.base_scores,
        num_eval_rows=found.num_rows,
        training=summary,
        environment=_environment(),
        code_version=importlib.metadata.version("cl-peft"),
        created_at=datetime.now(UTC).isoformat(),
    )
    storage.write_bytes(f"{key}/{MANIFEST_NAME}", manifest.model_dump_json(indent=1).encode())


def _data_format(worker: Worker, task: PlannedTask) -> DataFormat:
    return row_format(read_rows(worker.storage, task.dataset)[0])


def _describe(path: Path) -> ManifestFile:
    data = path.read_bytes()
    return ManifestFile(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _environment() -> dict[str, str]:
    packages = ("torch", "transformers", "peft", "ray", "numpy")
    return {
        **{name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "processor": _processor(),
        "torch_threads": str(torch.get_num_threads()),
        "world_size": str(parallel.world_size()),
        "mkl_cbwr": os.environ.get("MKL_CBWR", ""),
    }


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
