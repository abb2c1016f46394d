"""Replay quality control: each formula against a slow one, and arguments that are refused."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from clcore.engine.errors import ConfigError, DataError
from clcore.engine.tasks import IGNORE
from clcore.strategies import quality_checks as checks
from clcore.strategies.quality_rows import read_item
from clcore.strategies.replay_quality import QualityController
from tests.clcore.letters import (
    LONG_LETTER,
    TASK,
    good_rows,
    reason_for,
)
from tests.clcore.tiny import tiny_dataset

# ------------------------------------------------------------------------------------- the formulas


def random_texts(num_rows: int) -> list[str]:
    """Return sentences of 12 to 30 words, and copies of them with some words changed."""
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(400)]
    texts: list[str] = []
    for _ in range(num_rows):
        if texts and rng.random() < 0.6:
            changed = rng.choice(texts).split()
            for _ in range(rng.randint(0, 4)):
                changed[rng.randrange(len(changed))] = rng.choice(vocabulary)
            texts.append(" ".join(changed))
        else:
            texts.append(" ".join(rng.choices(vocabulary, k=rng.randint(12, 30))))
    return texts


@pytest.mark.parametrize(
    ("threshold", "num_perm"), [(0.3, 128), (0.5, 128), (0.8, 128), (0.8, 64), (1.0, 16)]
)
def test_near_duplicates_are_those_of_all_pairs(threshold: float, num_perm: int) -> None:
    texts = random_texts(250)
    shingles = [{tuple(t.split()[i : i + 3]) for i in range(len(t.split()) - 2)} for t in texts]
    kept: list[int] = []
    for i, mine in enumerate(shingles):
        if not any(len(mine & shingles[k]) / len(mine | shingles[k]) >= threshold for k in kept):
            kept.append(i)
    assert 60 < len(kept) < 245
    controller = QualityController(diversity_threshold=threshold, num_perm=num_perm, template_share=1.0)
    assert controller.filter_examples(texts) == [texts[i] for i in kept]


def test_a_pair_exactly_at_the_threshold_is_a_duplicate() -> None:
    # Shingles of 3: 12 words give 10, and 2 at the end differ: 8 shared of 12.
    left = "a b c d e f g h i j k l"
    right = "a b c d e f g h i j m n"
    assert checks.jaccard(checks.shingles(left.split(), 3), checks.shingles(right.split(), 3)) == 8 / 12
    for threshold, num_kept in ((8 / 12, 1), (8 / 12 + 1e-9, 2)):
        assert (
            len(QualityController(diversity_threshold=threshold).filter_examples([left, right])) == num_kept
        )


@pytest.mark.parametrize("num_perm", [16, 64, 128, 256])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8, 1.0])
def test_bands_miss_a_pair_at_the_threshold_as_rarely_as_said(threshold: float, num_perm: int) -> None:
    bands, rows = checks.lsh_bands(threshold, num_perm)
    assert bands * rows <= num_perm

    def missed(rows: int) -> float:
        return float((1 - threshold**rows) ** (num_perm // rows))

    assert missed(rows) <= 1e-4 or rows == 1
    assert all(missed(more) > 1e-4 for more in range(rows + 1, num_perm // 2 + 1))


def test_the_template_of_a_task_makes_no_row_similar_and_can_be_counted_on_demand() -> None:
    rows = good_rows()
    assert QualityController().filter_examples(rows) == rows
    counted = QualityController(template_share=1.0, diversity_threshold=0.4)
    assert len(counted.filter_examples(rows)) < len(rows)
    items = [read_item(row, i) for i, row in enumerate(rows)]
    letter_0 = "i was charged twice for the same kettle in march billing"
    assert " ".join(map(str, checks.contents(items, 0.5)[0])) == letter_0
    assert checks.contents(items[:7], 0.5)[0] == items[0].units  # too few rows to tell


def test_a_template_is_found_in_one_task_and_taken_out_of_all_rows() -> None:
    rows = good_rows()
    other = [
        {"prompt": f"Say {i} in words, now. {letter}", "completion": "n", "task": "numbers"}
        for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")
    ]
    items = [read_item(row, i) for i, row in enumerate([*rows, *other])]
    items.append(read_item({**rows[0], "ref": "alone:0"}, 0))
    *contents, alone = checks.contents(items, 0.5)
    assert alone == contents[0]
    assert contents[:17] == checks.contents(items[:17], 0.5)
    assert contents[-1] == ("say", "25", "z", "n")


def test_rows_that_are_all_template_are_compared_in_full() -> None:
    rows = ["one two three four five"] * 9 + ["one two three four"]
    controller = QualityController(min_length=1)
    assert controller.filter_examples(rows) == [rows[0], rows[9]]  # 2 of 3 shingles


def test_contamination_is_the_share_of_n_grams_counted_by_hand() -> None:
    evaluation = ["one two three four five six. Seven, eight nine ten!"]
    settings: dict[str, Any] = {"min_length": 1, "evaluation_rows": evaluation, "contamination_ngram": 4}
    # Words a b five six seven eight nine c d: of six 4-grams, two are in the evaluation row.
    row = "a b five six seven eight nine c d"
    controller = QualityController(**settings)
    assert controller.filter_examples([row]) == [row]
    assert controller.provenance[0].measured["contamination"] == 2 / 6
    assert reason_for(row, **settings, contamination_threshold=2 / 6) == "contaminated"
    assert reason_for(row, **settings, contamination_threshold=2 / 6 + 1e-9) == ""
    assert (
        reason_for("six seven (eight) NINE, ten", **settings) == "contaminated"
    )  # case and marks do not count


def test_thirteen_words_in_a_row_are_contamination_whatever_the_share() -> None:
    shared = [f"s{i}" for i in range(13)]
    around = [f"r{i}" for i in range(100)]
    evaluation = [" ".join(["x", "y", *shared, "z"])]
    for num_shared, reason in ((13, "contaminated"), (12, "")):
        row = " ".join([*around[:50], *shared[:num_shared], *around[50:]])
        assert reason_for(row, evaluation_rows=evaluation) == reason


def test_a_row_shorter_than_the_n_gram_leaks_only_as_a_whole() -> None:
    settings: dict[str, Any] = {
        "evaluation_rows": ["Berlin has rain today", "In June it rained in Berlin every day"]
    }
    assert reason_for("berlin has rain today!", **settings) == "contaminated"
    assert reason_for("berlin has rain", **settings) == ""
    assert reason_for("it rained in Berlin", **settings) == ""


def test_contamination_works_on_token_ids_too() -> None:
    evaluation = [{"input_ids": list(range(100, 120))}]
    row = {"input_ids": [*range(5), *range(100, 112)]}
    assert reason_for(row, evaluation_rows=evaluation) == "contaminated"  # 5 of 10 8-grams
    assert reason_for({"input_ids": [*range(6), *range(100, 112)]}, evaluation_rows=evaluation) == ""


def test_variety_is_the_share_of_distinct_trigrams() -> None:
    assert checks.variety([1, 2] * 4) == 2 / 6
    assert checks.variety(list("abcdefgh")) == 1
    assert checks.variety(["a"] * 7) == 1  # 7 units say nothing
    assert checks.variety([5] * 10) == 1 / 8


def test_readability_is_twice_the_share_of_letters_and_digits() -> None:
    assert checks.readability("ab #! ?%") == 2 * 2 / 6
    assert checks.readability("2 + 3 = 5") == 1
    assert checks.readability("किं") == 1  # marks on letters count as letters
    assert checks.readability("...") == 0
    assert checks.readability(" \n") == 0


def test_quality_is_the_worst_criterion_and_the_completion_counts_by_itself() -> None:
    prompt = "Tell me in a few words why the sea is salty and why the rivers that feed it are not at all"
    row = {"prompt": f"{prompt}: {LONG_LETTER} {TASK}", "completion": "salt " * 10}
    controller = QualityController(quality_threshold=0.2)
    assert controller.filter_examples([row]) == []
    measured = controller.provenance[0].measured
    assert measured["completion_variety"] == measured["quality"] == 1 / 8
    assert measured["variety"] > 0.85
    assert controller.provenance[0].detail == "completion_variety 0.125 < 0.2"
    assert reason_for(row, quality_threshold=1 / 8) == ""
    tokens = {"input_ids": [*range(100), *[7] * 10], "labels": [IGNORE] * 100 + [7] * 10}
    controller.filter_examples([tokens])
    assert controller.provenance[0].measured["quality"] == 1 / 8


# ------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quality_threshold": 1.1}, r"quality_threshold must be a number in \[0, 1\], got 1.1"),
        ({"quality_threshold": "0.7"}, "quality_threshold must be a number in"),
        ({"quality_threshold": None}, "quality_threshold must be a number in"),
        ({"diversity_threshold": 0}, r"diversity_threshold must be a number in \(0, 1\], got 0"),
        ({"diversity_threshold": float("nan")}, "diversity_threshold must be .* got nan"),
        ({"min_length": -1}, r"min_length must be a whole number in \[0, inf\), got -1"),
        ({"min_length": 2.5}, "min_length must be a whole number"),
        ({"max_length": 5}, r"max_length must be a whole number in \[10, inf\), got 5"),
        ({"embedding_batch_size": 0}, "embedding_batch_size must be"),
        ({"shingle_size": 0}, "shingle_size must be"),
        ({"num_perm": 8}, "num_perm must be"),
        ({"template_share": 2}, "template_share must be"),
        ({"contamination_ngram": 0}, "contamination_ngram must be"),
        ({"contamination_threshold": 0}, "contamination_threshold must be"),
        ({"perplexity_batch_size": True}, "perplexity_batch_size must be"),
        ({"perplexity_fence": -1}, "perplexity_fence must be"),
        ({"min_perplexity": 0.5}, r"min_perplexity must be a number in \[1, inf\), got 0.5"),
        ({"min_perplexity": 9, "max_perplexity": 8}, r"max_perplexity must be a number in \[9, inf\), got 8"),
        ({"max_perplexity": 8}, "max_perplexity=8 needs a model"),
        ({"base_perplexity": True}, "base_perplexity=True needs a model"),
        ({"base_perplexity": True, "model": torch.nn.Linear(1, 1)}, "needs a PEFT model .* got Linear"),
        ({"skip": "too_long"}, "skip must hold names of"),
        ({"skip": ["invalid_format"]}, r"skip must hold names of .* got \['invalid_format'\]"),
        ({"allowed_labels": "yes"}, "allowed_labels must hold completions, got 'yes'"),
        ({"allowed_labels": []}, "allowed_labels must hold completions"),
        ({"allowed_labels": [1]}, r"allowed_labels must hold completions, got \[1\]"),
        ({"allowed_labels": 1}, "allowed_labels must hold completions, got 1"),
        ({"skip": 1}, "skip must hold names of .* got 1"),
        ({"validator": "x"}, "validator must be a function, got 'x'"),
        ({"embed": 1}, "embed must be a function, got 1"),
        ({"evaluation_rows": "abc"}, "evaluation_rows must be a list of rows, got 'abc'"),
        ({"evaluation_rows": 3}, "evaluation_rows must be a list of rows, got 3"),
        ({"embed": len, "embedding_model_name": "m"}, "embedding_model_name or embed, not both"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_refused_with_its_value_and_the_range(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QualityController(**settings)


@pytest.mark.parametrize("one", ["a text", {"prompt": "a", "completion": "b"}])
def test_one_row_in_place_of_a_list_is_refused(one: Any) -> None:
    with pytest.raises(DataError, match="examples must be a list of rows, got one"):
        QualityController().filter_examples(one)


@pytest.mark.parametrize("name", ["allowed_labels", "validator", "embed"])
def test_a_check_of_text_refuses_token_ids_without_a_tokenizer(name: str) -> None:
    value: Any = {"yes"} if name == "allowed_labels" else lambda _: None
    with pytest.raises(ConfigError, match=f"{name} needs text, .* give a tokenizer"):
        QualityController(**{name: value}).filter_examples(tiny_dataset("t0"))


def test_token_ids_are_not_compared_with_text() -> None:
    with pytest.raises(ConfigError, match="rows of text and rows of token ids cannot be compared"):
        QualityController(evaluation_rows=good_rows()).filter_examples(tiny_dataset("t0"))
    with pytest.raises(ConfigError, match="cannot be compared"):
        QualityController().filter_examples([*tiny_dataset("t0"), "a string"])
    with pytest.raises(DataError, match="a row needs"):
        QualityController(evaluation_rows=[{"text": "x"}])
