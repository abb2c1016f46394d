"""What travels over the wire and through storage: job specifications and run plans.

A user writes a JobSpec. The planner resolves it into a RunPlan, which is stored beside the run and is all
that a worker reads. Strategy parameters stay plain here: their names, ranges and defaults live beside each
strategy in clcore.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StringConstraints,
    field_validator,
    model_validator,
)

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
DatasetId = Annotated[str, StringConstraints(pattern=r"^ds_[0-9a-z]{1,40}$")]


class Spec(BaseModel):
    """Base of all wire types: unknown fields are errors, values are not changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, value: Any) -> Any:
        refuse_broken_text(value)
        return value


def refuse_broken_text(value: Any) -> None:
    """Raise ValueError for a string, anywhere inside, that cannot be written as UTF-8."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{value[:50]!r} holds half of a surrogate pair, which is no text") from error
    elif isinstance(value, dict):
        for key, item in value.items():
            refuse_broken_text(key)
            refuse_broken_text(item)
    elif isinstance(value, list | tuple):
        for item in value:
            refuse_broken_text(item)


class BaseModelSpec(Spec):
    """The frozen language model that the adapter belongs to."""

    id: str = Field(min_length=1, max_length=200)
    revision: str | None = None


class LoraSpec(Spec):
    """Low-rank adapters (Hu et al. 2021): W x + alpha/r * B A x."""

    type: Literal["lora"] = "lora"
    r: StrictInt = Field(8, ge=1, le=1024)
    lora_alpha: StrictInt = Field(16, ge=1)
    lora_dropout: StrictFloat = Field(0.0, ge=0, lt=1)
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Module name endings; None takes PEFT's choice for the architecture."""


class StrategySpec(BaseModel):
    """A strategy by its registry name; every other field is a parameter of that strategy."""

    model_config = ConfigDict(extra="allow", frozen=True)
    type: str

    @property
    def params(self) -> dict[str, Any]:
        """The parameters as given, without the type."""
        return dict(self.model_extra or {})


class TrainingSpec(Spec):
    """How each task is trained. A task may override single fields."""

    backend: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    num_workers: StrictInt = Field(1, ge=1, le=1024)
    precision: Literal["fp32", "bf16"] = "fp32"
    learning_rate: StrictFloat = Field(1e-3, gt=0, le=10, allow_inf_nan=False)
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: StrictInt = Field(0, ge=0)
    weight_decay: StrictFloat = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    max_grad_norm: StrictFloat = Field(1.0, gt=0, allow_inf_nan=False)
    batch_size: StrictInt = Field(8, ge=1, le=65536)
    """Rows of new data per optimizer step over all workers."""
    micro_batch_size: StrictInt = Field(8, ge=1, le=4096)
    """Rows per forward pass on one worker."""
    max_length: StrictInt = Field(512, ge=8, le=1_000_000)
    """Tokens per row; longer prompts lose their middle, completions are never cut."""
    seed: StrictInt = Field(0, ge=0, lt=2**31)
    checkpoint_every_steps: StrictInt = Field(0, ge=0)
    """Steps between checkpoints inside a task; 0 saves at task ends only."""


class TaskSpec(Spec):
    """One task of the sequence."""

    name: Name
    dataset: DatasetId
    eval_dataset: DatasetId | None = None
    """Rows to score; None scores the training rows' data set, which flatters."""
    epochs: StrictFloat | None = Field(None, gt=0, le=1000, allow_inf_nan=False)
    steps: StrictInt | None = Field(None, gt=0, le=10_000_000)
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Fields of TrainingSpec that differ for this task, such as learning_rate or schedule."""

    @field_validator("dataset", "eval_dataset", mode="before")
    @classmethod
    def _no_path_or_url(cls, value: Any) -> Any:
        if isinstance(value, str) and ("/" in value or "\\" in value or "." in value):
            raise ValueError(
                f"{value!r} looks like a path or URL; "
                "upload the rows to POST /v1/datasets and give the id (ds_...)"
            )
        return value

    @model_validator(mode="after")
    def _one_length(self) -> TaskSpec:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        return self


class EvaluationSpec(Spec):
    """How tasks are scored: all of them after each task, and general ability before and after it."""

    metric: Literal["exact_match", "token_f1", "rouge_l", "likelihood", "perplexity"] = "exact_match"
    max_rows: StrictInt | None = Field(None, ge=1)
    """Score the first rows only; None scores all."""
    batch_size: StrictInt = Field(16, ge=1, le=4096)
    max_new_tokens: StrictInt | None = Field(None, ge=1, le=4096)
    """None takes the longest reference answer plus its end token."""
    general: str | None = "default"
    """What general ability is measured on, by perplexity: "default" is a set of texts that comes with the
    project, a data set's id takes your own rows, None measures nothing."""
    curve_points: StrictInt = Field(0, ge=0, le=100)
    """How often the tasks are scored while a task trains, evenly spread over its steps; 0 never does."""
    curve_rows: StrictInt = Field(32, ge=1)
    """Rows of each task that a point of such a curve scores."""

    @field_validator("general")
    @classmethod
    def _default_or_data_set(cls, general: str | None) -> str | None:
        if general is not None and not re.fullmatch(r"default|ds_[0-9a-z]{1,40}", general):
            raise ValueError("must be 'default', the id of a data set (ds_...) or null")
        return general


