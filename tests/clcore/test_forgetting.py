"""ForgettingMetrics: the matrix, curves inside a task, lost rows; measuring disturbs nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from clcore.engine.errors import ConfigError, DataError
from clcore.engine.loop import TrainConfig, fit_task
from clcore.engine.params import Params
from clcore.evaluation import ForgettingMetrics
from clcore.evaluation.bootstrap import matrix_intervals
from clcore.evaluation.scores import class_drops, lost_rows, task_score
from clcore.evaluation.task_vectors import label_loss
from clcore.strategies.none import NoStrategy
from tests.clcore.tiny import assert_close, new_session, tiny_learner, tiny_llama, tiny_stream, trainable

BASE = {"t1": 0.1, "t2": 0.2, "t3": 0.3}
ROWS = {"t1": 10, "t2": 30, "t3": 60}
MATRIX = [[0.9, 0.3, 0.2], [0.6, 0.8, 0.5], [0.5, 0.6, 0.7]]


class Script:
    """A metric that reads scores from a table: (row of the table, task)."""

    def __init__(self) -> None:
        self.now: dict[str, Any] = {}

    def __call__(self, _: nn.Module, dataset: Any) -> Any:
        return self.now[dataset[0]]


def scripted(rows: list[Any], **options: Any) -> ForgettingMetrics:
    """Return metrics after as many tasks as rows; rows[i]: what the metric returns for t1, t2, t3."""
    metric = Script()
    datasets = {name: {"train": None, "eval": [name] * n} for name, n in ROWS.items()}
    metrics = ForgettingMetrics(tiny_llama(), datasets, metric, base_scores=BASE, **options)
    for name, row in zip(ROWS, rows, strict=False):
        metric.now = dict(zip(ROWS, row, strict=True))
        metrics.after_task(name)
    return metrics


def test_every_number_of_a_matrix_worked_out_by_hand() -> None:
    found = scripted(MATRIX).compute_forgetting()
    expected = {
        "average_accuracy": 0.6,  # (0.5 + 0.6 + 0.7) / 3
        "learning_accuracy": 0.8,  # (0.9 + 0.8 + 0.7) / 3
        "avg_forgetting": 0.3,  # ((0.9 - 0.5) + (0.8 - 0.6)) / 2
        "bwt": -0.3,
        "fwt": 0.15,  # ((0.3 - 0.2) + (0.5 - 0.3)) / 2
        "micro_average_accuracy": 0.65,  # (10 * 0.5 + 30 * 0.6 + 60 * 0.7) / 100
        "micro_learning_accuracy": 0.75,  # (10 * 0.9 + 30 * 0.8 + 60 * 0.7) / 100
        "micro_avg_forgetting": 0.25,  # (10 * 0.4 + 30 * 0.2) / 40
        "micro_bwt": -0.25,
        "micro_fwt": 1 / 6,  # (30 * 0.1 + 60 * 0.2) / 90
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["matrix"] == MATRIX
    assert found["forgetting"] == pytest.approx({"t1": 0.4, "t2": 0.2})
    assert (found["tasks"], found["base_scores"]) == (list(ROWS), list(BASE.values()))


def test_with_one_task_what_needs_two_is_null_and_not_zero() -> None:
    found = scripted(MATRIX[:1]).compute_forgetting()
    for name in ("avg_forgetting", "bwt", "fwt", "micro_avg_forgetting", "micro_bwt", "micro_fwt"):
        assert found[name] is None
    assert found["average_accuracy"] == 0.9
    assert found["forgetting"] == {}
    with pytest.raises(DataError, match="0 tasks"):
        scripted([]).compute_forgetting()


def test_columns_follow_the_order_of_training_and_not_that_of_the_data_sets() -> None:
    metric = Script()
    metrics = ForgettingMetrics(tiny_llama(), {"t1": ["t1"], "t2": ["t2"]}, metric, base_scores={"t1": 0.1})
    metric.now = {"t1": 0.3, "t2": 0.9}
    metrics.after_task("t2")
    metric.now = {"t1": 0.8, "t2": 0.5}
    metrics.after_task("t1")
    found = metrics.compute_forgetting()
    assert found["matrix"] == [[0.9, 0.3], [0.5, 0.8]]
    assert found["bwt"] == pytest.approx(-0.4)
    assert found["fwt"] == pytest.approx(0.2)


def test_without_the_length_of_a_data_set_micro_averages_are_null() -> None:
    metrics = ForgettingMetrics(tiny_llama(), {"t1": iter("x")}, lambda *_: 0.5, base_scores={})
    metrics.after_task("t1")
    found = metrics.compute_forgetting()
    assert (found["average_accuracy"], found["micro_average_accuracy"]) == (0.5, None)


def per_row(*scores: float) -> dict[str, Any]:
    return {
        "accuracy": sum(scores) / len(scores),
        "loss": 2.0,
        "per_example": list(scores),
        "per_class": {"a": scores[0], "b": scores[1]},
    }


def test_lost_rows_were_right_after_their_own_task_and_are_wrong_now() -> None:
    later = per_row(0, 0, 0, 0)
    rows = [
        [per_row(1, 1, 0, 1), later, later],
        [per_row(1, 0, 0, 0), per_row(1, 1, 1, 1), later],
        [per_row(0, 1, 1, 0), per_row(1, 1, 1, 0), later],
    ]
    metrics = scripted(rows, metric_name="accuracy")
    assert metrics.lost_examples("t1") == [0, 3]  # row 1 was lost and found again, row 2 was gained
    assert metrics.lost_examples("t2") == [3]
    assert metrics.lost_examples("t3") == []
    assert metrics.class_forgetting("t1") == {"a": 1.0, "b": 0.0}
    assert metrics.compute_forgetting()["num_rows"] == [4, 4, 4]
    with pytest.raises(ConfigError, match="'t3' is not trained yet"):
        scripted(rows[:1], metric_name="accuracy").lost_examples("t3")


def test_intervals_resample_the_rows_of_a_task_and_need_the_score_of_each() -> None:
    later = per_row(0, 0, 0, 0)
    first, second = [1, 1, 1, 0], [1, 0, 0, 0]
    rows = [
        [per_row(*first), later, later],
        [per_row(*second), per_row(1, 1, 1, 1), later],
    ]
    found = scripted(rows, metric_name="accuracy").compute_forgetting()
    # Forgetting of a resample: the mean of four draws of the drops 0, 1, 1, 0; all equal with odds 1/16.
    expected = matrix_intervals({(0, 0): first, (1, 0): second, (0, 1): [0] * 4, (1, 1): [1] * 4})
    assert found["intervals_95"]["avg_forgetting"] == expected["forgetting"] == (0.0, 1.0)
    assert found["intervals_95"]["average_accuracy"] == expected["average_accuracy"]
    assert found["intervals_95"]["fwt"] is None  # the base scores were given without their rows
    assert set(scripted(MATRIX).compute_forgetting()["intervals_95"].values()) == {None}
    weighted = [[{**row, "accuracy": 0.9} for row in line] for line in rows]
    assert set(scripted(weighted, metric_name="accuracy").compute_forgetting()["intervals_95"].values()) == {
        None
    }


def test_a_score_is_read_from_numbers_mappings_and_evaluations() -> None:
    assert task_score(1).score == 1.0
    assert task_score(torch.tensor(0.5)).score == 0.5
    assert task_score({"accuracy": 0.25}).score == 0.25
    assert task_score({"score": 0.25, "other": 3}).score == 0.25
    rows = (SimpleNamespace(row=4, score=1.0), SimpleNamespace(row=7, score=0.0))
    found = task_score(SimpleNamespace(score=0.5, rows=rows))
    assert (found.per_example, found.num_rows) == ({4: 1.0, 7: 0.0}, 2)


@pytest.mark.parametrize(
    ("result", "error", "words"),
    [
        (float("nan"), DataError, "must be in 0..1"),
        (2.3, DataError, "got 2.3"),
        ("high", DataError, "got 'high'"),
        ({"a": 0.1, "b": 0.2}, ConfigError, r"2 numbers, \['a', 'b'\]"),
        ({"score": 0.5, "per_example": [0.5, 1.5]}, DataError, "row 1"),
    ],
)
def test_what_is_no_score_is_refused(result: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        task_score(result)


def test_lost_rows_need_the_same_rows_and_a_metric_that_names_them() -> None:
    before = task_score({"score": 0.5, "per_example": [1, 0.4]})
    assert lost_rows(before, task_score({"score": 0.5, "per_example": [0.6, 0]}), threshold=0.4) == [1]
    with pytest.raises(DataError, match="the same rows"):
        lost_rows(before, task_score({"score": 0.5, "per_example": [1]}))
    with pytest.raises(DataError, match="per_example"):
        lost_rows(before, task_score(0.5))
    with pytest.raises(DataError, match="per_class"):
        class_drops(before, before)
    with pytest.raises(ConfigError, match="threshold"):
        lost_rows(before, before, threshold=0)


def likelihood(model: nn.Module, dataset: Any) -> float:
    return float(torch.exp(torch.tensor(-label_loss(model, dataset))))


def two_tasks() -> tuple[nn.Module, dict[str, Any]]:
    return tiny_learner(), {
        f"t{i}": {"train": rows, "eval": rows} for i, (_, rows) in enumerate(tiny_stream(2))
    }


def train(model: nn.Module, datasets: dict[str, Any], name: str, **options: Any) -> None:
    config = TrainConfig(num_steps=20, learning_rate=1e-2)
    rows = datasets[name]["train"]
    fit_task(model, NoStrategy(model), rows, task_id=name, config=config, memory=new_session(), **options)


def test_a_sequence_of_two_tasks_is_measured_from_the_untrained_model_to_the_middle_of_the_second() -> None:
    model, datasets = two_tasks()
    untrained = {name: likelihood(model, data["eval"]) for name, data in datasets.items()}
    train(model, datasets, "t0")  # the base model is scored with its adapters off, even now
    metrics = ForgettingMetrics(model, datasets, likelihood)
    assert metrics.base_scores == pytest.approx(untrained)
    metrics.after_task("t0")
    train(model, datasets, "t1", on_step=metrics.on_step("t1", every=5))
    metrics.after_task("t1")
    found = metrics.compute_forgetting()
    assert found["matrix"][1][1] > untrained["t1"]
    assert found["avg_forgetting"] > 0
    assert [step for step, _ in metrics.training_curves["t1"]] == [5, 10, 15, 20]
    assert all(set(scores) == {"t0"} for _, scores in metrics.training_curves["t1"])
    curve = metrics.compute_forgetting_curve("t0")
    names = ["t0", *(f"t1 step {n}" for n in (5, 10, 15, 20)), "t1"]
    assert [name for name, _ in curve] == names
    assert curve[0][1] == found["matrix"][0][0]
    assert curve[-1][1] == curve[-2][1] == found["matrix"][1][0]  # step 20 is the end
    assert curve[1][1] != curve[2][1]
    assert set(metrics.model_snapshots) == {"t0", "t1"}
    assert_close(metrics.model_snapshots["t1"], trainable(model))


def noisy(model: nn.Module, dataset: Any) -> float:
    torch.rand(3)  # a metric that samples
    assert not any(module.training for module in model.modules())
    assert not torch.is_grad_enabled()
    return likelihood(model, dataset)


def test_scoring_in_the_middle_changes_no_bit_of_the_training_in_a_loop_of_ones_own() -> None:
    def run(measured: bool) -> dict[str, Any]:
        _, datasets = two_tasks()
        model = tiny_llama(dropout=0.2)
        rows = datasets["t0"]["train"]
        model.train()
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(Params.of(model).values(), lr=1e-2)
        metrics = ForgettingMetrics(model, datasets, noisy) if measured else None
        for step in range(1, 7):
            ids = torch.stack([row["input_ids"] for row in rows])
            model(input_ids=ids, labels=ids).loss.backward()
            if metrics is not None and step % 2 == 0:
                metrics.record_step("t0", step, tasks=["t1"])
            optimizer.step()
            optimizer.zero_grad()
        assert metrics is None or len(metrics.training_curves["t0"]) == 3
        assert all(module.training for module in model.modules())
        return trainable(model)

    assert_close(run(measured=True), run(measured=False))


def test_measuring_the_base_model_leaves_frozen_parameters_frozen() -> None:
    model, datasets = two_tasks()
    frozen = next(name for name, _ in model.named_parameters() if "lora_A" in name)
    dict(model.named_parameters())[frozen].requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    ForgettingMetrics(model, datasets, likelihood)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_wrong_calls_are_named() -> None:
    metrics = scripted(MATRIX[:1], keep_snapshots=False)
    assert metrics.model_snapshots == {}
    with pytest.raises(ConfigError, match="no task 't9'; tasks: t1, t2, t3"):
        metrics.after_task("t9")
    with pytest.raises(ConfigError, match="'t1' was recorded already"):
        metrics.after_task("t1")
    with pytest.raises(ConfigError, match="'t1' is over"):
        metrics.record_step("t1", 1)
    metrics.record_step("t2", 4)
    with pytest.raises(ConfigError, match="must grow, got 4"):
        metrics.record_step("t2", 4)
    with pytest.raises(ConfigError, match="every must be at least 1, got 0"):
        metrics.on_step("t2", 0)
    with pytest.raises(ConfigError, match="unknown task 'other'"):
        ForgettingMetrics(tiny_llama(), {"t1": []}, Script(), base_scores={"other": 0.1})
    with pytest.raises(ConfigError, match="needs 'eval', got 'train'"):
        ForgettingMetrics(tiny_llama(), {"t1": {"train": []}}, Script())


def test_pictures_show_the_matrix_and_the_curves() -> None:
    metrics = scripted(MATRIX)
    figure = metrics.visualize_forgetting()
    first = next(trace for trace in figure.data if trace.name == "t1")
    assert list(first.y) == [0.9, 0.6, 0.5]
    bars = metrics.visualize_backward_transfer().data
    values = [value for bar in bars for value in (bar.x or ()) if value is not None]
    assert values == pytest.approx([-0.4, -0.2, -0.3])
    with pytest.raises(DataError, match="2 are needed"):
        scripted(MATRIX[:1]).visualize_backward_transfer()
