"""fit_task: the training loop, the only one.

One step is one global batch. Its rows depend on (seed, task, step) alone; ranks and micro-batches only split
them, and the loss is the summed negative log-likelihood over the label tokens of the whole step. So the
result does not depend on the number of workers or on the micro-batch size beyond float rounding.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clcore.engine import parallel
from clcore.engine.adapters import folded_pairs
from clcore.engine.config import check_types
from clcore.engine.errors import ConfigError, DataError, StateError, TrainingDivergedError
from clcore.engine.loss import RowLosses, completion_nll
from clcore.engine.memory import MemorySession
from clcore.engine.params import Params
from clcore.engine.strategy import Strategy
from clcore.engine.tasks import IGNORE, Example, collate, derive_seed, num_label_tokens

SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How one task is trained. Batch sizes count rows, lengths count tokens."""

    num_steps: int
    learning_rate: float
    batch_size: int = 8
    """New rows per optimizer step, over all workers."""
    micro_batch_size: int = 8
    """Rows per forward pass on one worker."""
    schedule: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: str = "fp32"
    """"bf16" runs forward and backward under autocast; parameters stay as they are."""
    backend: str = "ddp"
    seed: int = 0
    checkpoint_every_steps: int = 0
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("num_steps", "batch_size", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "checkpoint_every_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a positive finite number, got {value}")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"precision must be fp32 or bf16, got {self.precision!r}")
        parallel.check_backend(self.backend)


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What is known after an optimizer step. step counts from 1; loss in nats per label token."""

    step: int
    num_steps: int
    loss: float
    learning_rate: float
    num_tokens: int
    tokens_per_s: float
    eta_s: float


@dataclasses.dataclass(frozen=True)
class FitResult:
    """How a task ended. Counts are over all workers, times are this worker's.

    Both include what a resumed state had counted.
    """

    is_stopped: bool
    num_steps: int
    final_loss: float
    memory_version: int
    label_tokens: int
    total_tokens: int
    replay_tokens: int
    train_s: float
    strategy_s: float
    metrics: Mapping[str, float]


def fit_task(
    model: nn.Module,
    strategy: Strategy,
    dataset: Sequence[Example],
    *,
    task_id: str,
    config: TrainConfig,
    memory: MemorySession,
    resume: Mapping[str, Any] | None = None,
    on_step: Callable[[StepReport], None] = lambda report: None,  # noqa: ARG005
    should_stop: Callable[[], bool] = lambda: False,
    on_checkpoint: Callable[[dict[str, Any]], None] = lambda state: None,  # noqa: ARG005
) -> FitResult:
    """Train one task on every process of the group and commit what the strategy learnt about it to memory.

    Starts a fresh optimizer. resume is a state that on_checkpoint received: training goes on as if never
    interrupted. should_stop is asked on rank 0 before each step; when it says yes, on_checkpoint gets a state
    and training ends without after_training. Reseeds torch's generator before every step, so that dropout is
    reproducible. A strategy that owns the adapter's structure leaves one plain adapter behind; stopped in the
    middle of a task it leaves the model as it is; resume takes the model as it was when the task started,
    not the half-trained one. Callbacks see the model in training: its base weights may hold earlier pairs.
    What on_step takes is not counted as training time.

    Raises DataError for an empty data set or a row without labels, StateError for a session that another
    task has committed and for a resume from another model than the task started with, TrainingDivergedError
    when the loss is no longer finite.
    """
    if not dataset:
        raise DataError(f"task {task_id!r} has no rows to train on")
    if memory.is_committed:
        raise StateError(
            f"the memory session {memory.op_id!r} was committed; give task {task_id!r} the next one, "
            "session.next_task(op_id=...)"
        )
    start = Params.of(model).digest()
    if resume and resume.get("start", start) != start:
        raise StateError(
            f"task {task_id!r} started from other parameters: resume with the model as it was before the task"
        )
    clock = _Clock(resume or {})
    with clock.strategy():
        if resume:
            strategy.load_state_dict(resume["strategy"])
        model = strategy.prepare_model(model, task_id, memory)
    wrapped = parallel.wrap(model, config.backend)
    params = Params.of(wrapped)
    device = next(iter(params.values())).device
    optimizer = torch.optim.AdamW(params.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    with clock.strategy():
        strategy.bind(wrapped, params, memory)
        dataset = strategy.before_training(task_id, dataset)
    first_step = _restore(resume, params, optimizer) if resume else 0
    order = _RowOrder(len(dataset), derive_seed(config.seed, task_id, "order"))
    totals = np.array((resume or {}).get("totals", (0, 0, 0)), dtype=np.int64)
    loss, is_stopped = math.nan, False
    wrapped.train()

    def state_after(step: int) -> dict[str, Any]:
        counted = {"start": start, "totals": totals.tolist(), **clock.state()}
        return {"step": step, **counted, **_training_state(params, optimizer, strategy)}

    # bf16 would round away much of what the earlier pairs add to a weight.
    with folded_pairs(wrapped) if config.precision == "fp32" else nullcontext():
        for step in range(first_step, config.num_steps):
            # Before mix_batch: a state taken here must not have seen this step's draw.
            if parallel.sum_over_ranks([float(parallel.rank() == 0 and should_stop())])[0]:
                is_stopped = True
                on_checkpoint(state_after(step))
                break
            rows = [dataset[i] for i in order.take(step * config.batch_size, config.batch_size)]
            with clock.strategy():
                mixed = strategy.mix_batch(rows, step=step)
            micro_batches = _split(mixed, config.micro_batch_size)
            label_tokens = sum(map(num_label_tokens, mixed))  # the same rows on every rank
            if not label_tokens:
                raise DataError(f"step {step} of task {task_id!r} has no label token in {len(mixed)} rows")

            torch.manual_seed(derive_seed(config.seed, task_id, step, parallel.rank()))
            optimizer.zero_grad(set_to_none=True)
            loss = _backward(wrapped, strategy, micro_batches, label_tokens, config, device, clock)
            if not math.isfinite(loss):
                raise TrainingDivergedError(
                    f"the loss of task {task_id!r} is {loss} at step {step + 1}; lower learning_rate"
                )
            learning_rate = scheduled_learning_rate(config, step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            with clock.strategy():
                strategy.modify_gradients(params)
            nn.utils.clip_grad_norm_(params.values(), config.max_grad_norm)
            before = params.copies() if strategy.edits_update else {}
            optimizer.step()
            with clock.strategy(), torch.no_grad():
                strategy.modify_update(params, before)

            num_new, num_all = (sum(len(e["input_ids"]) for e in part) for part in (rows, mixed))
            totals += (label_tokens, num_all, num_all - num_new)
            report = clock.report(step, first_step, config.num_steps, loss, learning_rate, num_all)
            with clock.stopped():  # a caller may score tasks here
                on_step(report)
            due = config.checkpoint_every_steps and (step + 1) % config.checkpoint_every_steps == 0
            if due and step + 1 < config.num_steps:
                on_checkpoint(state_after(step + 1))

    optimizer.zero_grad(set_to_none=True)
    metrics: Mapping[str, float] = {}
    if not is_stopped:
        with clock.strategy():
            strategy.after_training(task_id, dataset)
            metrics = strategy.metrics()
            model = strategy.release_model(model, task_id)
        memory.version = parallel.from_rank0(memory.commit() if parallel.rank() == 0 else 0)
        memory.is_committed = True  # on every rank
    label_total, token_total, replay_total = map(int, totals)
    return FitResult(
        is_stopped=is_stopped,
        num_steps=config.num_steps,
        final_loss=loss,
        memory_version=memory.version,
        label_tokens=label_total,
        total_tokens=token_total,
        replay_tokens=replay_total,
        train_s=clock.total_s,
        strategy_s=clock.strategy_s,
        metrics=metrics,
    )


def scheduled_learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate of a step (from 0): linear warm-up, then constant, linear or cosine to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    if config.schedule == "linear":
        return config.learning_rate * (1 - progress)
    if config.schedule == "cosine":
        return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate


def _backward(
    model: nn.Module,
    strategy: Strategy,
    micro_batches: Sequence[Sequence[Example]],
    label_tokens: int,
    config: TrainConfig,
    device: torch.device,
    clock: _Clock,
) -> float:
    """Accumulate the gradient over this rank's micro-batches; return the global loss without penalties."""
    nll_sum = 0.0
    for i, examples in enumerate(micro_batches):
        batch = collate(examples, config.pad_token_id, device)
        with (
            parallel.no_gradient_sync(model, skip=i + 1 < len(micro_batches)),
            torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"),
        ):
            nll, num_labels = completion_nll(model, batch)
            # Gradients are averaged over ranks, so the loss is scaled up to become a sum.
            scale = parallel.world_size() / label_tokens
            loss: Tensor = nll.sum() * scale
            with clock.strategy():
                outputs = RowLosses(nll, num_labels, [e.get("ref") for e in examples], scale)
                loss = strategy.modify_loss(loss, batch=batch, outputs=outputs)
            loss.backward()  # type: ignore[no-untyped-call]
        nll_sum += float(nll.sum().detach())
    return parallel.sum_over_ranks([nll_sum])[0] / label_tokens


