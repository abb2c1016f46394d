"""What other processes do for test_output_cache.py: one that is killed, and two that share rows."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clcore.evaluation import LocalStore, Stored, evaluate, label_set, longest_answer
from tests.clcore.eval_models import MAX_LENGTH, count_passes, loud_llama, mixed_rows
from tests.clcore.tiny import tiny_tokenizer

KEY = "a" * 64
NUM_ROWS = 11


def run(folder: Path, metric: str, *, on_batch: Any = lambda done: None, **changes: Any) -> Any:  # noqa: ARG005
    """Evaluate the same rows with the same model; outputs are kept in a folder."""
    model, tokenizer, rows = loud_llama(), tiny_tokenizer(), mixed_rows(NUM_ROWS)
    passes = count_passes(model)
    share = slice(changes.pop("rank", 0), None, changes.pop("world_size", 1))
    settings = {
        "max_length": MAX_LENGTH,
        "batch_size": 2,
        "max_new_tokens": longest_answer(rows, tokenizer, MAX_LENGTH),
        "labels": label_set(rows) if metric == "likelihood" else None,
        "stored": Stored(LocalStore(folder), KEY),
        **changes,
    }
    return evaluate(model, tokenizer, rows[share], metric, on_batch=on_batch, **settings), passes


def die_after(folder: str, num_batches: int) -> None:
    """Evaluate and be killed right after so many batches are stored."""
    calls: list[int] = []

    def on_batch(done: int) -> None:
        calls.append(done)
        if len(calls) == num_batches:
            os.kill(os.getpid(), signal.SIGKILL)

    run(Path(folder), "exact_match", on_batch=on_batch)


def rank_main(rank: int, port: int, folder: str) -> None:
    """Evaluate every second row with every metric; rank 0 gathers and merges."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    parts = {}
    for metric in ("rouge_l", "likelihood", "perplexity"):
        found, _ = run(Path(folder) / metric, metric, rank=rank, world_size=2)
        gathered: list[Any] = [None, None]
        dist.all_gather_object(gathered, found)
        parts[metric] = gathered
    if rank == 0:
        torch.save(parts, Path(folder) / "parts.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    die_after(sys.argv[1], json.loads(sys.argv[2]))
