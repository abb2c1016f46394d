"""Which earlier tasks will a new task hurt? Asked before it is trained.

A few trial steps are made on the new task's rows and taken back. What the update does to an earlier task is
then estimated from that task's stored rows, or from its gradient and Fisher information alone.
Legend: theta the weights now, D the update of the trial steps, L an earlier task's loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clcore.engine.errors import ConfigError, DataError, StateError
from clcore.engine.fisher import squared_gradients, unwrapped
from clcore.engine.loss import completion_nll
from clcore.engine.params import Params
from clcore.engine.tasks import Example, collate, derive_seed, iter_examples
from clcore.evaluation.similarity import basis, cosine, subspace_overlap
from clcore.evaluation.task_vectors import batches_of, eval_mode, label_loss, mean_gradient


@dataclasses.dataclass(frozen=True)
class TaskRecord:
    """What is kept of a task; the vectors by parameter, float32, in nats per label token."""

    gradient: Mapping[str, Tensor]
    """Of the loss per label token, at the anchor."""
    fisher: Mapping[str, Tensor]
    """Sum over rows of squared gradients / label tokens: the empirical Fisher, for a Hessian's diagonal."""
    anchor: Mapping[str, Tensor]
    """The weights at which both were measured."""
    rows: Sequence[Example] = ()
    """The rows, where they may be kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interference:
    """How a new task bears on one earlier task. Positive: it hurts, except for subspace_overlap."""

    lookahead: float | None
    """Measured L(theta + D) - L(theta) on the stored rows, in nats per label token; None without rows."""
    first_order: float
    """Gradient of L at theta times D."""
    second_order: float
    """D^T F D / 2, with the diagonal Fisher F."""
    gradient_conflict: float | None
    """Minus the cosine of both tasks' gradients, in -1..1; None where one of them is 0."""
    fisher_conflict: float | None
    """The same with every parameter weighted by the earlier task's Fisher."""
    subspace_overlap: float | None
    """Mean squared cosine of the angles between both gradients' row spaces over LoRA A's, in 0..1."""

    @property
    def taylor(self) -> float:
        """The rise of the loss to second order: first_order + second_order, in nats per label token."""
        return self.first_order + self.second_order

    @property
    def predicted(self) -> float:
        """The number to rank by: the measured rise where rows are stored, else the estimated one."""
        return self.taylor if self.lookahead is None else self.lookahead


def record_task(
    model: nn.Module,
    dataset: Iterable[Any],
    *,
    keep_rows: bool = True,
    batch_size: int = 8,
    pad_token_id: int = 0,
) -> TaskRecord:
    """Measure a task's gradient and Fisher at the present weights.

    Cost: two forward and backward passes over the rows. Raises FisherError as squared_gradients does.
    """
    rows = list(iter_examples(dataset))
    params = Params.of(model)
    gradient = mean_gradient(model, rows, batch_size=batch_size, pad_token_id=pad_token_id)
    batches = list(batches_of(model, rows, batch_size=batch_size, pad_token_id=pad_token_id))
    squares, _ = squared_gradients(model, params, batches)
    num_labels = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches)
    fisher = {name: value / num_labels for name, value in squares.items()}
    return TaskRecord(gradient, fisher, params.copies(), rows if keep_rows else ())


def predict_interference(
    model: nn.Module,
    new_dataset: Iterable[Any],
    old_tasks: Mapping[str, TaskRecord | Iterable[Any]],
    *,
    learning_rate: float,
    num_steps: int = 5,
    batch_size: int = 8,
    pad_token_id: int = 0,
    seed: int = 0,
) -> dict[str, Interference]:
    """Estimate how training on new_dataset changes the loss of earlier tasks; worst first. Experimental.

    It did not predict on a real model: over the 12 pairs of benchmarks/interference.py (SmolLM2-135M, 30
    steps of 4 rows, rises of -0.13 to 0.38 nats) the rank correlation of predicted and observed rise was
    -0.21, 95 % interval -0.69 to 0.44, while the mean rise of the same old task in the other pairs had 0.56.
    Do not gate on it; measure with ForgettingMetrics.

    old_tasks: a few stored rows of each, or its TaskRecord, with rows or without. learning_rate, batch_size
    and pad_token_id are those of the training to come. The model must hold what the earlier tasks taught;
    weights, gradients and modes are left as they are. The numbers are for comparing tasks: they are the rise
    after num_steps steps, not after a whole training.
    Cost: num_steps + 2 training steps, and per earlier task two forward passes over its rows, after two
    forward and backward passes where it comes without a record.

    Raises ConfigError for settings out of range, DataError without rows, StateError for a record of another
    adapter, FisherError as squared_gradients does.
    """
    if not old_tasks:
        raise DataError("there is no earlier task that could be hurt")
    if num_steps < 1 or batch_size < 1:
        raise ConfigError(f"num_steps and batch_size must be at least 1, got {num_steps} and {batch_size}")
    sizes: dict[str, Any] = {"batch_size": batch_size, "pad_token_id": pad_token_id}
    records = {
        name: task if isinstance(task, TaskRecord) else record_task(model, task, **sizes)
        for name, task in old_tasks.items()
    }
    for name, record in records.items():
        _check(name, record, Params.of(model))
    new_rows = trial_rows(new_dataset, num_steps * batch_size, seed)
    new_gradient = mean_gradient(model, new_rows[: 2 * batch_size], **sizes)
    start = Params.of(model).copies()

    def losses() -> dict[str, float]:
        return {name: label_loss(model, r.rows, **sizes) for name, r in records.items() if r.rows}

    before = losses()
    with trial_steps(model, new_rows, learning_rate=learning_rate, **sizes) as update:
        after = losses()
    found = {
        name: _compare(
            record, start, update, new_gradient, after[name] - before[name] if name in before else None
        )
        for name, record in records.items()
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].predicted))


