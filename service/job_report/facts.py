"""What a report tells, read from the stored artefacts alone: plans, manifests, predictions and events.

The same artefacts give the same facts, and these the same report, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from service.adapters.manifest import MANIFEST_NAME, PREDICTIONS, Manifest
from service.adapters.storage import Storage, events_key, plan_key
from service.adapters.version_files import read_file
from service.job_report.matrix import general_interval, matrix_of
from service.specs import RunPlan

Facts = dict[str, Any]
"""What report.json holds; plain values only."""

CURVE_POINTS = 500
"""Longest loss curve; a longer one is thinned out evenly."""
COUNTS = ("num_steps", "label_tokens", "total_tokens", "replay_tokens", "final_loss")
TIMES = ("train_s", "strategy_s", "evaluate_s")


def read_facts(storage: Storage, task_dirs: Sequence[str]) -> Facts:
    """Read everything about a job's committed versions, oldest first. Raises FileNotFoundError."""
    manifests = [
        Manifest.model_validate_json(storage.read_bytes(f"{key}/{MANIFEST_NAME}")) for key in task_dirs
    ]
    last = manifests[-1]
    plan = RunPlan.model_validate_json(storage.read_bytes(plan_key(last.run_id)))
    planned = {task.index: task for task in (*plan.earlier_tasks, *plan.tasks)}
    return {
        "schema_version": 1,
        "job_id": last.job_id,
        "adapter": last.adapter,
        "configuration": {
            "base_model": plan.base_model.model_dump(mode="json"),
            "peft": last.peft,
            "strategy": last.strategy,
            "training": plan.training.model_dump(mode="json"),
            "evaluation": plan.evaluation.model_dump(mode="json"),
        },
        "num_planned_tasks": len(planned),
        "tasks": [
            planned[m.task_index].model_dump(mode="json") | {"data_format": m.data_format} for m in manifests
        ],
        "accuracy": matrix_of(storage, task_dirs, manifests),
        "general": [
            _general(storage, key, m) for key, m in zip(task_dirs, manifests, strict=True) if m.general
        ],
        "training": {
            m.task_name: {name: m.training[name] for name in COUNTS if name in m.training} for m in manifests
        },
        "costs_s": {
            m.task_name: {name: m.training[name] for name in TIMES if name in m.training} for m in manifests
        },
        "strategy_figures": {m.task_name: _strategy_figures(m) for m in manifests},
        "curves": {
            "loss": {m.task_name: _loss_curve(storage, m) for m in manifests},
            "scores": {m.task_name: [p.model_dump() for p in m.curve] for m in manifests if m.curve},
        },
        "lost_rows": _lost_rows(storage, task_dirs, manifests),
        "lineage": [
            _lineage(number, key, m)
            for number, (key, m) in enumerate(zip(task_dirs, manifests, strict=True), 1)
        ],
        "environments": _environments(manifests),
    }


def _general(storage: Storage, task_dir: str, manifest: Manifest) -> dict[str, Any]:
    found = manifest.general
    assert found is not None
    return {
        "task": manifest.task_name,
        **found.model_dump(),
        "delta": found.after - found.before,
        "relative_drop": 1 - found.after / found.before,
        "relative_drop_interval_95": general_interval(storage, task_dir, manifest),
    }


def _strategy_figures(manifest: Manifest) -> dict[str, float | None]:
    prefix = "strategy/"
    return {k.removeprefix(prefix): v for k, v in manifest.training.items() if k.startswith(prefix)}


def _lineage(version: int, task_dir: str, manifest: Manifest) -> dict[str, Any]:
    adapter = {n: f.sha256 for n, f in manifest.files.items() if n.startswith("adapter/")}
    return {
        "version": version,
        "task": manifest.task_name,
        "run_id": manifest.run_id,
        "attempt": manifest.attempt,
        "task_dir": task_dir,
        "parent_dir": manifest.parent_dir,
        "adapter_sha256": adapter.get("adapter/adapter_model.safetensors"),
        "code_version": manifest.code_version,
        "created_at": manifest.created_at,
    }


def _environments(manifests: Sequence[Manifest]) -> list[dict[str, Any]]:
    """Each environment once, with the tasks that were trained in it."""
    found: list[dict[str, Any]] = []
    for manifest in manifests:
        same = next((entry for entry in found if entry["environment"] == manifest.environment), None)
        if same:
            same["tasks"].append(manifest.task_name)
        else:
            found.append({"tasks": [manifest.task_name], "environment": manifest.environment})
    return found


def _loss_curve(storage: Storage, manifest: Manifest) -> list[tuple[int, float]]:
    """Step and loss; where an attempt repeated steps of an earlier one, its own count."""
    losses: dict[int, float] = {}
    for attempt in range(1, manifest.attempt + 1):
        for event in _events(storage, manifest.run_id, attempt):
            if event["type"] == "step" and event["data"]["task"] == manifest.task_name:
                losses[int(event["data"]["step"])] = float(event["data"]["loss"])
    steps = sorted(losses)
    if len(steps) > CURVE_POINTS:
        steps = [steps[round(k * (len(steps) - 1) / (CURVE_POINTS - 1))] for k in range(CURVE_POINTS)]
    return [(step, losses[step]) for step in steps]


def _events(storage: Storage, run_id: str, attempt: int) -> Iterator[dict[str, Any]]:
    folder = events_key(run_id, attempt)
    for name in storage.names(folder):
        for line in storage.read_bytes(f"{folder}/{name}").splitlines():
            yield json.loads(line)


def _lost_rows(
    storage: Storage, task_dirs: Sequence[str], manifests: Sequence[Manifest]
) -> dict[str, list[int]]:
    """For each task: the evaluation rows that were right after its training and are wrong now.

    Right is a score of at least one half. Rows count from 0. Nothing is said for perplexity.
    """
    lost = {}
    if manifests[-1].evaluation.get("metric") == "perplexity":
        return {}
    for key, manifest in zip(task_dirs[:-1], manifests[:-1], strict=True):
        name = f"{PREDICTIONS}/{manifest.task_name}.jsonl"
        then = _right(storage, key, manifest, name)
        now = _right(storage, task_dirs[-1], manifests[-1], name)
        lost[manifest.task_name] = sorted(row for row, right in then.items() if right and not now.get(row))
    return lost


def _right(storage: Storage, task_dir: str, manifest: Manifest, name: str) -> dict[int, bool]:
    rows = (json.loads(line) for line in read_file(storage, task_dir, manifest.files, name).splitlines())
    return {row["row"]: row["score"] >= 0.5 for row in rows}
