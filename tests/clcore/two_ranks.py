"""What each of two processes does for test_two_ranks.py; every claim uses the same pair of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clcore.engine import parallel
from clcore.engine.loop import TrainConfig, fit_task
from clcore.engine.memory import InProcessMemory, MemorySession
from clcore.engine.strategy import Composed
from clcore.engine.tasks import Example
from clcore.strategies.ewc_base import BaseEWC
from clcore.strategies.replay_experience import ExperienceReplay
from tests.clcore.tiny import new_session, tiny_dataset, tiny_llama, trainable

CONFIG = TrainConfig(num_steps=5, learning_rate=3e-3, batch_size=5, micro_batch_size=2)


class Watch(ExperienceReplay):
    """Experience replay that remembers what it mixed."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model, replay_frequency=1)
        self.mixed: list[list[str]] = []

    def mix_batch(self, batch: list[Example], *, step: int) -> list[Example]:
        mixed = super().mix_batch(batch, step=step)
        self.mixed.append([example["ref"] for example in mixed])
        return mixed


def two_tasks(folder: Path) -> dict[str, Any]:
    """Train two tasks with EWC and replay on all ranks; batches of 5 rows leave one rank a blank row."""
    datasets = [tiny_dataset("t0", 11), tiny_dataset("t1", 11, shift=5)]
    rows = {example["ref"]: example for dataset in datasets for example in dataset}
    model = tiny_llama(with_b=True)
    session, losses, mixed = new_session(), [], []
    for i, dataset in enumerate(datasets):
        replay = Watch(model)
        strategy = Composed([BaseEWC(model, ewc_lambda=20.0, fisher_sample_size=7), replay])
        result = fit_task(
            model,
            strategy,
            dataset,
            task_id=f"t{i}",
            config=CONFIG,
            memory=session,
            on_step=lambda report: losses.append(report.loss),
        )
        assert session.is_committed  # on every rank, or the next task would be refused on one of them only
        mixed.append(replay.mixed)
        # The ranks share one store in the service; here rank 1 reads rank 0's snapshot.
        if parallel.rank() == 0:
            session.store.snapshot(result.memory_version, folder / str(i))
        if parallel.world_size() > 1:
            dist.barrier()
        store = InProcessMemory(load_row=rows.__getitem__)
        store.restore(folder / str(i))
        session = MemorySession(store, version=result.memory_version, op_id=f"run/t{i + 1}", seed=0)
    state = session.read("ewc")
    return {
        "adapter": trainable(model),
        "losses": losses,
        "mixed": mixed,
        "importance": {name: torch.tensor(value) for name, value in state["importance"].items()},
        "anchor": {name: torch.tensor(value) for name, value in state["anchor"].items()},
        "refs": session.read("experience_replay")["refs"],
        "version": result.memory_version,
        "tokens": (result.label_tokens, result.total_tokens, result.replay_tokens),
    }


def rank_1_fishers() -> dict[str, Any]:
    """Estimate rank-1 Fishers on 7 rows and on one, of which a second rank has none."""
    model = tiny_llama(with_b=True)
    found: dict[str, Any] = {}
    for method in ("empirical", "sample"):
        ewc = BaseEWC(model, fisher_estimation_method=method, space="delta_w")
        ewc.after_training("t0", tiny_dataset("t0", 7))
        ewc.after_training("t1", tiny_dataset("t1", 1))
        assert ewc.consolidated is not None
        state = ewc.consolidated.state()
        found |= {f"{method}/{key}/{name}": t for key in "ab" for name, t in state[key].items()}
    return found


def stop_on_rank_0() -> list[int]:
    """Ask for a stop on rank 0 only; return the steps at which this rank took a checkpoint."""
    model, states, answers = tiny_llama(), [], iter([False, False, True])
    fit_task(
        model,
        ExperienceReplay(model),
        tiny_dataset("t0", 11),
        task_id="t0",
        config=CONFIG,
        memory=new_session(),
        should_stop=lambda: next(answers),
        on_checkpoint=states.append,
    )
    return [state["step"] for state in states]


def collectives() -> dict[str, Any]:
    rank = parallel.rank()
    tensors = [
        torch.full((2, 2), 1.0 + rank),
        torch.full((), 10.0 * rank),
        torch.full((3,), 2.0, dtype=torch.float64),
    ]
    parallel.all_reduce_sum(tensors)
    return {
        "reduced": [tensor.tolist() for tensor in tensors],
        "sums": parallel.sum_over_ranks([2.0**52, rank]),
        "from_rank0": parallel.from_rank0(7 if rank == 0 else -1),
    }


def main(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {
        "two_tasks": two_tasks(Path(folder)),
        "rank_1_fishers": rank_1_fishers(),
        "stopped_at": stop_on_rank_0(),
        "collectives": collectives(),
    }
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
