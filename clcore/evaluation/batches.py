"""Which rows go through the model together: the split that costs least."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clcore.evaluation.questions import Question

PASS_COST_TOKENS = {"cpu": 64}
"""What a batch costs beside its tokens, in tokens: its passes read all weights. As measured with 135M."""
ACCELERATOR_PASS_COST_TOKENS = 4096
"""The same where a pass waits for its launch and tokens are cheap: padding hardly counts."""


def split(
    questions: Sequence[Question],
    batch_size: int,
    *,
    device: torch.device,
    num_shared: int = 0,
    max_scored: int | None = None,
) -> list[list[Question]]:
    """Split questions into batches of similar length, the longest first: too little memory shows at once.

    A batch costs its rows times its longest row, without the num_shared tokens that no row is fed, and
    PASS_COST_TOKENS; the split has the lowest sum. No batch has more than batch_size rows, nor, unless it has
    one row only, more than max_scored positions that the output head sees: rows times longest completion.
    """
    order = sorted(questions, key=lambda q: (-len(q.prompt) - len(q.completion), q.row))
    fed = [len(question.prompt) + len(question.completion) - num_shared for question in order]
    pass_cost = PASS_COST_TOKENS.get(device.type, ACCELERATOR_PASS_COST_TOKENS)
    # best[i]: the least cost of the rows from i on, and where the first of their batches ends
    best: list[tuple[int, int]] = [(0, 0)] * (len(order) + 1)
    for start in reversed(range(len(order))):
        options = []
        widest = 0
        for end in range(start + 1, min(start + batch_size, len(order)) + 1):
            widest = max(widest, len(order[end - 1].completion))
            if max_scored is not None and end > start + 1 and widest * (end - start) > max_scored:
                break
            options.append((fed[start] * (end - start) + pass_cost + best[end][0], -end))
        cost, negative_end = min(options)  # of equal splits the one whose first batch has more rows
        best[start] = (cost, -negative_end)
    found, start = [], 0
    while start < len(order):
        end = best[start][1]
        found.append(order[start:end])
        start = end
    return found
