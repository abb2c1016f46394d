"""The settings of replay quality control: what each means, its default and its range."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import nn

from clcore.engine.errors import ConfigError
from clcore.strategies import quality_models as models
from clcore.strategies.quality_report import REASONS

PARTS = ("tokenizer", "model", "validator", "embed", "evaluation_rows", "allowed_labels", "skip")
"""Settings that are objects or collections."""


@dataclasses.dataclass(eq=False, repr=False)
class QualitySettings:
    """Arguments of QualityController. Raises ConfigError for a value out of range or parts that clash."""

    quality_threshold: float = 0.7
    """Least quality, in [0, 1]: the worst of the criteria of quality_checks.quality. The worst and not the
    mean, so that clean letters do not make up for a row that is nothing but repetition."""
    diversity_threshold: float = 0.8
    """In (0, 1]. A row is dropped when its Jaccard with a kept one is at least this, or its cosine more."""
    min_length: int = 10
    """Of the whole row, prompt and completion: in tokens for an example, in words for a text."""
    max_length: int = 1000
    embedding_model_name: str | None = None
    """A sentence-transformers name or folder; needs the extra "embeddings"."""
    embedding_batch_size: int = 8
    _: dataclasses.KW_ONLY
    tokenizer: Any = None
    """Reads examples as text, and makes tokens of texts for the model. Without it an example is token ids."""
    skip: Collection[str] = ()
    """Reasons that drop nothing: any of REASONS but "invalid_format"."""
    shingle_size: int = 3
    """Words or tokens per shingle."""
    num_perm: int = 128
    """Hash functions of MinHash; they propose pairs, and the exact Jaccard decides."""
    template_share: float = 0.5
    """What more than this share of a task's rows have in common is the prompt's fixed text and counts neither
    as similarity nor as contamination; 1.0 counts everything. Needs 8 rows of the task."""
    allowed_labels: Collection[str] | None = None
    """The completions that are allowed; outer spaces do not count."""
    validator: Callable[[Mapping[str, Any]], str | None] | None = None
    """Row of texts -> None, or what is wrong with it: the place for a teacher, a language or a PII filter."""
    evaluation_rows: Sequence[Any] = ()
    """What must not be trained on. A row is contaminated when contamination_threshold of its n-grams or more
    occur in them, or any run of 13 words or tokens, or when a shorter row is there as a whole."""
    contamination_ngram: int = 8
    contamination_threshold: float = 0.5
    model: nn.Module | None = None
    """Measures perplexity, exp of the mean loss per label token."""
    min_perplexity: float | None = None
    max_perplexity: float | None = None
    perplexity_fence: float | None = 3.0
    """Width of Tukey's fence over the losses, in quartile ranges (quality_models.fence); None: no fence."""
    base_perplexity: bool = False
    """Hold the base model, its PEFT adapter switched off, to the same bounds as well."""
    perplexity_batch_size: int = 8
    embed: models.Embed | None = None
    """N texts -> (N, D) vectors, in place of embedding_model_name. The texts are what the other checks
    compare: words in lower case without the task's template, which would make a task's rows all alike."""

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_parts()

    def thresholds(self) -> dict[str, Any]:
        """Return every setting that JSON can hold, and which of the other parts are there."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        labels = None if self.allowed_labels is None else sorted(self.allowed_labels)
        return {
            **{name: value for name, value in values.items() if name not in PARTS},
            "skip": sorted(self.skip),
            "allowed_labels": labels,
            "num_evaluation_rows": len(self.evaluation_rows),
            "parts": [name for name in PARTS[:4] if values[name] is not None],
        }

    def _check_ranges(self) -> None:
        self._check("quality_threshold", 0, 1)
        for name in ("diversity_threshold", "template_share", "contamination_threshold"):
            self._check(name, 0, 1, is_open=True)
        self._check("min_length", 0, is_whole=True)
        self._check("max_length", max(1, self.min_length), is_whole=True)
        self._check("num_perm", 16, is_whole=True)
        for name in ("embedding_batch_size", "shingle_size", "contamination_ngram", "perplexity_batch_size"):
            self._check(name, 1, is_whole=True)
        if self.perplexity_fence is not None:
            self._check("perplexity_fence", 0)
        if self.min_perplexity is not None:
            self._check("min_perplexity", 1)
        if self.max_perplexity is not None:
            self._check("max_perplexity", self.min_perplexity or 1)
        known = set(REASONS) - {"invalid_format"}
        if not isinstance(self.skip, Collection) or isinstance(self.skip, str) or not set(self.skip) <= known:
            raise ConfigError(f"skip must hold names of {sorted(known)}, got {self.skip!r}")
        labels = self.allowed_labels
        is_text = isinstance(labels, Collection) and all(isinstance(label, str) for label in labels)
        if labels is not None and (isinstance(labels, str) or not labels or not is_text):
            raise ConfigError(f"allowed_labels must hold completions, got {self.allowed_labels!r}")

    def _check(
        self, name: str, low: float, high: float = math.inf, *, is_whole: bool = False, is_open: bool = False
    ) -> None:
        """Raise ConfigError unless a setting is a finite number in [low, high], or in (low, high]."""
        value = getattr(self, name)
        kinds = int if is_whole else (int, float)
        is_number = isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < math.inf
        if not is_number or not low <= value <= high or (is_open and value == low):
            left, right = "(" if is_open else "[", "]" if high < math.inf else ")"
            words = "a whole number" if is_whole else "a number"
            raise ConfigError(f"{name} must be {words} in {left}{low}, {high}{right}, got {value!r}")

    def _check_parts(self) -> None:
        for name in ("validator", "embed"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise ConfigError(f"{name} must be a function, got {getattr(self, name)!r}")
        if isinstance(self.evaluation_rows, str) or not isinstance(self.evaluation_rows, Sequence):
            raise ConfigError(f"evaluation_rows must be a list of rows, got {self.evaluation_rows!r:.80}")
        for name in ("min_perplexity", "max_perplexity", "base_perplexity"):
            if self.model is None and getattr(self, name):
                raise ConfigError(f"{name}={getattr(self, name)} needs a model")
        if self.base_perplexity and not hasattr(models.unwrapped(self.model), "disable_adapter"):
            raise ConfigError(
                f"base_perplexity needs a PEFT model with an adapter, got {type(self.model).__name__}"
            )
        if self.embedding_model_name is not None and self.embed is not None:
            raise ConfigError("give embedding_model_name or embed, not both")
        if self.embedding_model_name is not None and not importlib.util.find_spec("sentence_transformers"):
            raise ConfigError(
                f"embedding_model_name={self.embedding_model_name!r} needs sentence-transformers: "
                "pip install 'cl-peft[embeddings]', or give embed"
            )
