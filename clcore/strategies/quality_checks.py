"""The checks of replay quality control that need no model: n-grams, duplicates, leaks and broken text."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

from clcore.strategies.quality_rows import Item, Unit, without_marks

Gram = tuple[Unit, ...]

LONG_NGRAM = 13
"""One shared run of that many units is contamination by itself, as in the GPT-3 report (arXiv 2005.14165)."""
TEMPLATE_NGRAM = 3
MIN_ROWS = 8
"""A task's template is looked for in that many rows or more."""
MIN_UNITS = 8
"""Repetition is looked for in that many units or more."""


def grams(units: Sequence[Unit], n: int) -> list[Gram]:
    """Return all runs of n units, in order; none for a shorter row."""
    return [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]


def shingles(units: Sequence[Unit], n: int) -> set[Gram]:
    """Return the set of runs of n units; a shorter row is one run."""
    return set(grams(units, n)) or {tuple(units)}


def template(rows: Sequence[Sequence[Unit]], share: float) -> set[Gram]:
    """Return the runs of TEMPLATE_NGRAM units that more than share of the rows have: a prompt's fixed text.

    Empty for fewer than MIN_ROWS rows.
    """
    if len(rows) < MIN_ROWS:
        return set()
    counts = Counter(gram for units in rows for gram in set(grams(units, TEMPLATE_NGRAM)))
    return {gram for gram, count in counts.items() if count > share * len(rows)}


def contents(items: Sequence[Item], share: float) -> list[Gram]:
    """Return each row's units without any task's template; a row that is all template keeps everything.

    Without that, rows of one task would be alike because of their instruction, and a test set would seem to
    leak into every training row.
    """
    of_task: dict[str, list[Gram]] = {}
    for item in items:
        of_task.setdefault(item.task, []).append(item.units)
    # All templates are taken out of all rows, so that equal rows stay equal whatever their task.
    fixed = set[Gram]().union(*(template(rows, share) for rows in of_task.values()))
    return [_uncovered(item.units, fixed) or item.units for item in items]


def _uncovered(units: Gram, fixed: set[Gram]) -> Gram:
    """Return the units that lie in no run of the template."""
    starts = [i for i, gram in enumerate(grams(units, TEMPLATE_NGRAM)) if gram in fixed]
    covered = {i + offset for i in starts for offset in range(TEMPLATE_NGRAM)}
    return tuple(unit for i, unit in enumerate(units) if i not in covered)


def jaccard(left: set[Gram], right: set[Gram]) -> float:
    """Return |left and right| / |left or right|, in [0, 1]."""
    return len(left & right) / len(left | right)


class NearDuplicates:
    """An index of shingle sets that finds the most similar one at or above a Jaccard threshold.

    MinHash (Broder 1997) with locality-sensitive hashing proposes pairs, and their exact Jaccard decides. The
    bands are chosen so that a pair at the threshold is missed with a probability below 1e-4.
    """

    def __init__(self, threshold: float, num_perm: int) -> None:
        self.threshold = threshold
        self._empty = MinHash(num_perm=num_perm)
        self._index = MinHashLSH(num_perm=num_perm, params=lsh_bands(threshold, num_perm))
        self._sets: list[set[Gram]] = []

    def nearest(self, found: set[Gram], signature: MinHash) -> tuple[int, float] | None:
        """Return number and Jaccard of the most similar set, the first of equals; None below threshold."""
        candidates = [(jaccard(found, self._sets[i]), -i) for i in self._index.query(signature)]
        similarity, number = max(candidates, default=(-1.0, 0))
        return (-number, similarity) if similarity >= self.threshold else None

    def add(self, found: set[Gram], signature: MinHash) -> None:
        """Put a set under the next number."""
        self._index.insert(len(self._sets), signature)
        self._sets.append(found)

    def signature(self, found: set[Gram]) -> MinHash:
        """Return a set's MinHash; the same in every process."""
        minhash = self._empty.copy()
        minhash.update_batch(["\x1f".join(map(str, gram)).encode("utf-8", "surrogatepass") for gram in found])
        return minhash


