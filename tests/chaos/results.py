"""The results as JSON: one row per case, medians per part, and the targets; read again by --resume."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from service.report import target, write_report
from tests.chaos.parts import PARTS

LIMITS_S = {"driver": 40.0, "worker": 30.0, "api": 10.0, "reconciler": 10.0}
"""Highest median recovery from a kill."""
NAME = "chaos"


class Results:
    """Rows by case, written to the file after every one."""

    def __init__(self, path: Path, names: Sequence[str], *, resume: bool) -> None:
        """Begin anew, or with the cases that an earlier run finished; those that failed are played again."""
        self._path, self._names = path, names
        self.rows: dict[str, dict[str, Any]] = {}
        if resume and path.exists():
            for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
                if row.get("ok") and row.get("case") in names:
                    self.rows[row["case"]] = row

    @property
    def logs(self) -> Path:
        """Folder for the logs of runs that failed."""
        return self._path.with_suffix(".logs")

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Take rows of finished cases and write the file."""
        for row in rows:
            self.rows[row["case"]] = {"skipped": False, **row}
        write_report(self._path, NAME, [*self.ordered(), *medians(self.ordered())], self.targets())

    def ordered(self) -> list[dict[str, Any]]:
        """Return the rows in the order of the cases."""
        return [self.rows[name] for name in self._names if name in self.rows]

    def targets(self) -> list[dict[str, Any]]:
        """Return what was promised, and whether it holds."""
        rows = self.ordered()
        num_hold = sum(row["ok"] for row in rows)
        found = [target("cases that hold", num_hold, f"= {len(self._names)}", num_hold == len(self._names))]
        of_part = {row["part"]: row["median_recovery_s"] for row in medians(rows)}
        for part, limit in LIMITS_S.items():
            median = of_part.get(part)
            is_met = median is not None and median <= limit
            found.append(target(f"median recovery of {part} (s)", median, f"<= {limit:g} s", is_met))
        return found


def medians(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per part with the recovery from kills: median, longest and how many."""
    found = []
    for part in PARTS:
        seconds = [
            row["recovery_s"]
            for row in rows
            if row["part"] == part and row["action"] == "kill" and row["recovery_s"] is not None
        ]
        if seconds:
            found.append(
                {
                    "part": part,
                    "num_kills": len(seconds),
                    "median_recovery_s": round(statistics.median(seconds), 2),
                    "longest_recovery_s": max(seconds),
                }
            )
    return found
