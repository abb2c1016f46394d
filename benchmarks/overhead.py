"""Cost of each strategy against plain LoRA: `python -m benchmarks.overhead --json OUT`.

The step of a strategy and the plain step run side by side in one process, one after the other, through
fit_task (see side_by_side.py). What a strategy knows of earlier tasks is real: every earlier task was trained
for one step. A control runs plain LoRA against itself: what it says above 1 is noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import logging
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.arms import Arm, parse_arms, registered_arms
from benchmarks.overhead_report import table, targets_of
from benchmarks.peers import PEERS, Peer
from benchmarks.report import write_report
from benchmarks.side_by_side import StandingTraining, Step, held_bytes, race
from benchmarks.small_llama import QUICK, Shape, base_model, lora_model, task_rows
from benchmarks.stats import Ratio, median_of_ratios
from clcore.engine.errors import ConfigError
from clcore.engine.fisher import squared_gradients
from clcore.engine.loop import TrainConfig, fit_task
from clcore.engine.loss import completion_nll
from clcore.engine.memory import InProcessMemory, MemorySession
from clcore.engine.params import Params
from clcore.engine.registry import build_strategy
from clcore.engine.strategy import Strategy
from clcore.engine.tasks import Example, collate
from clcore.strategies.none import NoStrategy

LOG = logging.getLogger("benchmarks.overhead")

NUM_WARMUPS = 1
FISHER_PAIRS = 5
PASS_BATCH_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is raced against plain LoRA."""

    label: str
    make_model: Callable[[], nn.Module]
    make_strategy: Callable[[nn.Module, int], Strategy]
    """(model, number of earlier tasks) -> strategy."""
    is_peer: bool


def candidate_of_arm(arm: Arm, shape: Shape) -> Candidate:
    """Race a strategy of the registry; it learns of earlier tasks through memory."""

    def make(model: nn.Module, _: int) -> Strategy:
        return build_strategy(arm.strategy, arm.params, model)

    return Candidate(arm.label, lambda: lora_model(shape), make, is_peer=False)


def candidate_of_peer(peer: Peer, shape: Shape) -> Candidate:
    """Race a peer; its state of earlier tasks is filled in."""
    make_model = peer.make_model
    if make_model is None:
        return Candidate(peer.label, lambda: lora_model(shape), peer.make_strategy, is_peer=True)
    return Candidate(peer.label, lambda: make_model(base_model(shape)), peer.make_strategy, is_peer=True)


def measure(candidate: Candidate, shape: Shape) -> dict[str, Any]:
    """Train a stream of one-step tasks and race the tasks that have as many earlier ones as asked for.

    Bytes and once-per-task costs are those of the last task. A peer runs there only.
    """
    plain_model, model = lora_model(shape), candidate.make_model()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    store = InProcessMemory()
    steps: dict[str, Any] = {}
    row: dict[str, Any] = {"what": candidate.label, "steps": steps}
    last = max(shape.pairs_at)
    for task in range(last + 1):
        num_pairs = shape.pairs_at.get(task)
        if candidate.is_peer and task < last:
            continue
        if candidate.is_peer:
            model = candidate.make_model()
            frozen = [p for p in model.parameters() if not p.requires_grad]
        strategy = candidate.make_strategy(model, task)
        memory = MemorySession(store, version=store.newest, op_id=f"task-{task}")
        rows = task_rows(shape, task)
        if num_pairs is None:
            fit_task(model, strategy, rows, task_id=f"t{task}", config=_config(shape, 1), memory=memory)
            continue
        num_steps = NUM_WARMUPS + num_pairs
        plain_strategy = NoStrategy(plain_model)
        plain = _standing(plain_model, plain_strategy, rows, task, num_steps, _nowhere(), shape)
        other = _standing(model, strategy, rows, task, num_steps, memory, shape)
        steps[str(task)] = _summary(race(plain, other, num_pairs, NUM_WARMUPS))
        if task == last:
            row.update(_held(strategy, model, frozen))
        other.finish()
        plain.finish()
        LOG.info("%s: %.3f with %d earlier tasks", candidate.label, steps[str(task)]["ratio"], task)
    pass_s = _forward_backward_s(plain_model, rows)
    row["once_per_task"] = _once_per_task(other.once_s, steps[str(last)]["plain_s"], pass_s, len(rows))
    if not candidate.is_peer:
        row["memory_state_bytes"] = held_bytes(store.read(store.newest, strategy.name))
    return row


def _standing(
    model: nn.Module,
    strategy: Strategy,
    rows: Sequence[Example],
    task: int,
    num_steps: int,
    memory: MemorySession,
    shape: Shape,
) -> StandingTraining:
    config = _config(shape, num_steps)
    return StandingTraining(model, strategy, rows, task_id=f"t{task}", config=config, memory=memory)


def _nowhere() -> MemorySession:
    return MemorySession(InProcessMemory(), version=0, op_id="plain")