def lsh_bands(threshold: float, num_perm: int, miss: float = 1e-4) -> tuple[int, int]:
    """Return (bands, rows per band) with the fewest candidates that miss a pair at the threshold so rarely.

    A pair with Jaccard s becomes a candidate with probability 1 - (1 - s^rows)^bands. When num_perm is too
    small for the aim, one row per band misses least. There are at least 2 bands.
    """
    for rows in range(num_perm // 2, 1, -1):
        bands = num_perm // rows
        if (1 - threshold**rows) ** bands <= miss:
            return bands, rows
    return num_perm, 1


@dataclasses.dataclass(frozen=True)
class Described:
    """A row with what it is compared by; vector has length 1, (D,)."""

    item: Item
    shingles: set[Gram]
    signature: MinHash
    vector: NDArray[np.float64] | None


class KeptRows:
    """The rows that are in, so that a later one can be compared with all of them."""

    def __init__(self, threshold: float, num_perm: int) -> None:
        self.threshold = threshold
        self._near = NearDuplicates(threshold, num_perm)
        self._items: list[Item] = []
        self._first: dict[Gram, Item] = {}
        self._vectors: list[NDArray[np.float64]] = []

    def describe(self, item: Item, found: set[Gram], vector: NDArray[np.float64] | None) -> Described:
        """Prepare a row for repeats and add."""
        return Described(item, found, self._near.signature(found), vector)

    def repeats(self, row: Described) -> Iterator[tuple[str, str, float, Item]]:
        """Yield (reason, what was measured, its value, the row it repeats), exact repeats first."""
        if row.item.units in self._first:
            yield "exact_duplicate", "jaccard", 1.0, self._first[row.item.units]
        if near := self._near.nearest(row.shingles, row.signature):
            yield "near_duplicate", "jaccard", near[1], self._items[near[0]]
        if row.vector is not None and self._vectors:
            cosines_N = np.stack(self._vectors) @ row.vector
            closest = int(cosines_N.argmax())
            if cosines_N[closest] > self.threshold:
                yield "similar_embedding", "similarity", float(cosines_N[closest]), self._items[closest]

    def add(self, row: Described) -> None:
        """Put a row in."""
        self._near.add(row.shingles, row.signature)
        self._items.append(row.item)
        self._first.setdefault(row.item.units, row.item)
        if row.vector is not None:
            self._vectors.append(row.vector)


class EvaluationGrams:
    """The n-grams of the contents of evaluation rows without punctuation; a shorter row counts as a whole."""

    def __init__(self, rows: Sequence[Gram], n: int) -> None:
        self.n = n
        spoken = [without_marks(units) or units for units in rows]
        self._short = {gram for units in spoken for gram in shingles(units, n)}
        self._long = {gram for units in spoken for gram in shingles(units, LONG_NGRAM)}

    def contamination(self, units: Gram) -> float:
        """Return the share of a content's n-grams that evaluation rows have; 1.0 for any shared run of 13."""
        spoken = without_marks(units) or units
        if shingles(spoken, LONG_NGRAM) & self._long:
            return 1.0
        found = shingles(spoken, self.n)
        return len(found & self._short) / len(found)


def broken_character(text: str) -> str | None:
    """Return the first sign of wrongly decoded text: U+FFFD, a control code or a surrogate."""
    for character in text:
        is_control = character < " " and not character.isspace()
        if character == "\ufffd" or is_control or "\ud800" <= character <= "\udfff":
            return character
    return None


def variety(units: Sequence[Unit], n: int = 3) -> float:
    """Return the share of distinct 3-grams, in (0, 1]; 1 for a row of fewer than MIN_UNITS units."""
    if len(units) < MIN_UNITS:
        return 1.0
    found = grams(units, n)
    return len(set(found)) / len(found)


def readability(text: str) -> float:
    """Return twice the share of letters, marks and digits among characters that are no space, at most 1.

    Twice, because code and formulas are half symbols and still fine.
    """
    visible = [character for character in text if not character.isspace()]
    readable = sum(unicodedata.category(character)[0] in "LMN" for character in visible)
    return min(1.0, 2 * readable / len(visible)) if visible else 0.0


def quality(item: Item) -> dict[str, float]:
    """Return the soft criteria of a row, each in [0, 1]: its quality is the worst of them.

    variety            of the whole row: below 1 when runs of words repeat
    completion_variety of the completion alone, because that is what is trained
    readability        letters and digits against symbols; left out when only token ids are known
    """
    found = {"variety": variety(item.units), "completion_variety": variety(item.completion_units)}
    return {**found, "readability": readability(item.text)} if item.is_text else found