def _split(rows: Sequence[Example], micro_batch_size: int) -> list[list[Example]]:
    """Return this rank's share of the rows in micro-batches, as many on every rank."""
    rank, world = parallel.rank(), parallel.world_size()
    mine = list(rows[rank::world])
    if len(mine) < math.ceil(len(rows) / world):  # keep ranks in step with a row that carries no loss
        blank = rows[0]["input_ids"]
        mine.append({"input_ids": blank, "labels": torch.full_like(blank, IGNORE)})
    return [mine[i : i + micro_batch_size] for i in range(0, len(mine), micro_batch_size)]


class _RowOrder:
    """An endless stream of row numbers: one permutation after the other, the same on every rank."""

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows, self.seed = num_rows, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def take(self, start: int, count: int) -> list[int]:
        """Return rows start .. start + count of the stream."""
        return [self._at(i) for i in range(start, start + count)]

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_rows)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
        return int(self._permutation[offset])


def _training_state(params: Params, optimizer: torch.optim.Optimizer, strategy: Strategy) -> dict[str, Any]:
    """Everything that the next step depends on beside its number, data, base model and memory."""
    moments = [
        {key: value.detach().clone() for key, value in optimizer.state[parameter].items()}
        for parameter in params.values()
    ]
    return {"params": params.copies(), "optimizer": moments, "strategy": strategy.state_dict()}


