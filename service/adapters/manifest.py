"""The manifest of a trained task: written last, it makes the task's files a version.

A task directory runs/<run>/a<n>/tasks/<i>/ holds
    adapter/        adapter_config.json, adapter_model.safetensors      (PEFT's format)
    state/          memory/ (replay references, Fisher ...), strategy.*  (what the next task needs)
    predictions/    <task>.jsonl: prompt, answer, reference, score for every evaluated row
    manifest.json   this file, last
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from service.specs import BaseModelSpec

MANIFEST_NAME = "manifest.json"


class ManifestFile(BaseModel):
    """Size and checksum of one file of the version."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a version is made of and where it comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[1] = 1
    job_id: str
    run_id: str
    attempt: int
    task_index: int
    task_name: str
    adapter: str
    parent_dir: str | None
    """Task directory of the version this one was trained from; None for the first."""
    base_model: BaseModelSpec
    base_model_path: str
    peft: dict[str, Any]
    strategy: list[dict[str, Any]]
    data_format: Literal["completion", "chat"]
    """How rows were written: prompt/completion text, or messages through the chat template."""
    files: dict[str, ManifestFile]
    """Path relative to the task directory -> size and checksum; the manifest itself is not listed."""
    dataset_sha256: dict[str, str]
    memory_version: int
    scores: dict[str, float]
    """The row of the accuracy matrix: task name -> score in 0..1 after this task."""
    base_scores: dict[str, float]
    """Scores of the untrained model for tasks that were measured here for the first time."""
    num_eval_rows: dict[str, int]
    training: dict[str, float]
    """num_steps, label_tokens, total_tokens, replay_tokens, final_loss, train_s, strategy_s, evaluate_s."""
    environment: dict[str, str]
    """Package versions, CPU model, threads: bit-equality holds for equal values only."""
    code_version: str
    created_at: str
