"""The split of rows into batches against all splits there are."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from clcore.evaluation.batches import PASS_COST_TOKENS, split
from clcore.evaluation.questions import Question

CPU = torch.device("cpu")


def questions(lengths: list[int], completion: int = 1) -> list[Question]:
    return [Question(i, (0,) * (n - completion), (0,) * completion, "") for i, n in enumerate(lengths)]


def cost(sizes: tuple[int, ...], lengths: list[int], num_shared: int) -> int:
    total, start = 0, 0
    for size in sizes:
        total += size * (lengths[start] - num_shared) + PASS_COST_TOKENS["cpu"]
        start += size
    return total


@pytest.mark.parametrize("seed", range(5))
def test_no_split_of_the_sorted_rows_costs_less(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(20, 200) for _ in range(9)]
    found = split(questions(lengths), 4, device=CPU, num_shared=10)
    in_order = sorted(lengths, reverse=True)
    assert [len(q.prompt) + 1 for batch in found for q in batch] == in_order
    assert sorted(q.row for batch in found for q in batch) == list(range(9))
    sizes = [s for k in range(1, 10) for s in itertools.product(range(1, 5), repeat=k) if sum(s) == 9]
    best = min(cost(s, in_order, 10) for s in sizes)
    assert cost(tuple(map(len, found)), in_order, 10) == best
    assert len({len(batch) for batch in found}) > 1  # not simply full batches


def test_on_an_accelerator_there_are_as_few_batches_as_can_be() -> None:
    lengths = list(range(50, 500, 50))
    assert len(split(questions(lengths), 4, device=torch.device("cuda"))) == 3
    assert len(split(questions(lengths), 4, device=CPU)) > 3


def test_the_head_never_sees_more_positions_than_allowed_unless_one_row_has_them() -> None:
    found = split(questions([50] * 6, 30), 16, device=CPU, max_scored=100)
    assert list(map(len, found)) == [3, 3]
    assert list(map(len, split(questions([50] * 2, 30), 16, device=CPU, max_scored=10))) == [1, 1]


def test_no_questions_make_no_batch() -> None:
    assert split([], 4, device=CPU) == []
