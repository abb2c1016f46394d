"""Folders of tasks: <task>/train.jsonl and <task>/test.jsonl, the demo's own or a user's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from service.client import ApiError


class DemoError(ApiError):
    """The demo cannot run: its tasks are unusable, or another demo runs."""


@dataclass(frozen=True)
class DemoTask:
    """One task's files; num_rows counts the training rows."""

    name: str
    train: Path
    test: Path
    num_rows: int


def load_tasks(folder: Path) -> list[DemoTask]:
    """Find the tasks of a folder, sorted by name or in the order of its order.txt.

    Raises DemoError that names what is missing.
    """
    order = folder / "order.txt"
    if order.is_file():
        folders = [folder / name for name in order.read_text(encoding="utf-8").split()]
    else:
        folders = sorted(
            {path.parent for name in ("train", "test") for path in folder.glob(f"*/{name}.jsonl")}
        )
    if not folders:
        raise DemoError(f"no tasks in {folder}: expected <task>/train.jsonl and <task>/test.jsonl")
    missing = [str(p / f) for p in folders for f in ("train.jsonl", "test.jsonl") if not (p / f).is_file()]
    if missing:
        raise DemoError(f"missing: {', '.join(missing)}")
    return [_load_task(path) for path in folders]


def _load_task(folder: Path) -> DemoTask:
    name = re.sub(r"[^a-z0-9_-]+", "-", folder.name.lower()).strip("-_")[:63]
    train = folder / "train.jsonl"
    with train.open("rb") as file:
        num_rows = sum(1 for line in file if line.strip())
    if num_rows == 0:
        raise DemoError(f"no rows in {train}")
    return DemoTask(name=name, train=train, test=folder / "test.jsonl", num_rows=num_rows)
