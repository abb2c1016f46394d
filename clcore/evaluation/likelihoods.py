"""Negative log-likelihoods in batches, in nats: of completions, and of every label behind each prompt.

B rows, T tokens, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clcore.engine.loss import completion_nll
from clcore.engine.tasks import IGNORE, collate
from clcore.evaluation.kv_batch import KVBatch, Prefix, has_plain_cache
from clcore.evaluation.questions import Question


@torch.inference_mode()
def completion_nlls(
    model: nn.Module, questions: Sequence[Question], *, pad: int, prefix: Prefix | None = None
) -> list[float]:
    """Return the summed nll of each completion."""
    if not has_plain_cache(model):
        return _without_cache(model, [(q.prompt, q.completion) for q in questions], pad)
    skipped = len(prefix.tokens) if prefix else 0
    num_logits = max(len(question.completion) for question in questions)
    batch = KVBatch(model, len(questions), pad, prefix)
    logits_BTV = batch.feed([(*q.prompt[skipped:], *q.completion[:-1]) for q in questions], num_logits)
    targets_BT = torch.full(logits_BTV.shape[:2], IGNORE)
    for i, question in enumerate(questions):
        targets_BT[i, num_logits - len(question.completion) :] = torch.tensor(question.completion)
    targets_BT = targets_BT.to(logits_BTV.device)
    nll_BT = nn.functional.cross_entropy(
        logits_BTV.transpose(1, 2), targets_BT, ignore_index=IGNORE, reduction="none"
    )
    return [float(nll) for nll in nll_BT.double().sum(dim=1)]


@torch.inference_mode()
def label_nlls(
    model: nn.Module,
    questions: Sequence[Question],
    labels: Sequence[tuple[int, ...]],
    *,
    pad: int,
    prefix: Prefix | None = None,
) -> list[list[float]]:
    """Return the summed nll of every label behind each prompt: one list per question, in the labels' order.

    A prompt goes through the model once; each label then starts from its keys and values.
    """
    if not has_plain_cache(model):
        pairs = [(question.prompt, label) for question in questions for label in labels]
        flat = _without_cache(model, pairs, pad, rows_at_once=len(questions))
        return [flat[i : i + len(labels)] for i in range(0, len(flat), len(labels))]
    skipped = len(prefix.tokens) if prefix else 0
    batch = KVBatch(model, len(questions), pad, prefix)
    first_BV = -batch.feed([question.prompt[skipped:] for question in questions], 1)[:, 0].log_softmax(-1)
    columns: list[Tensor] = []
    for label in labels:
        nll_B = first_BV[:, label[0]].double()
        if len(label) > 1:
            rest = len(label) - 1
            logits_BTV = batch.feed([label[:-1]] * len(questions), rest)
            batch.crop(rest)
            targets_BT1 = torch.tensor(label[1:], device=logits_BTV.device).expand(len(questions), -1)[
                ..., None
            ]
            nll_B = nll_B - logits_BTV.log_softmax(-1).gather(2, targets_BT1)[..., 0].double().sum(dim=1)
        columns.append(nll_B)
    found: list[list[float]] = torch.stack(columns, dim=1).tolist()
    return found


def _without_cache(
    model: nn.Module,
    pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    pad: int,
    rows_at_once: int | None = None,
) -> list[float]:
    """Run whole rows through the model, rows_at_once at a time."""
    found: list[float] = []
    size = rows_at_once or len(pairs)
    device = next(model.parameters()).device
    for start in range(0, len(pairs), size):
        examples = []
        for prompt, completion in pairs[start : start + size]:
            ids = torch.tensor([*prompt, *completion])
            labels = ids.clone()
            labels[: len(prompt)] = IGNORE
            examples.append({"input_ids": ids, "labels": labels})
        nll_B, _ = completion_nll(model, collate(examples, pad, device))  # type: ignore[arg-type]
        found.extend(nll_B.tolist())
    return found
