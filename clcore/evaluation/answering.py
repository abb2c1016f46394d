"""Greedy answers in batches: the tokens that model.generate gives, in fewer passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from clcore.evaluation.kv_batch import KVBatch, Prefix, has_plain_cache
from clcore.evaluation.questions import Question

MAX_DRAFT_TOKENS = 16
"""Tokens of a guess that one pass checks."""

Drafts = Mapping[tuple[int, ...], tuple[int, ...]]
"""How an answer may go on: its tokens so far -> tokens that come next in a reference."""


def drafts_from(questions: Sequence[Question], eos: int | None) -> Drafts:
    """Return guesses from the references; where several fit, the most frequent reference wins."""
    found: dict[tuple[int, ...], tuple[int, ...]] = {}
    completions = Counter(_without_end(question.completion, eos) for question in questions)
    for completion, _ in completions.most_common():
        for i in range(1, min(len(completion), MAX_DRAFT_TOKENS)):
            found.setdefault(completion[:i], completion[i : i + MAX_DRAFT_TOKENS])
    return found


@torch.inference_mode()
def greedy_answers(
    model: nn.Module,
    questions: Sequence[Question],
    *,
    limit: int,
    eos: int | None,
    pad: int,
    prefix: Prefix | None = None,
    drafts: Drafts | None = None,
) -> list[list[int]]:
    """Return the tokens of each greedy answer, without the end token, at most limit.

    A pass takes a prompt together with a guess at its answer, first the reference, and yields the most
    likely token after each token of the guess. The guess counts up to its first wrong token only, so the
    answer is that of plain decoding whatever is guessed, and a right answer costs one pass (speculative
    decoding, Leviathan et al. 2023, with the references as the draft model). A row that is done leaves the
    batch. Models whose layers do not attend to all of the past decode one token per pass.
    """
    can_guess = has_plain_cache(model)
    batch = KVBatch(model, len(questions), pad, prefix)
    skipped = len(prefix.tokens) if prefix else 0
    answers: list[list[int]] = [[] for _ in questions]
    alive = list(range(len(questions)))
    pieces = [list(question.prompt[skipped:]) for question in questions]
    guesses = [_without_end(q.completion, eos)[: min(limit - 1, MAX_DRAFT_TOKENS)] for q in questions]
    while True:
        guesses = guesses if can_guess else [()] * len(alive)
        num_logits = 1 + max(map(len, guesses))
        fed = [[*piece, *guess] for piece, guess in zip(pieces, guesses, strict=True)]
        best = batch.feed(fed, num_logits).argmax(dim=-1).tolist()
        for place, row in enumerate(alive):
            guess, found = guesses[place], best[place][num_logits - 1 - len(guesses[place]) :]
            right = next((i for i, token in enumerate(guess) if token != found[i]), len(guess))
            batch.forget(place, len(guess) - right)
            if fed[place]:
                answers[row] = _ended([*answers[row], *found[: right + 1]], eos)
        goes_on = [len(answers[row]) < limit and answers[row][-1] != eos for row in alive]
        if not any(goes_on):
            return [answer[:-1] if answer[-1] == eos else answer for answer in answers]
        if can_guess:
            places = [place for place, goes in enumerate(goes_on) if goes]
            batch.keep(places)
            alive, goes_on = [alive[place] for place in places], [True] * len(places)
        pieces = [[answers[row][-1]] if goes else [] for row, goes in zip(alive, goes_on, strict=True)]
        guesses = [
            (drafts or {}).get(tuple(answers[row]), ())[: limit - 1 - len(answers[row])] for row in alive
        ]


def _ended(tokens: list[int], eos: int | None) -> list[int]:
    """Cut behind the first end token."""
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


def _without_end(tokens: tuple[int, ...], eos: int | None) -> tuple[int, ...]:
    return tokens[:-1] if tokens[-1] == eos else tokens
