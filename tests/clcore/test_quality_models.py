"""Replay quality control with models: perplexity by a tiny trained model, and embeddings."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerFast

from clcore.engine import parallel
from clcore.engine.errors import ConfigError, DataError
from clcore.engine.tasks import Example, encode_row
from clcore.strategies import quality_models as models
from clcore.strategies.replay_quality import QualityController
from tests.clcore.fitting import fit
from tests.clcore.tiny import tiny_dataset, tiny_learner, tiny_llama, tiny_llama_base, tiny_tokenizer


def rows_of(answers: str) -> list[dict[str, str]]:
    """One row per letter: the letter, and the answer that stands for it."""
    return [
        {"prompt": f"{letter} ? ", "completion": answer, "ref": f"t:{letter}"}
        for letter, answer in zip("abcdefgh", answers, strict=True)
    ]


@pytest.fixture(scope="module")
def learned() -> nn.Module:
    """A model that answers the next letter."""
    tokenizer: Any = tiny_tokenizer()
    model: Any = tiny_learner()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5)  # so that it can be sure of an answer
    examples = [encode_row(row, tokenizer, 64, row["ref"]) for row in rows_of("bcdefghi")]
    fit(model, examples, num_steps=60, learning_rate=1e-2, batch_size=8, micro_batch_size=8)
    return model


def slow_nll(model: nn.Module, example: Example) -> float:
    """Return nats per label token from the full logits of one row."""
    ids, labels = example["input_ids"][None], example["labels"]
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[0, :-1]
    return float(F.cross_entropy(logits, labels[1:], ignore_index=-100))


# ------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_nll_per_token_is_the_mean_over_labels_of_each_row(batch_size: int) -> None:
    model, examples = tiny_llama(with_b=True), tiny_dataset("t0", 7)
    found = models.nll_per_token(model, examples, batch_size=batch_size)
    assert found == pytest.approx([slow_nll(model, example) for example in examples], rel=1e-5)


def test_the_base_is_the_model_without_its_adapter() -> None:
    model, examples = tiny_llama(with_b=True), tiny_dataset("t0", 4)
    base = tiny_llama_base()
    expected = [slow_nll(base, example) for example in examples]
    assert models.nll_per_token(model, examples, use_base=True) == pytest.approx(expected, rel=1e-5)
    assert models.nll_per_token(model, examples) != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("use_base", [False, True])
def test_measuring_leaves_modes_and_frozen_parameters_as_they_were(use_base: bool) -> None:
    model = tiny_llama(with_b=True, dropout=0.5).train()
    list(model.modules())[-1].eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name and "layers.0" in name)
    modes = [module.training for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    first = models.nll_per_token(model, tiny_dataset("t0", 4), use_base=use_base)
    assert models.nll_per_token(model, tiny_dataset("t0", 4), use_base=use_base) == first  # no dropout
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert {True, False} == set(modes) == set(trained)


def test_ranks_measure_their_own_batches_and_together_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = tiny_llama(with_b=True), tiny_dataset("t0", 9)
    alone = np.array(models.nll_per_token(model, examples, batch_size=2))
    parts = []
    for rank in range(2):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(parallel, "world_size", lambda: 2)
        monkeypatch.setattr(parallel, "sum_over_ranks", list)
        parts.append(np.array(models.nll_per_token(model, examples, batch_size=2)))
    assert np.array_equal(parts[0] + parts[1], alone)
    assert [int((part > 0).sum()) for part in parts] == [5, 4]


def test_a_loss_that_is_not_finite_and_a_row_without_label_are_named() -> None:
    model, examples = tiny_llama(), tiny_dataset("t0", 2)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(DataError, match="row 't0:0' a loss of nan"):
        models.nll_per_token(model, examples)
    examples[1]["labels"][:] = -100
    with pytest.raises(DataError, match="row 't0:1' has no label token"):
        models.nll_per_token(model, examples)


def test_the_fence_is_tukeys_with_a_least_spread() -> None:
    # Quartiles of 0, 2, .., 14 are 3.5 and 10.5.
    values = [2.0 * i for i in range(8)]
    assert models.fence(values, 3.0) == (3.5 - 21, 10.5 + 21)
    assert models.fence([v / 100 for v in values], 3.0) == pytest.approx((0.035 - 3, 0.105 + 3))
    assert models.fence(values, None) == models.fence(values[:7], 3.0) == (-math.inf, math.inf)


# ------------------------------------------------------------------------------------- perplexity


def test_a_wrong_answer_lies_outside_the_fence_of_a_model_that_knows_the_task(
    learned: nn.Module, tokenizer: PreTrainedTokenizerFast
) -> None:
    good, wrong = rows_of("bcdefghi"), {"prompt": "c ? ", "completion": "z", "ref": "t:wrong"}
    for given in (
        [*good, wrong],
        [encode_row(row, tokenizer, 64, row["ref"]) for row in [*good, wrong]],  # as tokens
    ):
        controller = QualityController(min_length=1, tokenizer=tokenizer, model=learned)
        assert controller.filter_examples(given) == given[:8]
        record = controller.provenance[8]
        assert (record.reason, record.ref) == ("perplexity", "t:wrong")
        example = encode_row(wrong, tokenizer, 64)
        assert record.measured["nll"] == pytest.approx(slow_nll(learned, example), rel=1e-4)
        assert "not in [" in record.detail
    tokens_only = QualityController(min_length=1, model=learned)
    assert tokens_only.filter_examples(given) == given[:8]


def test_perplexity_bounds_are_absolute_and_hold_for_the_base_on_demand(
    learned: nn.Module, tokenizer: PreTrainedTokenizerFast
) -> None:
    good = rows_of("bcdefghi")
    wrong = {"prompt": "c ? ", "completion": "z", "ref": "t:wrong"}
    settings: dict[str, Any] = {
        "min_length": 1, "tokenizer": tokenizer, "model": learned, "perplexity_fence": None,
    }  # fmt: skip
    free = QualityController(**settings, base_perplexity=True)
    assert free.filter_examples([*good, wrong]) == [*good, wrong]
    measured = [record.measured for record in free.provenance]
    perplexities = [math.exp(values["nll"]) for values in measured]
    assert max(perplexities[:8]) < 2 < perplexities[8]
    assert QualityController(**settings, max_perplexity=2).filter_examples([*good, wrong]) == good
    assert QualityController(**settings, min_perplexity=2).filter_examples([*good, wrong]) == [wrong]
    nll = measured[8]["nll"]
    for settings_of_bound, num_kept in (
        ({"max_perplexity": math.exp(nll + 0.01)}, 9),
        ({"max_perplexity": math.exp(nll - 0.01)}, 8),
        ({"min_perplexity": math.exp(nll - 0.01)}, 1),
        ({"min_perplexity": math.exp(nll + 0.01)}, 0),
    ):
        bounded = QualityController(**settings, **settings_of_bound)
        assert len(bounded.filter_examples([*good, wrong])) == num_kept
    # The base knows none of the answers, so the same bound drops the good rows there.
    assert min(math.exp(values["base_nll"]) for values in measured) > 2
    with_base = QualityController(**settings, max_perplexity=2, base_perplexity=True)
    assert with_base.filter_examples([*good, wrong]) == []
    assert [record.reason for record in with_base.provenance] == ["base_perplexity"] * 8 + ["perplexity"]
    assert "base_nll" not in with_base.provenance[8].measured


def test_garbage_is_not_part_of_the_fence(learned: nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    short = [{"prompt": "", "completion": "z", "ref": f"short:{i}"} for i in range(20)]
    wrong = {"prompt": "c ? ", "completion": "z", "ref": "t:wrong"}
    controller = QualityController(min_length=2, tokenizer=tokenizer, model=learned)
    assert controller.filter_examples([*rows_of("bcdefghi"), *short, wrong]) == rows_of("bcdefghi")
    assert controller.report["reasons"]["too_short"] == 20
    assert controller.report["reasons"]["perplexity"] == 1


def test_a_conversation_is_measured_with_its_chat_template(
    learned: nn.Module, tokenizer: PreTrainedTokenizerFast, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    controller = QualityController(min_length=1, tokenizer=chat_tokenizer, model=learned)
    assert controller.filter_examples([row]) == [row]
    expected = slow_nll(learned, encode_row(row, chat_tokenizer, 64))
    assert controller.provenance[0].measured["nll"] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ConfigError, match="tokenizer with a chat template"):
        QualityController(min_length=1, tokenizer=tokenizer, model=learned).filter_examples([row])


def test_a_row_that_cannot_become_tokens_is_dropped_with_the_reason(
    learned: nn.Module, tokenizer: PreTrainedTokenizerFast
) -> None:
    # The model has 128 positions.
    endless = {"prompt": "a", "completion": " ".join("abcdefghijklmnopqrst"[i % 17] for i in range(140))}
    controller = QualityController(min_length=1, quality_threshold=0, tokenizer=tokenizer, model=learned)
    assert controller.filter_examples([endless, "a"]) == ["a"]
    assert controller.provenance[0].reason == "invalid_format"
    assert "max_length is 128" in controller.provenance[0].detail
    tokenizer_without_end: Any = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    controller = QualityController(min_length=1, tokenizer=tokenizer_without_end, model=learned)
    assert controller.filter_examples(["a", "a b"]) == ["a b"]
    assert controller.provenance[0].reason == "no_label"


def test_a_model_needs_a_tokenizer_for_rows_of_text(learned: nn.Module) -> None:
    with pytest.raises(ConfigError, match="model needs a tokenizer"):
        QualityController(model=learned).filter_examples(["a plain text"])
    assert isinstance(learned, PeftModel)
    with pytest.raises(ConfigError, match="needs a PEFT model with an adapter, got LlamaForCausalLM"):
        QualityController(model=tiny_llama_base(), base_perplexity=True)


# ------------------------------------------------------------------------------------- embeddings

ANGLES = {"alpha": 0.0, "bravo": 36.0, "charlie": 37.0, "delta": 74.0}
"""cos(36 deg) = 0.809, cos(37 deg) = 0.799."""


def by_angle(texts: list[str]) -> np.ndarray:
    """Embed a text as a vector of its first word's angle, of length 3."""
    angles = np.deg2rad([ANGLES.get(text.split()[0], 180.0) for text in texts])
    return 3 * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def test_the_first_of_rows_with_a_cosine_above_the_threshold_stays() -> None:
    rows = [f"{name} {name}1 {name}2" for name in ANGLES]
    settings: dict[str, Any] = {"min_length": 1, "embed": by_angle}
    # bravo is too close to alpha; charlie to bravo only, which is not in; delta is far from both.
    controller = QualityController(**settings)
    assert controller.filter_examples(rows) == [rows[0], rows[2], rows[3]]
    assert controller.provenance[1].reason == "similar_embedding"
    assert controller.provenance[1].measured["similarity"] == pytest.approx(math.cos(math.radians(36)))
    assert controller.provenance[1].detail == "similarity 0.809 with #0"
    assert QualityController(**settings, diversity_threshold=0.82).filter_examples(rows) == [
        rows[0],
        rows[1],
        rows[3],
    ]
    assert QualityController(**settings).filter_examples(rows[2:], accepted=rows[1:2]) == [rows[3]]
    # All that the buffer holds counts, similar or not.
    assert QualityController(**settings).filter_examples(rows[2:3], accepted=rows[:2]) == []
    assert QualityController(**settings, skip=["similar_embedding"]).filter_examples(rows) == rows


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_only_rows_that_can_still_be_kept_are_embedded_in_batches(batch_size: int) -> None:
    seen: list[list[str]] = []

    def embed(texts: list[str]) -> list[list[float]]:
        seen.append(texts)
        return [[float(text == name) for name in ("a b", "c d", "e f", "g h")] for text in texts]

    controller = QualityController(min_length=2, embed=embed, embedding_batch_size=batch_size)
    controller.filter_examples(["A b", "x", "C d", "E f"], accepted=["g h"])
    assert [text for batch in seen for text in batch] == ["g h", "a b", "c d", "e f"]
    assert max(map(len, seen)) <= batch_size


