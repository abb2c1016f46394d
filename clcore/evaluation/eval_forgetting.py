"""ForgettingMetrics: score every task after each one, and say what was learnt, forgotten and lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clcore.engine.errors import ConfigError, DataError
from clcore.evaluation.bootstrap import Interval, matrix_intervals
from clcore.evaluation.scalars import average_accuracy as average_accuracy
from clcore.evaluation.scalars import backward_transfer as backward_transfer
from clcore.evaluation.scalars import forgetting as forgetting
from clcore.evaluation.scalars import forward_transfer as forward_transfer
from clcore.evaluation.scalars import learning_accuracy as learning_accuracy
from clcore.evaluation.scalars import matrix_scalars as matrix_scalars
from clcore.evaluation.scalars import task_forgetting as task_forgetting
from clcore.evaluation.scores import (
    TaskScore,
    class_drops,
    count_rows,
    evaluation_part,
    lost_rows,
    row_scores,
    task_score,
)
from clcore.evaluation.snapshots import take_snapshot
from clcore.evaluation.task_vectors import eval_mode, without_adapters

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from clcore.engine.loop import StepReport

MetricFn = Callable[[nn.Module, Any], Any]


class ForgettingMetrics:
    """The accuracy matrix of a sequence, what follows from it, and a snapshot of the adapter per task.

    task_datasets: task -> {"train": ..., "eval": ...}, or what is evaluated itself. metric_fn(model, data
    set) returns a score in 0..1: a number, a mapping or an Evaluation, see scores.task_score, which
    metric_name is for. It runs in eval mode, without gradients, and leaves torch's generators as they were.

    base_scores: the untrained model's scores, for forward transfer. None measures them here: of a PEFT model
    with its adapters switched off, of any other model with its present weights, so build this before
    training. keep_snapshots=False keeps no adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        task_datasets: Mapping[str, Any],
        metric_fn: MetricFn,
        *,
        metric_name: str = "score",
        base_scores: Mapping[str, float] | None = None,
        keep_snapshots: bool = True,
    ) -> None:
        self.model = model
        self.datasets = {name: evaluation_part(dataset) for name, dataset in task_datasets.items()}
        self.metric_fn = metric_fn
        self.metric_name = metric_name
        self.keep_snapshots = keep_snapshots
        self.scores: dict[str, dict[str, TaskScore]] = {}
        """Trained task -> scored task -> its score just after the training."""
        self.model_snapshots: dict[str, dict[str, Tensor]] = {}
        """Trained task -> the adapter's parameters just after it, on the CPU."""
        self.training_curves: dict[str, list[tuple[int, dict[str, float]]]] = {}
        """Trained task -> [(step, scored task -> score)], from within its training."""
        self._base: dict[str, TaskScore] = {}
        if base_scores is None:
            with without_adapters(model):
                self._base = {name: self._score(name) for name in self.datasets}
            self.base_scores = {name: score.score for name, score in self._base.items()}
        else:
            unknown = sorted(set(base_scores) - set(self.datasets))
            if unknown:
                raise ConfigError(f"base_scores has unknown task {unknown[0]!r}; {self._known()}")
            self.base_scores = {
                name: task_score(score, metric_name=f"base score of {name!r}").score
                for name, score in base_scores.items()
            }

    # ------------------------------------------------------------------------------------------- measuring

    @property
    def task_order(self) -> list[str]:
        """The trained tasks, in the order of training, then those that are still to come."""
        return [*self.scores, *(name for name in self.datasets if name not in self.scores)]

    def after_task(self, task_id: str) -> dict[str, float]:
        """Score all tasks and keep the adapter, right after task_id was trained; return task -> score.

        Raises ConfigError for an unknown task or one that was recorded already.
        """
        self._check(task_id)
        if task_id in self.scores:
            raise ConfigError(
                f"task {task_id!r} was recorded already; tasks so far: {', '.join(self.scores)}"
            )
        found = {name: self._score(name) for name in self.datasets}
        if self.keep_snapshots:
            self.model_snapshots[task_id] = take_snapshot(self.model)
        self.scores[task_id] = found
        return {name: score.score for name, score in found.items()}

    def record_step(self, task_id: str, step: int, tasks: Sequence[str] | None = None) -> dict[str, float]:
        """Score tasks in the middle of training task_id; None means the earlier ones. Return task -> score.

        step: number of optimizer steps made, counted from 1 within the task. Training is not disturbed:
        weights, gradients, modes and generators stay as they are.
        Raises ConfigError for an unknown task, one that is over, or a step that is not after the last one.
        """
        self._check(task_id)
        if task_id in self.scores:
            raise ConfigError(f"task {task_id!r} is over: after_task was called for it")
        points = self.training_curves.get(task_id, [])
        if step < 0 or (points and step <= points[-1][0]):
            raise ConfigError(f"steps of task {task_id!r} must grow, got {step}")
        for name in tasks or ():
            self._check(name)
        names = list(self.scores) if tasks is None else list(tasks)
        found = {name: self._score(name).score for name in names}
        if found:
            self.training_curves[task_id] = [*points, (step, found)]
        return found

    def on_step(
        self, task_id: str, every: int, tasks: Sequence[str] | None = None
    ) -> Callable[[StepReport], None]:
        """Return a callback for fit_task's on_step that calls record_step every so many steps."""
        if every < 1:
            raise ConfigError(f"every must be at least 1, got {every}")
        self._check(task_id)

        def callback(report: StepReport) -> None:
            if report.step % every == 0:
                self.record_step(task_id, report.step, tasks)

        return callback

    # ------------------------------------------------------------------------------------------- what follows

    def matrix(self) -> list[list[float]]:
        """Return a[i][j], the score on task j after training task i; columns follow task_order."""
        return [[scores[name].score for name in self.task_order] for scores in self.scores.values()]

    def compute_forgetting(self) -> dict[str, Any]:
        """Return the matrix and its scalars; None where a scalar is undefined (one task) or lacks a score.

        avg_forgetting, bwt, fwt, average_accuracy, learning_accuracy: means over tasks (macro); the same
        after "micro_": over rows, None where a data set's length is unknown. forgetting: earlier task ->
        best score so far - score now. intervals_95: the macro scalars' bootstrap intervals over rows, None
        without "per_example" of every score, or where the score is not their mean (perplexity). matrix,
        base_scores: in the order of tasks.
        Raises DataError before the first after_task.
        """
        self._trained(1)
        order, matrix = self.task_order, self.matrix()
        base = [self.base_scores.get(name) for name in order]
        num_rows = [scores.num_rows for scores in (next(iter(self.scores.values()))[name] for name in order)]
        known = [n for n in num_rows if n is not None]
        scalars = matrix_scalars(matrix, base, known if len(known) == len(num_rows) else None)
        names = ("average_accuracy", "learning_accuracy", "bwt", "fwt")
        found: dict[str, Any] = {"avg_forgetting": scalars["forgetting"]}
        found |= {name: scalars[name] for name in names}
        found |= {"micro_avg_forgetting": scalars.get("micro_forgetting")}
        found |= {f"micro_{name}": scalars.get(f"micro_{name}") for name in names}
        found["forgetting"] = dict(zip(list(self.scores)[:-1], task_forgetting(matrix), strict=True))
        found["intervals_95"] = self._intervals()
        return found | {"tasks": order, "matrix": matrix, "base_scores": base, "num_rows": num_rows}

    def _intervals(self) -> dict[str, Interval | None]:
        trained = list(self.scores)
        rows = {
            (i, j): row_scores(self.scores[a][b])
            for i, a in enumerate(trained)
            for j, b in enumerate(trained)
        }
        base = {j: row_scores(self._base[name]) for j, name in enumerate(trained) if name in self._base}
        known = {place: scores for place, scores in rows.items() if scores is not None}
        if len(known) < len(rows):
            return dict.fromkeys(("avg_forgetting", "bwt", "fwt", "average_accuracy", "learning_accuracy"))
        found = matrix_intervals(known, {j: scores for j, scores in base.items() if scores is not None})
        return {"avg_forgetting": found.pop("forgetting"), **found}

    def compute_forgetting_curve(self, task_id: str) -> list[tuple[str, float]]:
        """Return how the score on a task went on, from just after it was trained.

        Points are (name of the trained task, score), and where record_step was used also ("<task> step <n>",
        score), in the order in which they were measured. Raises ConfigError for a task that is not trained.
        """
        if task_id not in self.scores:
            raise ConfigError(
                f"task {task_id!r} is not trained yet; trained: {', '.join(self.scores) or 'none'}"
            )
        order = list(self.scores)
        later = order[order.index(task_id) + 1 :]
        unfinished = [name for name in self.training_curves if name not in self.scores]
        points = [(task_id, self.scores[task_id][task_id].score)]
        for name in [*later, *unfinished]:
            steps = self.training_curves.get(name, [])
            points += [
                (f"{name} step {step}", scores[task_id]) for step, scores in steps if task_id in scores
            ]
            if name in self.scores:
                points.append((name, self.scores[name][task_id].score))
        return points

    def lost_examples(self, task_id: str, threshold: float = 1.0) -> list[int]:
        """Return the rows of a task that were right just after it was trained and are wrong now.

        Right is a score of at least threshold. Raises DataError if the metric gives no "per_example".
        """
        return lost_rows(*self._then_and_now(task_id), threshold)

    def class_forgetting(self, task_id: str) -> dict[str, float | None]:
        """Return class -> score just after the task was trained - score now; positive: forgotten.

        Raises DataError if the metric gives no "per_class".
        """
        return class_drops(*self._then_and_now(task_id))

    # ----------------------------------------------------------------------------------------------- pictures

    def visualize_forgetting(self) -> go.Figure:
        """Draw the score on each trained task over the sequence. Raises DataError before the first task."""
        from clcore.evaluation.eval_visualization import forgetting_curves_figure

        self._trained(1)
        return forgetting_curves_figure({name: self.compute_forgetting_curve(name) for name in self.scores})

    def visualize_backward_transfer(self) -> go.Figure:
        """Draw what later tasks did to each task's score. Raises DataError before the second task."""
        from clcore.evaluation.eval_visualization import backward_transfer_figure

        self._trained(2)
        size = len(self.scores)
        return backward_transfer_figure(list(self.scores), [row[:size] for row in self.matrix()])

    # ----------------------------------------------------------------------------------------------- inside

    def _score(self, name: str) -> TaskScore:
        dataset = self.datasets[name]
        with eval_mode(self.model), torch.no_grad(), _generators_kept(self.model):
            result = self.metric_fn(self.model, dataset)
        return task_score(result, metric_name=self.metric_name, num_rows=count_rows(dataset))

    def _then_and_now(self, task_id: str) -> tuple[TaskScore, TaskScore]:
        if task_id not in self.scores:
            raise ConfigError(
                f"task {task_id!r} is not trained yet; trained: {', '.join(self.scores) or 'none'}"
            )
        newest = list(self.scores.values())[-1]
        return self.scores[task_id][task_id], newest[task_id]

    def _check(self, name: str) -> None:
        if name not in self.datasets:
            raise ConfigError(f"there is no task {name!r}; {self._known()}")

    def _known(self) -> str:
        return f"tasks: {', '.join(self.datasets)}"

    def _trained(self, least: int) -> None:
        if len(self.scores) < least:
            raise DataError(f"after_task was called for {len(self.scores)} tasks, {least} are needed")


@contextmanager
def _generators_kept(model: nn.Module) -> Iterator[None]:
    """Give torch's generators their state back after the block: sampling in a metric changes no training."""
    devices: Iterable[torch.device] = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(device.index or 0 for device in devices)):
        yield
