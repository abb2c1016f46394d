"""Scalars of hand-made accuracy matrices, and scores of a model that has learnt something."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch

import clcore.evaluation
from clcore.engine.errors import ConfigError, DataError
from clcore.engine.loop import TrainConfig, fit_task
from clcore.evaluation import METRICS, Evaluation, RowScore, evaluate, matrix_scalars, set_score
from clcore.strategies.none import NoStrategy
from tests.clcore.tiny import fill_b, new_session, tiny_learner, tiny_llama, tiny_stream

BASE = [0.1, 0.2, 0.3]
MATRIX = [
    [0.9, 0.3, 0.2],
    [0.6, 0.8, 0.5],
    [0.5, 0.6, 0.7],
]


def test_every_scalar_of_a_matrix_worked_out_by_hand() -> None:
    scalars = matrix_scalars(MATRIX, BASE)
    expected = {
        "average_accuracy": 0.6,  # (0.5 + 0.6 + 0.7) / 3
        "learning_accuracy": 0.8,  # (0.9 + 0.8 + 0.7) / 3
        "forgetting": 0.3,  # ((0.9 - 0.5) + (0.8 - 0.6)) / 2
        "bwt": -0.3,  # ((0.5 - 0.9) + (0.6 - 0.8)) / 2
        "fwt": 0.15,  # ((0.3 - 0.2) + (0.5 - 0.3)) / 2
    }
    assert scalars == pytest.approx(expected)


def test_micro_averages_count_every_row_the_same() -> None:
    scalars = matrix_scalars(MATRIX, BASE, [10, 30, 60, 5])  # the fourth task is not trained yet
    expected = {
        "micro_average_accuracy": 0.65,  # (10 * 0.5 + 30 * 0.6 + 60 * 0.7) / 100
        "micro_learning_accuracy": 0.75,  # (10 * 0.9 + 30 * 0.8 + 60 * 0.7) / 100
        "micro_forgetting": 0.25,  # (10 * 0.4 + 30 * 0.2) / 40
        "micro_bwt": -0.25,
        "micro_fwt": 1 / 6,  # (30 * 0.1 + 60 * 0.2) / 90
    }
    assert {name: scalars[name] for name in expected} == pytest.approx(expected)
    assert {name: scalars[name] for name in scalars if "micro" not in name} == matrix_scalars(MATRIX, BASE)
    equal = matrix_scalars(MATRIX, BASE, [7, 7, 7])
    assert all(
        equal[f"micro_{name}"] == pytest.approx(value)
        for name, value in scalars.items()
        if "micro" not in name
    )


def test_micro_averages_of_one_task_or_with_a_missing_score_are_none() -> None:
    one = matrix_scalars([[0.5, 0.1]], BASE, [3])
    assert one["micro_average_accuracy"] == 0.5
    assert [one[f"micro_{name}"] for name in ("forgetting", "bwt", "fwt")] == [None] * 3
    assert matrix_scalars([[0.5, 0.1], [None, 0.2]], BASE, [3, 4])["micro_average_accuracy"] is None
    for wrong in ([3], [3, 0]):
        with pytest.raises(DataError, match="num_rows must be positive for 2 tasks"):
            matrix_scalars(MATRIX[:2], BASE, wrong)


def test_forgetting_counts_from_the_best_score_and_bwt_from_the_tasks_own_row() -> None:
    # task 1: 0.5 when trained, 0.9 after task 2, 0.4 at the end; task 2: 0.7 and then 0.8
    scalars = matrix_scalars([[0.5, 0.0, 0.0], [0.9, 0.7, 0.0], [0.4, 0.8, 1.0]], BASE)
    assert scalars["forgetting"] == pytest.approx((0.5 - 0.1) / 2)
    assert scalars["bwt"] == pytest.approx((-0.1 + 0.1) / 2)


def test_the_last_row_never_counts_as_the_best() -> None:
    assert matrix_scalars([[0.2, 0.0], [0.6, 0.5]], BASE)["forgetting"] == pytest.approx(-0.4)


def test_with_one_task_transfer_and_forgetting_are_undefined() -> None:
    assert matrix_scalars([[0.5, 0.1]], BASE) == {
        "average_accuracy": 0.5,
        "learning_accuracy": 0.5,
        "forgetting": None,
        "bwt": None,
        "fwt": None,
    }
    assert set(matrix_scalars([], []).values()) == {None}


def test_columns_of_tasks_that_are_not_trained_yet_do_not_count() -> None:
    assert matrix_scalars([[*row, 0.0] for row in MATRIX], [*BASE, 0.0]) == matrix_scalars(MATRIX, BASE)


def test_a_scalar_that_needs_a_missing_score_is_none_and_never_0() -> None:
    last_missing = matrix_scalars([MATRIX[0], MATRIX[1], [None, 0.6, 0.7]], BASE)
    assert [last_missing[name] for name in ("average_accuracy", "forgetting", "bwt")] == [None, None, None]
    assert last_missing["learning_accuracy"] == pytest.approx(0.8)
    base_missing = matrix_scalars(MATRIX, [0.1, None, 0.3])
    assert base_missing["fwt"] is None
    assert base_missing["bwt"] == pytest.approx(-0.3)
    never_scored = matrix_scalars([[None, 0.3], [None, 0.8]], BASE)
    assert never_scored["forgetting"] is None


@pytest.fixture(scope="module")
def trained() -> tuple[Any, list[tuple[int, dict[str, str]]]]:
    """A model that has half learnt a task; its rows, numbered backwards, with prompts of three lengths."""
    rows, dataset = tiny_stream(1)[0]
    model = tiny_learner()
    config = TrainConfig(num_steps=25, learning_rate=1e-2)
    fit_task(model, NoStrategy(model), dataset, task_id="t0", config=config, memory=new_session())
    padded = [{**row, "prompt": ". " * (i % 3) + row["prompt"]} for i, row in enumerate(rows)]
    return model, [(10 - i, row) for i, row in enumerate([*rows, *padded])]


def scores_of(model: Any, tokenizer: Any, rows: Any, **changes: Any) -> tuple[RowScore, ...]:
    settings: dict[str, Any] = {"metric": "exact_match", "max_length": 32, **changes}
    return evaluate(model, tokenizer, rows, settings.pop("metric"), **settings).rows


def test_scores_keep_the_order_of_rows_and_do_not_depend_on_the_batch_size(
    trained: Any, tokenizer: Any
) -> None:
    model, rows = trained
    by_size = [scores_of(model, tokenizer, rows, batch_size=n) for n in (1, 3, 16)]
    assert by_size[0] == by_size[1] == by_size[2]
    assert [row.row for row in by_size[0]] == [number for number, _ in rows]
    assert [row.reference for row in by_size[0]] == [row["completion"] for _, row in rows]
    scores = [row.score for row in by_size[0]]
    assert 0 < sum(scores) < len(scores)
    assert all(row.score == (row.answer == row.reference) for row in by_size[0])


@pytest.mark.parametrize("metric", METRICS)
def test_without_the_adapter_the_base_model_is_scored_and_the_adapter_comes_back(
    trained: Any, tokenizer: Any, metric: str
) -> None:
    model, rows = trained
    before = scores_of(model, tokenizer, rows, metric=metric)
    base = scores_of(tiny_learner(), tokenizer, rows, metric=metric)  # B is 0: the base model
    assert scores_of(model, tokenizer, rows, metric=metric, with_adapter=False) == base
    assert scores_of(model, tokenizer, rows, metric=metric) == before
    assert base != before


def test_evaluation_reports_progress_and_leaves_the_mode_as_it_was(trained: Any, tokenizer: Any) -> None:
    model, rows = trained
    model.train()
    done: list[int] = []
    scores_of(model, tokenizer, rows[:5], batch_size=2, on_batch=done.append)
    assert len(done) == 3
    assert done[-1] == 5
    assert all(1 <= after - before <= 2 for before, after in zip([0, *done], done, strict=False))
    assert model.training
    model.eval()
    scores_of(model, tokenizer, rows[:1])
    assert not model.training


def test_an_error_in_the_middle_leaves_mode_and_adapter_as_they_were(trained: Any, tokenizer: Any) -> None:
    model, rows = trained
    before = scores_of(model, tokenizer, rows)
    model.train()
    with pytest.raises(ZeroDivisionError):
        scores_of(model, tokenizer, rows, with_adapter=False, on_batch=lambda done: done // 0)
    assert model.training
    assert scores_of(model, tokenizer, rows) == before


def test_no_rows_give_no_scores_and_bad_numbers_are_named(trained: Any, tokenizer: Any) -> None:
    model, rows = trained
    empty = evaluate(model, tokenizer, [], "exact_match", max_length=32)
    assert empty == Evaluation("exact_match", ())
    with pytest.raises(DataError, match="no rows"):
        _ = empty.score
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        scores_of(model, tokenizer, rows, batch_size=0)
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 1, got 0"):
        scores_of(model, tokenizer, rows, max_new_tokens=0)
    with pytest.raises(ConfigError, match=r"metric must be one of exact_match, .*, got 'bleu'"):
        scores_of(model, tokenizer, rows, metric="bleu")
    with pytest.raises(DataError, match="a row number stands twice"):
        scores_of(model, tokenizer, [rows[0], rows[0]])


@pytest.mark.parametrize("metric", ["exact_match", "likelihood", "perplexity"])
def test_a_row_that_cannot_be_used_is_named(trained: Any, tokenizer: Any, metric: str) -> None:
    model, rows = trained
    with pytest.raises(DataError, match=r"row 7: .*prompt.*completion"):
        scores_of(model, tokenizer, [rows[0], (7, {"question": "a"})], metric=metric, labels=["b", "c"])


def test_rows_without_their_numbers_are_refused_with_what_makes_them(trained: Any, tokenizer: Any) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    with pytest.raises(DataError, match=r"pairs \(number, row\), as list\(enumerate\(rows\)\)"):
        evaluate(trained, tokenizer, rows, "exact_match", max_length=32)


def test_dropout_is_off_while_answering(tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = fill_b(tiny_llama(dropout=0.9))
    model.train()
    rows = [(i, row) for i, row in enumerate(tiny_stream(1)[0][0])]
    answers = [scores_of(model, tokenizer, rows, max_new_tokens=4) for _ in range(2)]
    assert answers[0] == answers[1]


def test_a_users_function_scores_the_same_answers(trained: Any, tokenizer: Any) -> None:
    model, rows = trained

    def same_length(answer: str, reference: str) -> float:
        return float(len(answer) == len(reference))

    found = evaluate(model, tokenizer, rows, same_length, max_length=32)
    assert found.metric == "user:same_length"
    exact = scores_of(model, tokenizer, rows)
    assert [row.answer for row in found.rows] == [row.answer for row in exact]
    assert [row.score for row in found.rows] == [same_length(row.answer, row.reference) for row in exact]
    with pytest.raises(DataError, match=r"metric 'user:<lambda>' must return a number in 0\.\.1, got 2"):
        evaluate(model, tokenizer, rows, lambda *_: 2, max_length=32)


def test_parts_merge_in_the_order_of_rows_and_a_row_in_two_parts_is_refused() -> None:
    rows = [RowScore(i, i / 4, "", "") for i in range(4)]
    parts = [Evaluation("token_f1", (rows[2], rows[0])), Evaluation("token_f1", (rows[3], rows[1]))]
    assert Evaluation.merge(parts) == Evaluation("token_f1", tuple(rows))
    assert Evaluation.merge(parts).score == pytest.approx(0.375)  # (0 + 1 + 2 + 3) / 16
    with pytest.raises(DataError, match="two parts"):
        Evaluation.merge([parts[0], parts[0]])
    with pytest.raises(DataError, match="one metric"):
        Evaluation.merge([parts[0], Evaluation("rouge_l", ())])


def test_perplexity_of_a_set_weighs_tokens_not_rows() -> None:
    rows = [RowScore(0, math.exp(-1), "", "", 2.0, 2), RowScore(1, math.exp(-3), "", "", 18.0, 6)]
    # (2 + 18) nats over 2 + 6 tokens, not the mean of e^-1 and e^-3
    assert set_score("perplexity", rows) == pytest.approx(math.exp(-2.5))


def test_every_public_name_loads_and_the_scalars_need_neither_torch_nor_plotly() -> None:
    assert sorted(clcore.evaluation.__all__) == sorted(clcore.evaluation._MODULES)
    assert all(getattr(clcore.evaluation, name) is not None for name in clcore.evaluation.__all__)
    program = (
        "import sys\n"
        "from clcore.evaluation import METRICS, interval, matrix_intervals, matrix_scalars, output_key\n"
        "sys.exit(' '.join({'torch', 'transformers', 'plotly'} & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.stderr.strip(), done.returncode) == ("", 0)
