"""Replay quality control: every reason on planted rows, and each formula against a slow one.

Long, because every reason for which a row is dropped has its own planted rows here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from clcore.engine.errors import ConfigError, DataError
from clcore.engine.tasks import IGNORE, encode_row
from clcore.strategies import quality_checks as checks
from clcore.strategies.quality_report import REASONS
from clcore.strategies.quality_rows import read_item
from clcore.strategies.replay_quality import QualityController
from tests.clcore.tiny import tiny_dataset

TASK = "Which desk answers this letter? Choose one of: billing, shipping, repairs.\n\nLetter: {}\n\nAnswer:"
LETTERS = [
    ("I was charged twice for the same kettle in March.", "billing"),
    ("The parcel from Oslo never reached my neighbour.", "shipping"),
    ("My bicycle pump lost pressure after one week.", "repairs"),
    ("Please send the invoice to our office in Lyon.", "billing"),
    ("Could the courier ring the bell at the back door?", "shipping"),
    ("A hinge of the wardrobe broke while we moved.", "repairs"),
    ("Why does my bank show a fee from you?", "billing"),
    ("Tracking says the boxes are still at the harbour.", "shipping"),
    ("The radio hums whenever the heating is on.", "repairs"),
    ("I cancelled the garden plan but paid for June.", "billing"),
    ("Two of three lamps arrived, one is missing.", "shipping"),
    ("Water drips from the coffee machine's lid.", "repairs"),
    ("Is value added tax part of the price?", "billing"),
    ("Deliver after six, nobody is at home before.", "shipping"),
    ("The zip of the tent is stuck for good.", "repairs"),
    ("My refund was promised for last Tuesday.", "billing"),
    (
        "The blue armchair from your spring sale was delivered with one leg shorter than the others, "
        "and the courier left before we could show him.",
        "shipping",
    ),
]
LONG_LETTER = (
    "The white cupboard that I ordered for my mother's kitchen came with a deep scratch on its left door, "
    "one handle was bent and the bag with the small screws was nowhere in the box."
)


def letter(text: str, answer: str, ref: str = "", **fields: Any) -> dict[str, Any]:
    return {"prompt": TASK.format(text), "completion": f" {answer}", "ref": ref, **fields}


def good_rows() -> list[dict[str, Any]]:
    return [letter(text, answer, f"letters:{i}") for i, (text, answer) in enumerate(LETTERS)]


def nearly_the_last(ref: str) -> dict[str, Any]:
    text, answer = LETTERS[-1]
    return letter(text.replace("blue", "green"), answer, ref)


def verdicts(controller: QualityController) -> dict[str, str]:
    return {record.ref: record.reason for record in controller.provenance}


def reason_for(row: Any, **settings: Any) -> str:
    controller = QualityController(**{"min_length": 1, **settings})
    controller.filter_examples([row])
    return controller.provenance[0].reason


# ------------------------------------------------------------------------------------- the whole pipeline


def test_every_planted_row_is_dropped_for_its_reason_and_every_good_one_is_kept() -> None:
    good = good_rows()
    planted = {
        "no fields": ("invalid_format", {"text": "hello", "ref": "no fields"}),
        "no string": ("invalid_format", {"prompt": "p", "completion": 3, "ref": "no string"}),
        "mojibake": ("broken_text", letter("The din\ufffdr chair wobbles on tiles.", "repairs", "mojibake")),
        "blank": ("empty_completion", letter("The stove door does not close.", " \n", "blank")),
        "other label": ("label_not_allowed", letter("My kite has a torn wing.", "kites", "other label")),
        "refused": ("validator", letter("Call me on +31 6 12345678 about the sofa.", "shipping", "refused")),
        "short": ("too_short", {"prompt": "Why?", "completion": " billing", "ref": "short"}),
        "long": ("too_long", letter(" ".join(f"word{i}" for i in range(200)), "billing", "long")),
        "leaked": ("contaminated", letter(LONG_LETTER, "repairs", "leaked")),
        "loop": ("low_quality", letter("where is it " * 20, "shipping", "loop")),
        "symbols": (
            "low_quality",
            {
                "prompt": "@# $% ^& *( )_ +| }{ ~` /? >< " * 4 + "a b c d e f g h i j",
                "completion": " billing",
            },
        ),
        "again": ("exact_duplicate", letter(LETTERS[3][0].upper(), "billing", "again")),
        "nearly": ("near_duplicate", nearly_the_last("nearly")),
    }
    planted["symbols"][1]["ref"] = "symbols"
    mixed: list[Any] = [*good, *(row for _, row in planted.values())]
    random.Random(3).shuffle(mixed)
    mixed.sort(key=lambda row: row["ref"] in ("again", "nearly"))  # the originals come first
    controller = QualityController(
        max_length=200,
        allowed_labels={"billing", "shipping", "repairs"},
        validator=lambda row: "a phone number" if "+31" in row["prompt"] else None,
        evaluation_rows=[letter(LONG_LETTER, "repairs")],
    )
    kept = controller.filter_examples(mixed)
    expected = [row for row in mixed if row["ref"].startswith("letters:")]
    assert [id(row) for row in kept] == [id(row) for row in expected]  # the same objects in the same order
    assert {ref: r for ref, r in verdicts(controller).items() if r} == {k: r for k, (r, _) in planted.items()}


def test_report_and_provenance_say_what_was_decided_and_survive_json(tmp_path: Path) -> None:
    rows = [*good_rows(), letter("x", "billing", "short:0"), letter(LETTERS[0][0], "billing", "other:7")]
    controller = QualityController(min_length=16, skip=["validator"], validator=lambda _: "never")
    controller.filter_examples(rows)
    controller.write_report(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    report = controller.report
    assert written["report"] == report
    assert (report["num_rows"], report["num_kept"], report["num_dropped"]) == (19, 17, 2)
    assert {k: v for k, v in report["reasons"].items() if v} == {"too_short": 1, "exact_duplicate": 1}
    assert list(report["reasons"]) == list(REASONS)
    assert report["examples"]["exact_duplicate"] == [
        {"ref": "other:7", "detail": "jaccard 1.000 with letters:0"}
    ]
    assert report["tasks"]["letters"] == {"kept": 17, "dropped": 0}
    assert report["thresholds"]["min_length"] == 16
    assert report["thresholds"]["skip"] == ["validator"]
    record, twin = written["rows"][0], written["rows"][18]
    assert (record["ref"], record["task"], record["is_kept"], record["reason"]) == (
        "letters:0", "letters", True, "",
    )  # fmt: skip
    assert record["sha256"] == twin["sha256"] != written["rows"][1]["sha256"]
    assert len(record["sha256"]) == 64
    assert record["measured"]["length"] == 13 + 10 + 1  # words of the instruction, of the letter, the answer


def test_nothing_in_gives_nothing_out_and_a_report_of_zeros() -> None:
    controller = QualityController()
    assert controller.report["num_rows"] == 0
    assert controller.filter_examples([]) == []
    assert controller.report["num_rows"] == controller.report["num_dropped"] == 0
    assert not any(controller.report["reasons"].values())


def test_one_object_kept_over_calls_decides_as_a_new_one() -> None:
    controller = QualityController()
    rows = good_rows()
    assert controller.filter_examples(rows) == rows
    assert controller.filter_examples(rows) == rows
    assert controller.report["num_rows"] == 17


def test_rows_that_the_buffer_holds_are_not_judged_but_keep_repeats_out() -> None:
    rows = good_rows()
    bad_but_accepted = {"prompt": "", "completion": "x", "ref": "old:1"}
    twins = [letter(*LETTERS[5], "old:0"), letter(*LETTERS[5], "old:2")]
    controller = QualityController()
    kept = controller.filter_examples(rows, accepted=[bad_but_accepted, *twins])
    assert kept == [*rows[:5], *rows[6:]]
    assert controller.provenance[5].detail == "jaccard 1.000 with old:0"
    with pytest.raises(DataError, match="a row needs"):
        controller.filter_examples(rows, accepted=[{"nothing": 1}])


@pytest.mark.parametrize("reason", ["too_short", "low_quality", "exact_duplicate", "near_duplicate"])
def test_a_skipped_reason_drops_nothing(reason: str) -> None:
    looped = {"prompt": "so it is " * 9, "completion": "yes", "ref": "low_quality"}
    near = nearly_the_last("near_duplicate")
    exact = letter(*LETTERS[2], "exact_duplicate")
    short = {"prompt": "Why?", "completion": "no", "ref": "too_short"}
    rows = [*good_rows(), looped, near, exact, short]
    expected = {"low_quality", "near_duplicate", "exact_duplicate", "too_short"}
    # What is skipped as an exact duplicate is still a near one.
    skip = [reason, "near_duplicate"] if reason == "exact_duplicate" else [reason]
    controller = QualityController(skip=skip)
    controller.filter_examples(rows)
    assert {ref for ref, why in verdicts(controller).items() if why} == expected - set(skip)


# ------------------------------------------------------------------------------------- what a row is


def test_rows_as_tokens_give_the_same_verdicts_as_their_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"prompt": "a b c d e f g h ? ", "completion": "k l m"},
        {"prompt": "n o p q r s t u ? ", "completion": "v w x"},
        {"prompt": "a b c d e f g h ? ", "completion": "k l m"},
        {"prompt": "a b c d e f g h ? ", "completion": "k l z"},
        {"prompt": "1 2 3 1 2 3 1 2 3 1 2 3 1 2 3 ? ", "completion": "y"},
    ]
    examples = [encode_row(row, tokenizer, 64, f"t:{i}") for i, row in enumerate(rows)]
    reasons = ["", "", "exact_duplicate", "near_duplicate", "low_quality"]
    for given, settings in ((rows, {}), (examples, {}), (examples, {"tokenizer": tokenizer})):
        controller = QualityController(diversity_threshold=0.6, **settings)
        kept = controller.filter_examples(given)
        assert [record.reason for record in controller.provenance] == reasons
        assert kept[0] is given[0]
        assert len(kept) == 2


def test_messages_strings_and_prompts_with_one_content_are_duplicates() -> None:
    words_in_row = "The old ferry leaves at noon. When does it leave? At noon, said the captain."
    prompt, completion = words_in_row.split("? ")
    messages = [
        {"role": "system", "content": "The old ferry leaves at noon."},
        {"role": "user", "content": "When does it leave?"},
        {"role": "assistant", "content": "At noon, said the captain."},
    ]
    rows: list[Any] = [
        {"prompt": f"{prompt}?", "completion": f" {completion}"}, {"messages": messages}, words_in_row,
    ]  # fmt: skip
    controller = QualityController()
    assert controller.filter_examples(rows) == rows[:1]
    assert [record.reason for record in controller.provenance] == ["", "exact_duplicate", "exact_duplicate"]
    assert [record.ref for record in controller.provenance] == ["#0", "#1", "#2"]


@pytest.mark.parametrize(
    ("row", "words_of_detail"),
    [
        (7, "got int"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "last message must be the assistant's"),
        ({"messages": [{"role": "assistant", "content": None}]}, "'content' string"),
        ({"input_ids": torch.ones(2, 3), "labels": torch.ones(2, 3)}, r"share a shape (L,), got (2, 3)"),
        ({"input_ids": [1, 2], "labels": [1]}, r"got (2,) and (1,)"),
    ],
)
def test_a_row_that_cannot_be_read_is_dropped_with_the_reason_in_words(
    row: Any, words_of_detail: str
) -> None:
    controller = QualityController(min_length=1)
    assert controller.filter_examples([row]) == []
    assert controller.provenance[0].reason == "invalid_format"
    assert words_of_detail in controller.provenance[0].detail


def test_a_row_without_a_trained_token_has_no_label() -> None:
    ids = torch.arange(12)
    assert reason_for({"input_ids": ids, "labels": torch.full((12,), IGNORE)}) == "no_label"
    # The first token of a row is never predicted, so its label alone trains nothing.
    assert reason_for({"input_ids": ids, "labels": torch.tensor([0] + [IGNORE] * 11)}) == "no_label"
    assert reason_for({"input_ids": ids, "labels": torch.tensor([IGNORE, 1] + [IGNORE] * 10)}) == ""
    assert reason_for({"input_ids": ids}) == ""


def test_defaults_keep_the_tiny_rows_once_min_length_allows_them() -> None:
    rows = tiny_dataset("t0", 16)
    assert QualityController(min_length=1).filter_examples(rows) == rows
    assert QualityController().filter_examples(rows) == []


def test_length_counts_words_of_a_text_and_tokens_of_an_example() -> None:
    assert read_item("It's 5 o'clock, isn't it?", 0).length == 8  # it s 5 o clock isn t it
    assert read_item("東京タワー 333m", 0).length == 6  # every Han or Kana character, and one word
    assert read_item({"input_ids": list(range(7))}, 0).length == 7
    for low, high, reason in ((3, 3, ""), (4, 9, "too_short"), (1, 2, "too_long")):
        assert reason_for("one two, three!", min_length=low, max_length=high) == reason


def test_a_cut_prompt_may_hold_a_replacement_character_but_a_completion_may_not() -> None:
    class Bytes:
        """Reads ids as UTF-8."""

        def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
            assert skip_special_tokens
            return bytes(ids).decode("utf-8", errors="replace")

    half = "é".encode()[1:]
    prompt, answer = half + b"tude numero sept, second part", b" en majeur"
    row = {"input_ids": list(prompt + answer), "labels": [IGNORE] * len(prompt) + list(answer)}
    assert reason_for(row, tokenizer=Bytes()) == ""
    row = {"input_ids": list(prompt + half), "labels": [IGNORE] * len(prompt) + list(half)}
    assert reason_for(row, tokenizer=Bytes()) == "broken_text"


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("fine\n\ttext é 東 😀", None),
        ("a\x00b", "\x00"),
        ("a\x1bb", "\x1b"),
        ("\ufffd", "\ufffd"),
        (chr(0xDC80), chr(0xDC80)),
    ],
)
def test_broken_characters_are_control_codes_surrogates_and_the_replacement(text: str, broken: str) -> None:
    assert checks.broken_character(text) == broken
    assert reason_for(f"one two three {text}") == ("broken_text" if broken else "")


def test_a_validator_sees_texts_and_its_words_are_the_detail() -> None:
    seen: list[Mapping[str, Any]] = []

    def validator(row: Mapping[str, Any]) -> str | None:
        seen.append(row)
        return "no question mark" if "?" not in row["prompt"] else None

    rows: list[Any] = [letter(*LETTERS[0]), {"prompt": "no question at all here", "completion": "x"}, "plain"]
    controller = QualityController(min_length=1, validator=validator)
    assert controller.filter_examples(rows) == rows[:1]
    assert seen == [*rows[:2], {"prompt": "", "completion": "plain"}]
    assert controller.provenance[1].detail == "no question mark"


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
