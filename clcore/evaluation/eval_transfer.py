"""TransferMetrics: how alike tasks are, what their training did to the adapter, how fast each was learnt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from clcore.engine.errors import ConfigError, DataError
from clcore.engine.tasks import Example, iter_examples
from clcore.evaluation.eval_forgetting import ForgettingMetrics, MetricFn
from clcore.evaluation.scores import evaluation_part
from clcore.evaluation.similarity import (
    adapter_similarity,
    change_factors,
    linear_cka,
    lora_factors,
    similarity_matrix,
)
from clcore.evaluation.snapshots import restore, take_snapshot
from clcore.evaluation.task_vectors import Tokens, mean_gradient, row_embeddings

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from clcore.engine.loop import StepReport

TaskSimilarity = Literal["embedding", "gradient"]
AdapterSimilarity = Literal["row", "column", "cka"]
Table = list[list[float | None]]

_UNITS = {
    "embedding": "cosine of mean embeddings, -1 to 1",
    "gradient": "cosine of mean gradients, -1 to 1",
    "row": "mean squared cosine between row spaces, 0 to 1",
    "column": "mean squared cosine between column spaces, 0 to 1",
    "cka": "linear CKA of activations, 0 to 1",
}


class TransferMetrics:
    """Similarity of tasks and adapters, and learning curves, over a sequence.

    task_datasets: task -> {"train": ..., "eval": ...} or rows, as iter_examples reads them; the first
    max_rows of the training part (of the rows themselves) say what a task is like. metric_fn: as in
    ForgettingMetrics; with it every task is scored after each one and forward transfer is known. Build this
    before training: the adapter as it is now is what the first task changed.
    """

    def __init__(
        self,
        model: nn.Module,
        task_datasets: Mapping[str, Any],
        metric_fn: MetricFn | None = None,
        *,
        metric_name: str = "score",
        max_rows: int = 64,
        batch_size: int = 8,
        pad_token_id: int = 0,
    ) -> None:
        if max_rows < 1:
            raise ConfigError(f"max_rows must be at least 1, got {max_rows}")
        self.model = model
        self.rows: dict[str, list[Example]] = {
            name: _first_rows(dataset, max_rows, name) for name, dataset in task_datasets.items()
        }
        self.forgetting = (
            None
            if metric_fn is None
            else ForgettingMetrics(
                model, task_datasets, metric_fn, metric_name=metric_name, keep_snapshots=False
            )
        )
        self.initial = take_snapshot(model)
        """The adapter's parameters before the first task."""
        self.model_snapshots: dict[str, dict[str, Tensor]] = {}
        """Trained task -> the adapter's parameters just after it, on the CPU."""
        self._curves: dict[str, list[tuple[int, float]]] = {}
        self._sizes: dict[str, Any] = {"batch_size": batch_size, "pad_token_id": pad_token_id}

    # ------------------------------------------------------------------------------------------- measuring

    def after_task(self, task_id: str) -> None:
        """Keep the adapter, and score all tasks if there is a metric, right after task_id was trained.

        Raises ConfigError for an unknown task or one that was recorded already.
        """
        self._check(task_id)
        if task_id in self.model_snapshots:
            names = ", ".join(self.model_snapshots)
            raise ConfigError(f"task {task_id!r} was recorded already; tasks so far: {names}")
        if self.forgetting is not None:
            self.forgetting.after_task(task_id)
        self.model_snapshots[task_id] = take_snapshot(self.model)

    def record_step(self, task_id: str, step: int, loss: float) -> None:
        """Add a point to a task's learning curve; step counts from 1, loss in nats per label token.

        Raises ConfigError for an unknown task or a step not after the last one, DataError for NaN.
        """
        self._check(task_id)
        points = self._curves.setdefault(task_id, [])
        if step < 0 or (points and step <= points[-1][0]):
            raise ConfigError(f"steps of task {task_id!r} must grow, got {step}")
        if not math.isfinite(loss):
            raise DataError(
                f"the loss of task {task_id!r} at step {step} must be a finite number, got {loss}"
            )
        points.append((step, float(loss)))

    def on_step(self, task_id: str, every: int = 1) -> Callable[[StepReport], None]:
        """Return a callback for fit_task's on_step that keeps the loss of every so many steps."""
        if every < 1:
            raise ConfigError(f"every must be at least 1, got {every}")
        self._check(task_id)

        def callback(report: StepReport) -> None:
            if report.step % every == 0:
                self.record_step(task_id, report.step, report.loss)

        return callback

    # ------------------------------------------------------------------------------------------- what follows

    def task_similarity(self, by: TaskSimilarity = "embedding", *, tokens: Tokens = "label") -> Table:
        """Compare all tasks at the model's present weights, (T, T), cosines in -1..1.

        embedding: of the mean over rows of the mean last hidden state over label (or prompt) tokens.
        Hidden states of all texts have much in common, so compare these cosines with each other, not with 0.
        gradient: of the mean loss gradient on the trainable parameters; None for a task whose gradient is 0.
        """
        if by == "embedding":
            return similarity_matrix(
                [
                    {"mean": row_embeddings(self.model, rows, tokens=tokens, **self._sizes).mean(0)}
                    for rows in self.rows.values()
                ]
            )
        if by == "gradient":
            return similarity_matrix(
                [mean_gradient(self.model, rows, **self._sizes) for rows in self.rows.values()]
            )
        raise ConfigError(f"by must be embedding or gradient, got {by!r}")

    def adapter_similarity(self, by: AdapterSimilarity = "row", *, changes: bool = False) -> Table:
        """Compare the adapters after each trained task, (number of trained tasks) squared, in 0..1.

        row, column: mean over layers of the squared cosines of the principal angles between the LoRA deltas'
        row spaces (what they read) or column spaces (what they write); with changes=True between what each
        task added to the delta. cka: linear CKA of the rows' mean last hidden states over label tokens, on
        the rows of all tasks. None where a side is 0.

        Raises DataError before the first after_task, ConfigError for adapters that are no product of two
        factors (DoRA), or for changes=True with cka.
        """
        if not self.model_snapshots:
            raise DataError("after_task was called for no task; one is needed")
        if by == "cka":
            if changes:
                raise ConfigError("changes=True compares LoRA deltas; it needs by='row' or by='column'")
            return _table(self._activations(), linear_cka)
        if by not in ("row", "column"):
            raise ConfigError(f"by must be row, column or cka, got {by!r}")
        factors = [lora_factors(snapshot) for snapshot in self.model_snapshots.values()]
        if changes:
            before = [lora_factors(self.initial), *factors]
            factors = [change_factors(old, new) for old, new in zip(before, factors, strict=False)]
        return _table(factors, lambda x, y: adapter_similarity(x, y, by))

    def compute_learning_curves(self) -> dict[str, list[tuple[int, float]]]:
        """Return task -> [(step, loss)] from record_step or on_step, in the order of recording."""
        return {name: list(points) for name, points in self._curves.items()}

    def compute_transfer_metrics(self) -> dict[str, Any]:
        """Return everything that is known now, by name.

        tasks; embedding_similarity and gradient_similarity of all tasks. trained: the trained tasks;
        row_similarity and column_similarity of what each of them changed in the adapter, None where the
        adapter has no LoRA pairs. mean_loss: task -> area under its learning curve / its steps, in nats per
        label token (lower: learnt faster). With a metric_fn also forward_transfer: task -> score just before
        it was trained - score of the untrained model, and fwt and bwt, None with one task.
        """
        found: dict[str, Any] = {
            "tasks": list(self.rows),
            "embedding_similarity": self.task_similarity("embedding"),
            "gradient_similarity": self.task_similarity("gradient"),
            "trained": list(self.model_snapshots),
            "mean_loss": {name: _mean_height(points) for name, points in self._curves.items()},
        }
        has_pairs = bool(self.model_snapshots) and any("lora_" in name for name in self.initial)
        for side in ("row", "column"):
            found[f"{side}_similarity"] = self.adapter_similarity(side, changes=True) if has_pairs else None
        if self.forgetting is not None:
            found |= self._forward_transfer(self.forgetting)
        return found

    # ----------------------------------------------------------------------------------------------- pictures

    def visualize_task_similarity(
        self, by: TaskSimilarity = "embedding", *, tokens: Tokens = "label"
    ) -> go.Figure:
        """Draw task_similarity."""
        from clcore.evaluation.eval_visualization import similarity_figure

        values = self.task_similarity(by, tokens=tokens)
        return similarity_figure(list(self.rows), values, title=f"Tasks by {by}", unit=_UNITS[by])

    def visualize_adapter_similarity(
        self, by: AdapterSimilarity = "row", *, changes: bool = False
    ) -> go.Figure:
        """Draw adapter_similarity."""
        from clcore.evaluation.eval_visualization import similarity_figure

        values = self.adapter_similarity(by, changes=changes)
        what = "What tasks changed" if changes else "Adapters after each task"
        return similarity_figure(list(self.model_snapshots), values, title=what, unit=_UNITS[by])

    def visualize_learning_curves(self) -> go.Figure:
        """Draw the learning curves. Raises DataError when no step was recorded."""
        from clcore.evaluation.eval_visualization import learning_curves_figure

        if not self._curves:
            raise DataError("no step was recorded; use on_step or record_step")
        return learning_curves_figure(self.compute_learning_curves())

    # ----------------------------------------------------------------------------------------------- inside

    def _activations(self) -> list[Tensor]:
        rows = [row for task in self.rows.values() for row in task]
        found = []
        for snapshot in self.model_snapshots.values():
            with restore(self.model, snapshot):
                found.append(row_embeddings(self.model, rows, **self._sizes))
        return found

    def _forward_transfer(self, scored: ForgettingMetrics) -> dict[str, Any]:
        if not scored.scores:
            return {"forward_transfer": {}, "fwt": None, "bwt": None}
        summary = scored.compute_forgetting()
        matrix, base = summary["matrix"], summary["base_scores"]
        gains = {
            name: None if base[j] is None else matrix[j - 1][j] - base[j]
            for j, name in enumerate(scored.scores)
            if j > 0
        }
        return {"forward_transfer": gains, "fwt": summary["fwt"], "bwt": summary["bwt"]}

    def _check(self, name: str) -> None:
        if name not in self.rows:
            raise ConfigError(f"there is no task {name!r}; tasks: {', '.join(self.rows)}")


def _first_rows(dataset: Any, max_rows: int, name: str) -> list[Example]:
    rows: Iterable[Any] = evaluation_part(dataset, "train" if isinstance(dataset, Mapping) else "eval")
    found = list(islice(iter_examples(rows, name), max_rows))
    if not found:
        raise DataError(f"task {name!r} has no rows")
    return found


def _table(items: Sequence[Any], compare: Callable[[Any, Any], float | None]) -> Table:
    """Compare every two items once; compare is symmetric."""
    found: Table = [[None] * len(items) for _ in items]
    for i, first in enumerate(items):
        for j in range(i, len(items)):
            found[i][j] = found[j][i] = compare(first, items[j])
    return found


def _mean_height(points: Sequence[tuple[int, float]]) -> float:
    """Return the mean of a curve over its steps, by trapezoids; a single point's value."""
    if len(points) == 1:
        return points[0][1]
    area = sum((s1 - s0) * (y0 + y1) / 2 for (s0, y0), (s1, y1) in pairwise(points))
    return area / (points[-1][0] - points[0][0])
