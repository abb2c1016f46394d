"""The manifest of a trained task: written last, it makes the task's files a version.

A task directory runs/<run>/a<n>/tasks/<i>/ holds
    adapter/        adapter_config.json, adapter_model.safetensors      (PEFT's format)
    state/          memory/ (replay references, Fisher ...), strategy.*  (what the next task needs)
    predictions/    <task>.jsonl: row, answer, reference and score of every evaluated row, after the task;
                    base/<task>.jsonl by the base model, before/<task>.jsonl before the task was trained;
                    general/base.jsonl, before.jsonl, after.jsonl: general ability around the task
    manifest.json   this file, last
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from service.specs import BaseModelSpec

MANIFEST_NAME = "manifest.json"
ADAPTER, STATE, PREDICTIONS = "adapter", "state", "predictions"


class ManifestFile(BaseModel):
    """Size and checksum of one file of the version."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    bytes: int
    sha256: str


class GeneralScores(BaseModel):
    """General ability around one task: 1 / perplexity on the general set, in 0..1; higher is better."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    dataset: str
    """"default" or a data set's id."""
    sha256: str
    num_rows: int
    base: float
    """Of the base model without an adapter."""
    before: float
    """Right before the task was trained."""
    after: float


class CurvePoint(BaseModel):
    """Scores in the middle of a task's training, on the first rows of each task."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    step: int
    """Optimizer steps of this task so far; 0 is before its training."""
    scores: dict[str, float]


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
    before_scores: dict[str, float] = {}
    """Scores right before this task was trained, of tasks that no earlier version has scored."""
    num_eval_rows: dict[str, int]
    evaluation: dict[str, Any] = {}
    """The job's EvaluationSpec: metric, rows, decoding."""
    general: GeneralScores | None = None
    curve: list[CurvePoint] = []
    training: dict[str, float | None]
    """num_steps, label_tokens, total_tokens, replay_tokens, final_loss, train_s, strategy_s, evaluate_s."""
    environment: dict[str, str]
    """Package versions, CPU model, threads: bit-equality holds for equal values only."""
    code_version: str
    created_at: str