def trial_rows(dataset: Iterable[Any], num_rows: int, seed: int) -> list[Example]:
    """Draw rows by seed, each once before any twice. Raises DataError without rows."""
    rows = list(iter_examples(dataset))
    if not rows:
        raise DataError("the new task has no rows")
    rng = np.random.default_rng(derive_seed(seed, "trial"))
    passes = -(-num_rows // len(rows))
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(max(1, passes))])
    return [rows[i] for i in order[:num_rows]]


@contextmanager
def trial_steps(
    model: nn.Module,
    rows: Sequence[Example],
    *,
    learning_rate: float,
    batch_size: int = 8,
    pad_token_id: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """Train on the rows in order; inside the block the model holds the result, after it what it held before.

    Yields the update by parameter. AdamW without weight decay at a constant rate, gradients clipped to norm
    1, no dropout. Raises ConfigError for settings out of range.
    """
    if not 0 < learning_rate < float("inf"):
        raise ConfigError(f"learning_rate must be a positive finite number, got {learning_rate}")
    inner, params = unwrapped(model), Params.of(model)
    start = params.copies()
    gradients = {name: p.grad for name, p in params.items()}
    optimizer = torch.optim.AdamW(params.values(), lr=learning_rate, weight_decay=0.0)
    device = next(iter(params.values())).device
    try:
        with eval_mode(model), torch.enable_grad():
            for i in range(0, len(rows), batch_size):
                optimizer.zero_grad(set_to_none=True)
                nll, labels = completion_nll(inner, collate(rows[i : i + batch_size], pad_token_id, device))
                (nll.sum() / labels.sum()).backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(params.values(), 1.0)
                optimizer.step()
        yield {name: (p.detach() - start[name]).float() for name, p in params.items()}
    finally:
        params.assign(start)
        for name, p in params.items():
            p.grad = gradients[name]


def _compare(
    record: TaskRecord,
    start: Mapping[str, Tensor],
    update: Mapping[str, Tensor],
    new_gradient: Mapping[str, Tensor],
    lookahead: float | None,
) -> Interference:
    # The loss is a quadratic around the anchor: its gradient here is g + F (theta - anchor).
    gradient = {
        name: g + record.fisher[name] * (start[name].float() - record.anchor[name].float())
        for name, g in record.gradient.items()
    }
    # Training goes against the new gradient: it hurts where both gradients point apart.
    plain, weighted = (cosine(gradient, new_gradient), cosine(gradient, new_gradient, record.fisher))
    return Interference(
        lookahead=lookahead,
        first_order=sum(float((g.double() * update[name]).sum()) for name, g in gradient.items()),
        second_order=sum(
            float((f * update[name].double() ** 2).sum()) / 2 for name, f in record.fisher.items()
        ),
        gradient_conflict=None if plain is None else -plain,
        fisher_conflict=None if weighted is None else -weighted,
        subspace_overlap=_gradient_overlap(gradient, new_gradient),
    )


def _gradient_overlap(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float | None:
    """Compare the directions of the inputs that both tasks push the LoRA A's along, layer by layer."""
    found = []
    for name in first:
        if "lora_A" in name and first[name].dim() == 2:
            rank = torch.eye(first[name].shape[0], dtype=torch.float64)
            spaces = [basis((rank, side[name].cpu()), "row") for side in (first, second)]
            found.append(subspace_overlap(*spaces))
    known = [overlap for overlap in found if overlap is not None]
    return sum(known) / len(known) if known else None


def _check(name: str, record: TaskRecord, params: Params) -> None:
    for part in (record.gradient, record.fisher, record.anchor):
        shapes = {key: tuple(value.shape) for key, value in part.items()}
        if shapes != {key: tuple(value.shape) for key, value in params.items()}:
            raise StateError(f"the record of task {name!r} was made for another adapter")