def _held(strategy: Strategy, model: nn.Module, frozen: Sequence[nn.Parameter]) -> dict[str, Any]:
    """Count what is held beside the trainable parameters and what was frozen from the start."""
    now = {id(p): p.nbytes for p in model.parameters()}
    trainable = sum(p.nbytes for p in Params.of(model).values())
    added = sum(now.values()) - trainable - sum(p.nbytes for p in frozen)
    replaced = sum(p.nbytes for p in frozen if id(p) not in now)  # kept, to be put back
    held = held_bytes(strategy, model)
    return {
        "trainable_bytes": trainable,
        "held_bytes": held,
        "model_bytes": added + replaced,
        "copies": (held + added + replaced) / trainable,
        "has_copy_of_parameters_in_step": bool(strategy.edits_update),
    }


def _once_per_task(
    once_s: Mapping[str, float], step_s: float, pass_s: float, num_rows: int
) -> dict[str, Any]:
    """Put the seconds before and after a task beside a plain step and a plain pass over its rows."""
    before_s, after_s = once_s["before_s"], once_s["after_s"]
    return {
        "rows": num_rows,
        "plain_step_s": step_s,
        "pass_s": pass_s,
        "before_s": before_s,
        "after_s": after_s,
        "before_in_steps": before_s / step_s,
        "after_in_steps": after_s / step_s,
        "after_in_passes": after_s / pass_s,
    }


def _config(shape: Shape, num_steps: int) -> TrainConfig:
    return TrainConfig(
        num_steps=num_steps, learning_rate=1e-3, batch_size=shape.rows_per_step, schedule="constant"
    )


def _summary(steps: Sequence[Step]) -> dict[str, Any]:
    times = median_of_ratios([(step.plain_s, step.strategy_s) for step in steps])
    per_token = median_of_ratios(
        [(step.plain_s / step.plain_tokens, step.strategy_s / step.strategy_tokens) for step in steps]
    )
    tokens = sum(step.strategy_tokens for step in steps) / sum(step.plain_tokens for step in steps)
    return {
        "ratio": times.median,
        "q25": times.q25,
        "q75": times.q75,
        "num_pairs": times.num_pairs,
        "token_ratio": tokens,
        "ratio_per_token": per_token.median,
        "plain_s": statistics.median(step.plain_s for step in steps),
        "strategy_s": statistics.median(step.strategy_s for step in steps),
    }


def _forward_backward_s(model: nn.Module, rows: Sequence[Example]) -> float:
    """Time plain forward and backward passes over rows, in batches of PASS_BATCH_ROWS, in eval mode."""
    model.eval()
    start = time.perf_counter()
    for i in range(0, len(rows), PASS_BATCH_ROWS):
        nll, _ = completion_nll(model, collate(rows[i : i + PASS_BATCH_ROWS], 0))
        nll.sum().backward()  # type: ignore[no-untyped-call]
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds


def fisher_ratio(shape: Shape) -> Ratio:
    """Race the Fisher's pass against plain forward and backward passes over the same rows."""
    model = lora_model(shape)
    params, rows = Params.of(model), task_rows(shape, max(shape.pairs_at))
    with torch.no_grad():
        for parameter in params.values():
            parameter.normal_(std=0.02)
    batches = [collate(rows[i : i + PASS_BATCH_ROWS], 0) for i in range(0, len(rows), PASS_BATCH_ROWS)]
    pairs = []
    for _ in range(1 + FISHER_PAIRS):
        plain_s = _forward_backward_s(model, rows)
        start = time.perf_counter()
        squared_gradients(model, params, batches)
        pairs.append((plain_s, time.perf_counter() - start))
    return median_of_ratios(pairs[1:])


def main() -> None:
    """Measure every strategy, write the report and a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the report goes")
    parser.add_argument("--strategies", help="name[:key=value...], with commas between; default: all")
    parser.add_argument("--peers", action="store_true", help="race what others publish too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a tiny model: whether it runs, not how fast")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    shape = QUICK if options.quick else Shape()
    try:
        arms = parse_arms(options.strategies) if options.strategies else registered_arms(with_variants=True)
    except ConfigError as error:
        parser.error(str(error))
    rows = []
    for arm in arms:
        rows.append({"config": arm.config(), **measure(candidate_of_arm(arm, shape), shape)})
        gc.collect()  # PEFT's models are cycles
    targets = targets_of(rows, fisher_ratio(shape))
    for peer in PEERS if options.peers else ():
        missing = peer.missing()
        if missing is None:
            rows.append(measure(candidate_of_peer(peer, shape), shape))
        else:
            rows.append({"what": peer.label, "steps": {}, "not_measured": missing})
        gc.collect()
    about = {"what": "setting", "threads": options.threads, "shape": dataclasses.asdict(shape)}
    write_report(options.json, "overhead", [about, *rows], targets)
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
