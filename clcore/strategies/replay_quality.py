"""Quality control of replay rows: which rows may enter a buffer, and why the others may not.

A buffer repeats what it holds, so a broken, doubled or leaked row costs more there than in plain training.
Every row gets one verdict: kept, or dropped for the first of REASONS that applies. Duplicates come last, so
that a bad row never pushes a good one out. Decisions depend on the rows and their order, never on the rank.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from clcore.engine.errors import ConfigError, DataError
from clcore.engine.tasks import Example, encode_row, iter_examples, num_label_tokens
from clcore.strategies import quality_checks as checks
from clcore.strategies import quality_models as models
from clcore.strategies.quality_report import Provenance, build_report, write_report
from clcore.strategies.quality_rows import Item, read_item, ref_of, task_of
from clcore.strategies.quality_settings import QualitySettings

MEASURES = (("perplexity", "nll"), ("base_perplexity", "base_nll"))
"""Reason and measured value, for the model as it is and for its base."""

T = TypeVar("T")


@dataclasses.dataclass
class _Row:
    item: Item
    record: Provenance
    content: checks.Gram = ()
    """Its units without the template of its task."""


class QualityController(QualitySettings):
    """Filter rows for a replay buffer; report and provenance describe the latest call.

    Arguments are the fields of QualitySettings. Raises ConfigError for a value out of range or parts that do
    not fit together, DataError for an evaluation row that cannot be read.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embedding_model_name is not None:
            self.embed = models.sentence_encoder(self.embedding_model_name, self.embedding_batch_size)
        self._allowed = None if self.allowed_labels is None else {x.strip() for x in self.allowed_labels}
        self._evaluation = [self._must_read(row, i) for i, row in enumerate(self.evaluation_rows)]
        self.provenance: list[Provenance] = []
        """One record per row of the latest call, in the order of the rows."""

    def filter_examples(self, examples: Iterable[T], *, accepted: Iterable[Any] = ()) -> list[T]:
        """Return the rows that pass, the same objects in the same order; of repeats the first one stays.

        accepted: rows that the buffer holds already; they are not judged, but new ones must differ from them.
        Nothing else is carried from one call to the next. With a model, all processes must call.
        Raises DataError for one row in place of several and for an accepted row that cannot be read,
        ConfigError when a check lacks a tokenizer.
        """
        if isinstance(examples, str | Mapping):
            raise DataError(f"examples must be a list of rows, got one {type(examples).__name__}")
        sources = list(examples)
        self.provenance = [Provenance(ref_of(row, i), task_of(row, i)) for i, row in enumerate(sources)]
        rows = self._read(sources)
        old_items = [self._must_read(row, i) for i, row in enumerate(accepted)]
        old = [_Row(item, Provenance(item.ref, item.task, item.sha256)) for item in old_items]
        items = [*self._evaluation, *(row.item for row in (*old, *rows))]
        self._check_kinds(items)
        contents = checks.contents(items, self.template_share)
        for row, content in zip((*old, *rows), contents[len(self._evaluation) :], strict=True):
            row.content = content
        leaks = checks.EvaluationGrams(contents[: len(self._evaluation)], self.contamination_ngram)
        for row in rows:
            self._check_format(row)
            self._check_length(row)
            self._check_contamination(row, leaks)
            self._check_quality(row)
        self._check_perplexity(rows)
        self._check_repeats(rows, old)
        return [source for source, record in zip(sources, self.provenance, strict=True) if record.is_kept]

    @property
    def report(self) -> dict[str, Any]:
        """Return counts, some dropped rows per reason, rows per task and the thresholds; ready for JSON."""
        return build_report(self.provenance, self.thresholds())

    def write_report(self, path: Path | str) -> None:
        """Write the report and the provenance of every row as one JSON file."""
        write_report(path, self.report, self.provenance)

    # ------------------------------------------------------------------------------------- reading

    def _must_read(self, source: Any, position: int) -> Item:
        return read_item(source, position, self.tokenizer)

    def _read(self, sources: Sequence[Any]) -> list[_Row]:
        """Return the rows that can be read; the others get their verdict."""
        rows = []
        for i, (source, record) in enumerate(zip(sources, self.provenance, strict=True)):
            try:
                item = read_item(source, i, self.tokenizer)
            except DataError as error:
                self._drop(record, "invalid_format", str(error))
                continue
            record.sha256 = item.sha256
            rows.append(_Row(item, record))
        return rows

    def _encode(self, row: _Row) -> Example | None:
        """Return a row as tokens; None when that cannot be, with its verdict."""
        source, ref = row.item.source, row.item.ref
        if row.item.is_example:
            example = next(iter_examples([{**source, "ref": ref}]))
        else:
            texts = {"prompt": "", "completion": source} if isinstance(source, str) else source
            if "messages" in texts and not self.tokenizer.chat_template:
                raise ConfigError("model needs a tokenizer with a chat template to read 'messages' rows")
            limit = getattr(
                getattr(models.unwrapped(self.model), "config", None), "max_position_embeddings", 0
            )
            try:
                example = encode_row(texts, self.tokenizer, limit or sys.maxsize, ref)
            except DataError as error:
                self._drop(row.record, "invalid_format", str(error))
                return None
        if not num_label_tokens(example):
            self._drop(row.record, "no_label", "no token is trained on")
            return None
        return example

    # ------------------------------------------------------------------------------------- verdicts

    def _drop(self, record: Provenance, reason: str, detail: str) -> None:
        """Give a verdict unless the row has one or the reason is skipped."""
        if record.is_kept and reason not in self.skip:
            record.is_kept, record.reason, record.detail = False, reason, detail

    def _check_format(self, row: _Row) -> None:
        item, record = row.item, row.record
        prompt, completion = item.prompt or "", item.completion or ""
        # An example's prompt may be cut in the middle of a character; a completion is never cut.
        broken = checks.broken_character(completion if item.is_example else prompt + completion)
        if broken is not None:
            self._drop(record, "broken_text", f"character {broken!a}")
        if not item.num_labels:
            self._drop(record, "no_label", "no token is trained on")
        if item.is_text and not completion.strip():
            self._drop(record, "empty_completion", "the completion is blank")
        if self._allowed is not None and completion.strip() not in self._allowed:
            self._drop(record, "label_not_allowed", f"completion {completion.strip()[:80]!r}")
        if self.validator is not None and record.is_kept:
            is_row = isinstance(item.source, Mapping) and not item.is_example
            complaint = self.validator(
                item.source if is_row else {"prompt": prompt, "completion": completion}
            )
            if complaint is not None:
                self._drop(record, "validator", complaint)

    def _check_length(self, row: _Row) -> None:
        length = row.item.length
        row.record.measured["length"] = length
        if length < self.min_length:
            self._drop(row.record, "too_short", f"{length} < {self.min_length}")
        if length > self.max_length:
            self._drop(row.record, "too_long", f"{length} > {self.max_length}")

    def _check_contamination(self, row: _Row, leaks: checks.EvaluationGrams) -> None:
        if not self._evaluation:
            return
        share = leaks.contamination(row.content)
        row.record.measured["contamination"] = share
        if share >= self.contamination_threshold:
            self._drop(row.record, "contaminated", f"{share:.3f} >= {self.contamination_threshold}")

    def _check_quality(self, row: _Row) -> None:
        criteria = checks.quality(row.item)
        worst = min(criteria, key=criteria.__getitem__)
        row.record.measured |= {**criteria, "quality": criteria[worst]}
        if criteria[worst] < self.quality_threshold:
            self._drop(row.record, "low_quality", f"{worst} {criteria[worst]:.3f} < {self.quality_threshold}")

    def _check_perplexity(self, rows: Sequence[_Row]) -> None:
        if self.model is None:
            return
        pairs = [(row, self._encode(row)) for row in rows if row.record.is_kept]
        for reason, name in MEASURES if self.base_perplexity else MEASURES[:1]:
            kept = [(row.record, tokens) for row, tokens in pairs if tokens and row.record.is_kept]
            losses = models.nll_per_token(
                self.model,
                [tokens for _, tokens in kept],
                batch_size=self.perplexity_batch_size,
                use_base=name == "base_nll",
            )
            low, high = models.fence(losses, self.perplexity_fence)
            low = max(low, math.log(self.min_perplexity)) if self.min_perplexity else low
            high = min(high, math.log(self.max_perplexity)) if self.max_perplexity else high
            for (record, _), loss in zip(kept, losses, strict=True):
                record.measured[name] = loss
                if not low <= loss <= high:
                    self._drop(record, reason, f"{loss:.3f} nats per token not in [{low:.3f}, {high:.3f}]")

    def _check_repeats(self, rows: Sequence[_Row], old: Sequence[_Row]) -> None:
        """Go through the rows in order: each must differ from the accepted and from all kept before it."""
        judged = [*old, *(row for row in rows if row.record.is_kept)]
        texts = [" ".join(map(str, row.content)) for row in judged]
        vectors: Iterable[Any] = [None] * len(judged)
        if self.embed is not None:
            vectors = models.unit_vectors(self.embed, texts, self.embedding_batch_size)
        kept = checks.KeptRows(self.diversity_threshold, self.num_perm)
        for number, (row, vector) in enumerate(zip(judged, vectors, strict=True)):
            described = kept.describe(row.item, checks.shingles(row.content, self.shingle_size), vector)
            if number >= len(old):
                for reason, name, value, other in kept.repeats(described):
                    row.record.measured[name] = value
                    self._drop(row.record, reason, f"{name} {value:.3f} with {other.ref}")
            if row.record.is_kept:
                kept.add(described)

    # ------------------------------------------------------------------------------------- arguments

    def _check_kinds(self, items: Sequence[Item]) -> None:
        """Raise ConfigError when rows cannot be compared, or a check needs text that is not there."""
        hint = "give a tokenizer to read examples as text"
        if len({item.is_text for item in items}) > 1:
            raise ConfigError(f"rows of text and rows of token ids cannot be compared; {hint}")
        needs_text = [
            name for name in ("allowed_labels", "validator", "embed") if getattr(self, name) is not None
        ]
        if needs_text and any(not item.is_text for item in items):
            raise ConfigError(f"{needs_text[0]} needs text, and the rows are token ids; {hint}")
        if self.model is not None and self.tokenizer is None and not all(item.is_example for item in items):
            raise ConfigError("model needs a tokenizer to measure rows of text")