class LoggingSpec(Spec):
    """What a job writes beside its events."""

    tensorboard: StrictBool = False
    """Write TensorBoard event files under runs/<run>/a<n>/tensorboard in storage."""


class PromotionSpec(Spec):
    """Which alias moves to a version when it is committed."""

    alias: Name = "live"

    @field_validator("alias")
    @classmethod
    def _not_a_version(cls, alias: str) -> str:
        if re.match(r"^v\d+$", alias):
            raise ValueError(f"alias {alias!r} looks like a version; versions never move")
        return alias


class LimitsSpec(Spec):
    """When a job is given up."""

    deadline_s: StrictFloat | None = Field(None, gt=0, le=10 * 365 * 86400, allow_inf_nan=False)
    """Seconds from the moment when a run is queued until it must have ended; a pause does not count. A run
    that is late stops at its next step and fails with reason deadline; finished tasks stay."""
    max_attempts: StrictInt | None = Field(None, ge=1, le=1000)
    """Attempts without a newly finished task before a run fails; None takes the service's setting."""


class JobSpec(Spec):
    """A sequence of tasks for one adapter."""

    name: Name
    adapter: Name | None = None
    """Name of the adapter; None takes the job's name."""
    base_model: BaseModelSpec
    peft: LoraSpec = LoraSpec()
    strategy: tuple[StrategySpec, ...] = (StrategySpec(type="none"),)
    tasks: tuple[TaskSpec, ...]
    training: TrainingSpec = TrainingSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    promotion: PromotionSpec = PromotionSpec()
    logging: LoggingSpec = LoggingSpec()
    limits: LimitsSpec = LimitsSpec()
    priority: StrictInt = Field(0, ge=-100, le=100)
    """Among your own waiting jobs, the higher one starts first."""
    labels: dict[str, str] = Field(default_factory=dict, max_length=64)

    @field_validator("strategy", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @field_validator("tasks")
    @classmethod
    def _names_differ(cls, tasks: tuple[TaskSpec, ...]) -> tuple[TaskSpec, ...]:
        if not 1 <= len(tasks) <= 1000:  # here, so that a bad task is not also reported as a missing one
            raise ValueError(f"a job has 1 to 1000 tasks, got {len(tasks)}")
        names = [task.name for task in tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"duplicate task name: {', '.join(twice)}")
        return tasks


# -------------------------------------------------------------------------------------- resolved, for workers


class PlannedDataset(Spec):
    """A data set as a worker finds it: storage path, size and checksum."""

    id: str
    path: str
    """Relative to the storage root; JSON lines."""
    sha256: str
    num_rows: int


class PlannedTask(Spec):
    """One task with nothing left to decide."""

    index: int
    """Position in the job, counted from 0 over all runs."""
    name: str
    dataset: PlannedDataset
    eval_dataset: PlannedDataset
    steps: int
    training: TrainingSpec


class ParentVersion(Spec):
    """The committed version that a run continues from."""

    version: int
    task_dir: str
    """Relative to the storage root; holds manifest.json."""


class RunPlan(Spec):
    """Everything that one run does, resolved; stored as runs/<run>/plan.json."""

    schema_version: Literal[1] = 1
    run_id: str
    job_id: str
    adapter: str
    base_model: BaseModelSpec
    base_model_path: str
    """A local folder, or a hub id with base_model.revision."""
    peft: LoraSpec
    strategy: tuple[StrategySpec, ...]
    tasks: tuple[PlannedTask, ...]
    """The tasks that this run trains, in order."""
    earlier_tasks: tuple[PlannedTask, ...] = ()
    """Tasks of the job that earlier runs committed: evaluated again, never trained again."""
    training: TrainingSpec
    evaluation: EvaluationSpec
    general_dataset: PlannedDataset | None = None
    """The rows of evaluation.general where that is a data set's id."""
    logging: LoggingSpec = LoggingSpec()
    parent: ParentVersion | None = None

    @property
    def generation(self) -> str:
        """Names the adapter that strategy state belongs to; merging and starting afresh makes a new one."""
        return f"{self.job_id}/0"