def _restore(state: Mapping[str, Any], params: Params, optimizer: torch.optim.Optimizer) -> int:
    """Put back what _training_state took; arrays may be numpy. Return the step to go on with."""
    params.assign({name: torch.as_tensor(value) for name, value in state["params"].items()})
    for parameter, moments in zip(params.values(), state["optimizer"], strict=True):
        optimizer.state[parameter] = {
            key: torch.as_tensor(np.copy(value)).to(parameter.device if key != "step" else "cpu")
            for key, value in moments.items()
        }
    return int(state["step"])


class _Clock:
    """Seconds of a task's training, and how many of them went into strategy hooks."""

    def __init__(self, resume: Mapping[str, Any]) -> None:
        self.start = self.last = time.perf_counter()
        self.earlier_s = float(resume.get("train_s", 0.0))
        self.strategy_s = float(resume.get("strategy_s", 0.0))

    def state(self) -> dict[str, float]:
        return {"train_s": self.total_s, "strategy_s": self.strategy_s}

    @contextmanager
    def strategy(self) -> Any:
        start = time.perf_counter()
        yield
        self.strategy_s += time.perf_counter() - start

    @contextmanager
    def stopped(self) -> Any:
        """Leave out what happens inside."""
        start = time.perf_counter()
        yield
        gone_s = time.perf_counter() - start
        self.start, self.last = self.start + gone_s, self.last + gone_s

    @property
    def total_s(self) -> float:
        return self.earlier_s + time.perf_counter() - self.start

    def report(
        self, step: int, first_step: int, num_steps: int, loss: float, learning_rate: float, num_tokens: int
    ) -> StepReport:
        now = time.perf_counter()
        rate = num_tokens / max(now - self.last, 1e-9)
        eta_s = (num_steps - step - 1) * (now - self.start) / (step - first_step + 1)
        self.last = now
        return StepReport(step + 1, num_steps, loss, learning_rate, num_tokens, rate, eta_s)
