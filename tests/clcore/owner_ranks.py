"""What each of two processes does for test_owner_ranks.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clcore.engine import parallel
from clcore.engine.loop import TrainConfig, fit_task
from clcore.engine.memory import InProcessMemory, MemorySession
from clcore.engine.registry import build_strategy
from tests.clcore.owners import make_model
from tests.clcore.tiny import new_session, tiny_dataset, trainable

CONFIG = TrainConfig(num_steps=4, learning_rate=3e-3, batch_size=5, micro_batch_size=2)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "penalty": ("orthogonal_lora", {"use_gradient_projection": False, "use_loss_regularization": True}),
    "activations": ("adaptive_svd", {}),
    "gradients": ("adaptive_svd", {"source": "gradients", "update_frequency": 2}),
    "weights": ("adaptive_svd", {"source": "weights"}),
}


def two_tasks(case: str, folder: Path) -> dict[str, Any]:
    """Train two tasks on all ranks; 11 rows and batches of 5 split unevenly."""
    name, params = CASES[case]
    model, session = make_model("lora"), new_session()
    for i in range(2):
        strategy = build_strategy(name, params, model)
        dataset = tiny_dataset(f"t{i}", 11, shift=1 + 4 * i)
        result = fit_task(model, strategy, dataset, task_id=f"t{i}", config=CONFIG, memory=session)
        # The ranks share one store in the service; here rank 1 reads rank 0's snapshot.
        if parallel.rank() == 0:
            session.store.snapshot(result.memory_version, folder / case / str(i))
        if parallel.world_size() > 1:
            dist.barrier()
        store = InProcessMemory()
        store.restore(folder / case / str(i))
        session = MemorySession(store, version=result.memory_version, op_id=f"run/t{i + 1}", seed=0)
    state = session.read(name)
    bases = {f"{key}/{n}": torch.tensor(q) for key in state if key != "rank" for n, q in state[key].items()}
    return {"adapter": trainable(model), "bases": bases, "ranks": getattr(strategy, "ranks", {})}


def main(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save({case: two_tasks(case, Path(folder)) for case in CASES}, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
