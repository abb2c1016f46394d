"""Replay quality control: every reason on planted rows, whatever a row is."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from clcore.engine.errors import DataError
from clcore.engine.tasks import IGNORE, encode_row
from clcore.strategies import quality_checks as checks
from clcore.strategies.quality_report import REASONS
from clcore.strategies.quality_rows import read_item
from clcore.strategies.replay_quality import QualityController
from tests.clcore.letters import (
    LETTERS,
    LONG_LETTER,
    good_rows,
    letter,
    nearly_the_last,
    reason_for,
    verdicts,
)
from tests.clcore.tiny import tiny_dataset

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