@pytest.mark.parametrize("vectors", [[[1.0]], [1.0, 2.0], [[math.nan], [1.0]]])
def test_embeddings_of_a_wrong_shape_or_value_are_refused(vectors: Any) -> None:
    with pytest.raises(DataError, match="embed must return one finite vector per text"):
        QualityController(min_length=1, embed=lambda _: vectors).filter_examples(["a b", "c d"])


def test_a_zero_vector_is_like_nothing() -> None:
    assert models.unit_vectors(lambda _: [[0.0, 0.0], [3.0, 4.0]], ["a", "b"], 8).tolist() == [
        [0, 0],
        [0.6, 0.8],
    ]
    assert models.unit_vectors(by_angle, [], 8).shape[0] == 0
    rows = ["a b c", "d e f"]
    assert (
        QualityController(min_length=1, embed=lambda t: np.zeros((len(t), 2))).filter_examples(rows) == rows
    )


def test_without_the_extra_a_model_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        ConfigError, match=r"'some/model' needs sentence-transformers: pip install .*\[embeddings\]"
    ):
        QualityController(embedding_model_name="some/model")


def test_a_sentence_transformers_folder_embeds_the_rows(tmp_path: Path) -> None:
    """A bag of words: each word has its own direction, so the cosine counts shared words."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import BoW

    vocabulary = [f"w{i}" for i in range(40)]
    bag = BoW(vocab=vocabulary)
    sentence_transformers.SentenceTransformer(modules=[bag], device="cpu").save(str(tmp_path))
    rows = [
        " ".join(vocabulary[:10]),
        " ".join(reversed(vocabulary[1:11])),  # 9 of 10 words, no shared shingle
        " ".join(vocabulary[20:30]),
    ]
    assert QualityController().filter_examples(rows) == rows
    controller = QualityController(embedding_model_name=str(tmp_path), embedding_batch_size=2)
    assert controller.filter_examples(rows) == [rows[0], rows[2]]
    assert controller.provenance[1].measured["similarity"] == pytest.approx(0.9)
