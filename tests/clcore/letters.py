"""Letters to a help desk, for tests of replay quality control."""

from __future__ import annotations

from typing import Any

from clcore.strategies.replay_quality import QualityController

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
