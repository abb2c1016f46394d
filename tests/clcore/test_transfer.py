"""TransferMetrics: similarity of tasks and adapters, learning curves; what a task looks like to a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from clcore.engine.errors import ConfigError, DataError
from clcore.engine.loop import TrainConfig, fit_task
from clcore.engine.params import Params
from clcore.engine.tasks import IGNORE, collate
from clcore.evaluation import TransferMetrics
from clcore.evaluation.similarity import adapter_similarity, cosine, lora_factors
from clcore.evaluation.task_vectors import label_loss, mean_gradient, row_embeddings
from clcore.strategies.none import NoStrategy
from tests.clcore.tiny import (
    assert_close,
    mean_nll,
    new_session,
    tiny_dataset,
    tiny_learner,
    tiny_llama,
    tiny_llama_base,
    tiny_stream,
    trainable,
)


def test_the_label_loss_is_that_of_all_label_tokens_together_whatever_the_batch_size() -> None:
    model, rows = tiny_llama(with_b=True), tiny_dataset("t", 7)
    expected = mean_nll(model, rows)
    assert label_loss(model, rows, batch_size=3) == pytest.approx(expected, rel=1e-6)


def test_the_mean_gradient_is_autograds_of_the_label_loss_and_leaves_gradients_and_modes_alone() -> None:
    model, rows = tiny_llama(with_b=True, dropout=0.5), tiny_dataset("t", 7)
    model.eval()
    batch = collate(rows, 0)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE
    )
    params = Params.of(model)
    expected = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    model.train()
    next(iter(params.values())).grad = torch.full_like(next(iter(params.values())), 3.0)
    found = mean_gradient(model, rows, batch_size=2)
    assert_close(found, expected, atol=1e-6)
    assert model.training
    assert [p.grad is not None for p in params.values()] == [True] + [False] * (len(params) - 1)


@pytest.mark.parametrize("tokens", ["label", "prompt"])
def test_an_embedding_is_the_mean_hidden_state_of_a_rows_own_tokens(tokens: Any) -> None:
    model, rows = tiny_llama(with_b=True), tiny_dataset("t", 5)
    found = row_embeddings(model, rows, tokens=tokens, batch_size=2)
    model.eval()
    for row, vector in zip(rows, found, strict=True):  # one row at a time: no padding
        with torch.no_grad():
            hidden = model(input_ids=row["input_ids"].unsqueeze(0), output_hidden_states=True).hidden_states[
                -1
            ][0]
        is_label = row["labels"] != IGNORE
        expected = hidden[is_label if tokens == "label" else ~is_label].mean(0)
        torch.testing.assert_close(vector, expected, rtol=0, atol=1e-5)


def test_rows_without_such_tokens_or_without_rows_are_refused() -> None:
    rows = [{"input_ids": [3, 4, 5]}]  # every token carries loss
    with pytest.raises(DataError, match="no prompt token"):
        row_embeddings(tiny_llama(), rows, tokens="prompt")
    with pytest.raises(ConfigError, match="got 'all'"):
        row_embeddings(tiny_llama(), rows, tokens="all")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no rows"):
        label_loss(tiny_llama(), [])
    with pytest.raises(DataError, match="no label token"):
        mean_gradient(tiny_llama(), [{"input_ids": [3, 4], "labels": [IGNORE, IGNORE]}])


def score(model: nn.Module, dataset: Any) -> float:
    return float(torch.exp(torch.tensor(-label_loss(model, dataset))))


@pytest.fixture(scope="module")
def trained() -> tuple[TransferMetrics, nn.Module, dict[str, Any]]:
    """Three tasks, the third with the rows of the first; the first two are trained."""
    streams = [rows for _, rows in tiny_stream(2)]
    model = tiny_learner()
    parts = {"t0": streams[0], "t1": streams[1], "t2": streams[0]}
    datasets = {name: {"train": rows, "eval": rows} for name, rows in parts.items()}
    metrics = TransferMetrics(model, datasets, score)
    for name in ("t0", "t1"):
        config = TrainConfig(num_steps=10, learning_rate=1e-2)
        fit_task(
            model,
            NoStrategy(model),
            parts[name],
            task_id=name,
            config=config,
            memory=new_session(),
            on_step=metrics.on_step(name, every=2),
        )
        metrics.after_task(name)
    return metrics, model, parts


@pytest.mark.parametrize("by", ["embedding", "gradient"])
def test_tasks_with_equal_rows_are_alike_and_others_less(trained: Any, by: Any) -> None:
    metrics, model, parts = trained
    table = metrics.task_similarity(by)
    assert table[0][2] == table[2][0] == pytest.approx(1.0)
    assert [table[i][i] for i in range(3)] == pytest.approx([1.0] * 3)
    if by == "gradient":
        vectors = [mean_gradient(model, parts[name]) for name in ("t0", "t1")]
    else:
        vectors = [{"mean": row_embeddings(model, parts[name]).mean(0)} for name in ("t0", "t1")]
    assert table[0][1] == cosine(*vectors)
    assert table[0][1] < 0.999


def test_adapters_are_compared_by_what_they_are_and_by_what_each_task_changed(trained: Any) -> None:
    metrics, _, _ = trained
    snapshots = [lora_factors(metrics.model_snapshots[name]) for name in ("t0", "t1")]
    rows = metrics.adapter_similarity("row")
    assert rows[0][1] == rows[1][0] == adapter_similarity(*snapshots, "row")
    assert rows[0][0] == pytest.approx(1.0)
    # By the full matrices: what each task changed.
    start = lora_factors(metrics.initial)
    overlaps = []
    for name in start:
        full = [u @ v for u, v in (factors[name] for factors in (start, *snapshots))]
        spaces = []
        for change in (full[1] - full[0], full[2] - full[1]):
            u, values, _ = torch.linalg.svd(change)
            spaces.append(u[:, : int((values > 1e-9 * values[0]).sum())])
        small = min(space.shape[1] for space in spaces)
        overlaps.append(float((spaces[0].T @ spaces[1]).square().sum()) / small)
    found = metrics.adapter_similarity("column", changes=True)[0][1]
    assert found == pytest.approx(sum(overlaps) / len(overlaps), abs=1e-6)


def test_cka_compares_activations_under_each_adapter_and_leaves_the_present_one(trained: Any) -> None:
    metrics, model, _ = trained
    before = trainable(model)
    table = metrics.adapter_similarity("cka")
    assert [table[0][0], table[1][1]] == pytest.approx([1.0, 1.0])
    assert 0 < table[0][1] < 0.9999
    assert_close(trainable(model), before)


def test_the_summary_holds_forward_transfer_and_learning_speed(trained: Any) -> None:
    metrics, _, _ = trained
    found = metrics.compute_transfer_metrics()
    summary = metrics.forgetting.compute_forgetting()
    gain = summary["matrix"][0][1] - summary["base_scores"][1]
    assert found["forward_transfer"] == {"t1": gain}
    assert found["fwt"] == gain
    curve = metrics.compute_learning_curves()["t0"]
    assert [step for step, _ in curve] == [2, 4, 6, 8, 10]
    heights = [loss for _, loss in curve]
    by_hand = (heights[0] / 2 + heights[1] + heights[2] + heights[3] + heights[4] / 2) / 4
    assert found["mean_loss"]["t0"] == pytest.approx(by_hand)
    assert (found["tasks"], found["trained"]) == (["t0", "t1", "t2"], ["t0", "t1"])
    assert len(found["row_similarity"]) == len(found["column_similarity"]) == 2


def test_a_plain_model_without_a_metric_has_no_adapters_to_compare_and_no_scores() -> None:
    model = tiny_llama_base()
    metrics = TransferMetrics(model, {"t0": tiny_dataset("t0", 4)})
    metrics.after_task("t0")
    found = metrics.compute_transfer_metrics()
    assert found["row_similarity"] is None
    assert "fwt" not in found


def test_one_task_has_no_forward_transfer() -> None:
    metrics = TransferMetrics(tiny_llama(), {"t0": tiny_dataset("t0", 4)}, score)
    assert metrics.compute_transfer_metrics()["fwt"] is None
    metrics.after_task("t0")
    found = metrics.compute_transfer_metrics()
    assert (found["forward_transfer"], found["fwt"], found["bwt"]) == ({}, None, None)
    assert found["row_similarity"] == [[None]]  # nothing was trained: the adapter did not change


def test_wrong_calls_are_named() -> None:
    model = get_peft_model(tiny_llama_base(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    metrics = TransferMetrics(model, {"t0": tiny_dataset("t0", 4)}, max_rows=2)
    assert len(metrics.rows["t0"]) == 2
    with pytest.raises(DataError, match="no task"):
        metrics.adapter_similarity()
    with pytest.raises(DataError, match="no step was recorded"):
        metrics.visualize_learning_curves()
    metrics.after_task("t0")
    with pytest.raises(ConfigError, match="lora_magnitude_vector"):
        metrics.adapter_similarity("row")
    with pytest.raises(ConfigError, match="changes=True"):
        metrics.adapter_similarity("cka", changes=True)
    with pytest.raises(ConfigError, match="got 'weights'"):
        metrics.adapter_similarity("weights")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="got 'name'"):
        metrics.task_similarity("name")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="recorded already"):
        metrics.after_task("t0")
    with pytest.raises(ConfigError, match="no task 't9'"):
        metrics.record_step("t9", 1, 0.5)
    metrics.record_step("t0", 1, 0.5)
    with pytest.raises(ConfigError, match="must grow"):
        metrics.record_step("t0", 1, 0.5)
    with pytest.raises(DataError, match="finite"):
        metrics.record_step("t0", 2, float("nan"))


def test_pictures_show_the_tables_and_the_curves(trained: Any) -> None:
    metrics, _, _ = trained
    values = metrics.task_similarity("gradient")
    heat = metrics.visualize_task_similarity("gradient").data[0]
    assert [list(row) for row in heat.z] == values
    heat = metrics.visualize_adapter_similarity("row").data[0]
    assert [list(row) for row in heat.z] == metrics.adapter_similarity("row")
    lines = {trace.name: list(trace.y) for trace in metrics.visualize_learning_curves().data}
    assert lines["t0"] == [loss for _, loss in metrics.compute_learning_curves()["t0"]]
