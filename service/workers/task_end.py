"""Around a task's training: what is measured before and after it, and the version, its manifest last."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clcore.engine import parallel
from clcore.engine.tasks import DataFormat, row_format
from clcore.evaluation.runner import set_score
from service.adapters.manifest import MANIFEST_NAME, PREDICTIONS, CurvePoint, Manifest, ManifestFile
from service.adapters.storage import task_key
from service.scratch import scratch_folder
from service.specs import PlannedTask
from service.workers.model import save_adapter
from service.workers.rows import read_rows
from service.workers.scoring import Scored, curve_point, general_scores, score_general, score_task
from service.workers.stops import Stop, StoppedRun

if TYPE_CHECKING:
    from service.workers.train_loop import Worker


@dataclasses.dataclass
class BeforeTask:
    """What was measured before a task was trained: rows on rank 0, empty on other workers."""

    before: dict[str, Scored] = dataclasses.field(default_factory=dict)
    """The task, if no earlier version has answered it, answered by the version that training starts from."""
    general: Scored | None = None
    """None where nothing is measured, or where the version is the base model itself."""
    curve: list[CurvePoint] = dataclasses.field(default_factory=list)
    """The point at step 0, where the job asks for curves."""
    seconds: float = 0.0


def measure_before(worker: Worker, task: PlannedTask) -> BeforeTask:
    """Measure on all workers what cannot be known after training. Raises StoppedRun."""
    start = time.perf_counter()
    found, plan = BeforeTask(), worker.plan
    is_first = task.index == plan.tasks[0].index
    is_untrained = is_first and plan.parent is None  # a fresh adapter changes nothing
    if is_first and not is_untrained:
        found.before[task.name] = score_task(worker, task)
    if plan.evaluation.general is not None and not is_untrained:
        worker.stop_if_asked()
        found.general = score_general(worker)
    if plan.evaluation.curve_points:
        found.curve = [curve_point(worker, task, 0, stored=True)]
    found.seconds = time.perf_counter() - start
    return found


def finish_task(
    worker: Worker,
    task: PlannedTask,
    version: int,
    parent_dir: str | None,
    summary: Mapping[str, float],
    before: BeforeTask,
    curve: Sequence[CurvePoint],
) -> str:
    """Score every task of the job and store the version.

    curve: the points inside the task's training. Returns the version's folder on every worker, once it is
    complete. Raises StoppedRun when the run is to stop during the evaluations or, for a newer attempt, before
    the version is complete.
    """
    start = time.perf_counter()
    plan = worker.plan
    after: dict[str, Scored] = {}
    base: dict[str, Scored] = {}
    for other in (*plan.earlier_tasks, *plan.tasks):
        worker.stop_if_asked()
        after[other.name] = score_task(worker, other, shown_for=task)
        if task.index == plan.tasks[0].index and other in plan.tasks:
            base[other.name] = score_task(worker, other, with_adapter=False)
    general_base: Scored = ()
    general_after: Scored = ()
    if plan.evaluation.general is not None:
        worker.stop_if_asked()
        general_base, general_after = score_general(worker, with_adapter=False), score_general(worker)
    general_before = general_base if before.general is None else before.general
    if plan.evaluation.curve_points:
        curve = [*before.curve, *curve, curve_point(worker, task, task.steps, stored=True)]
    seconds = before.seconds + time.perf_counter() - start
    key = task_key(plan.run_id, worker.attempt, task.index)
    with worker.leaving_together():
        if parallel.rank() == 0:
            general = general_scores(worker, general_base, general_before, general_after)
            measured: dict[str, Any] = {
                "scores": _scores(worker, after),
                "base_scores": _scores(worker, base),
                "before_scores": _scores(worker, before.before),
                "general": general,
            }
            worker.emit(
                "task.evaluated",
                task=task.name,
                task_index=task.index,
                seconds=seconds,
                **{**measured, "general": general.model_dump() if general else None},
            )
            predictions = {
                **after,
                **{f"base/{name}": rows for name, rows in base.items()},
                **{f"before/{name}": rows for name, rows in before.before.items()},
            }
            if general:
                predictions["general/base"] = general_base
                predictions["general/before"] = general_before
                predictions["general/after"] = general_after
            _store(
                worker,
                task,
                key,
                predictions,
                parent_dir=parent_dir,
                memory_version=version,
                num_eval_rows={name: len(rows) for name, rows in after.items()},
                curve=list(curve),
                training={**summary, "evaluate_s": seconds},
                **measured,
            )
    return key


def _scores(worker: Worker, answered: Mapping[str, Scored]) -> dict[str, float]:
    return {name: set_score(worker.plan.evaluation.metric, rows) for name, rows in answered.items()}


# ---------------------------------------------------------------------------------------------------- storing


def _store(
    worker: Worker,
    task: PlannedTask,
    key: str,
    predictions: Mapping[str, Scored],
    *,
    memory_version: int,
    **fields: Any,
) -> None:
    """Write adapter, memory snapshot and answers, then the manifest that makes them a version.

    Raises StoppedRun, without a manifest, when a newer attempt may work.
    """
    plan, storage = worker.plan, worker.storage
    with scratch_folder() as folder:
        save_adapter(worker.loaded.model, folder / "adapter", plan.base_model.id)
        worker.memory.snapshot(memory_version, folder / "state")
        for set_name, rows in predictions.items():
            path = folder / PREDICTIONS / f"{set_name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
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
        base_model=plan.base_model,
        base_model_path=plan.base_model_path,
        peft=plan.peft.model_dump(mode="json"),
        strategy=[spec.model_dump(mode="json") for spec in plan.strategy],
        data_format=_data_format(worker, task),
        files=files,
        dataset_sha256={task.dataset.id: task.dataset.sha256, task.eval_dataset.id: task.eval_dataset.sha256},
        memory_version=memory_version,
        evaluation=plan.evaluation.model_dump(mode="json"),
        environment=_environment(),
        code_version=importlib.metadata.version("cl-peft"),
        created_at=datetime.now(UTC).isoformat(),
        **fields,
    )
    if worker.stop_sign.look(now=True) == Stop.SUPERSEDED:
        raise StoppedRun(Stop.SUPERSEDED)
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
