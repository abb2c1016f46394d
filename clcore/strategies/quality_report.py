"""What quality control tells about its decisions: a record per row, and a report of counts."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REASONS = (
    "invalid_format",
    "broken_text",
    "no_label",
    "empty_completion",
    "label_not_allowed",
    "validator",
    "too_short",
    "too_long",
    "contaminated",
    "low_quality",
    "perplexity",
    "base_perplexity",
    "exact_duplicate",
    "near_duplicate",
    "similar_embedding",
)
"""Why a row is dropped, in the order of the checks; docs/replay-quality.md explains each."""

NUM_REPORT_EXAMPLES = 5


@dataclasses.dataclass
class Provenance:
    """What is known about one row: where it comes from, what was measured, what was decided."""

    ref: str
    """Its reference, or '#<position>' for a row without one."""
    task: str
    sha256: str = ""
    """Of its content; '' for a row that cannot be read."""
    is_kept: bool = True
    reason: str = ""
    """One of REASONS; '' for a kept row."""
    detail: str = ""
    """The value and its bound, the row it repeats, or the validator's words."""
    measured: dict[str, float] = dataclasses.field(default_factory=dict)
    """length, contamination, quality and its criteria, nll and base_nll (nats per label token), and for a
    repeat jaccard or similarity; what a row never reached is missing."""


def build_report(provenance: Sequence[Provenance], thresholds: Mapping[str, Any]) -> dict[str, Any]:
    """Return counts, some dropped rows per reason, rows per task and the thresholds; ready for JSON."""
    dropped = [record for record in provenance if not record.is_kept]
    counts = Counter(record.reason for record in dropped)
    tasks = {record.task: {"kept": 0, "dropped": 0} for record in provenance}
    examples: dict[str, list[dict[str, str]]] = {reason: [] for reason in counts}
    for record in provenance:
        tasks[record.task]["kept" if record.is_kept else "dropped"] += 1
        if not record.is_kept and len(examples[record.reason]) < NUM_REPORT_EXAMPLES:
            examples[record.reason].append({"ref": record.ref, "detail": record.detail})
    return {
        "num_rows": len(provenance),
        "num_kept": len(provenance) - len(dropped),
        "num_dropped": len(dropped),
        "reasons": {reason: counts[reason] for reason in REASONS},
        "examples": examples,
        "tasks": tasks,
        "thresholds": dict(thresholds),
    }


def write_report(path: Path | str, report: Mapping[str, Any], provenance: Sequence[Provenance]) -> None:
    """Write a report and the records of all rows as one JSON file."""
    rows = [dataclasses.asdict(record) for record in provenance]
    text = json.dumps({"report": report, "rows": rows}, indent=1, allow_nan=False)
    Path(path).write_text(text, encoding="utf-8")
