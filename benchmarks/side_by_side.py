"""Two trainings side by side, one step at a time, and the bytes that a strategy holds.

The steps are fit_task's own: each training runs in a thread that stands still while the other one works, so
nothing of the loop is written a second time and never do two steps run at once.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from clcore.engine.loop import FitResult, StepReport, TrainConfig, fit_task
from clcore.engine.memory import MemorySession
from clcore.engine.strategy import Strategy
from clcore.engine.tasks import Example

ONCE_PER_TASK = {
    "before_s": ("prepare_model", "bind", "before_training"),
    "after_s": ("after_training", "release_model"),
}


class StandingTraining:
    """fit_task that stands still after every step until it is told to go on."""

    def __init__(
        self,
        model: nn.Module,
        strategy: Strategy,
        dataset: Sequence[Example],
        *,
        task_id: str,
        config: TrainConfig,
        memory: MemorySession,
    ) -> None:
        self.once_s = _time_hooks(strategy)
        """Seconds in the hooks that run once per task, before and after the steps."""
        self.report: StepReport | None = None
        self._go, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._result: FitResult | None = None

        def run() -> None:
            self._go.acquire()
            try:
                self._result = fit_task(
                    model,
                    strategy,
                    dataset,
                    task_id=task_id,
                    config=config,
                    memory=memory,
                    on_step=self._stand,
                )
            except BaseException as error:
                self._error = error
            finally:
                self._stands.release()

        threading.Thread(target=run, daemon=True).start()

    def step(self) -> tuple[float, int]:
        """Run one step and return its seconds and its tokens; the first also starts the task."""
        start = time.perf_counter()
        self._go.release()
        self._stands.acquire()
        seconds = time.perf_counter() - start
        if self._error is not None:
            raise self._error
        assert self._result is None, "the task has no step left"
        assert self.report is not None
        return seconds, self.report.num_tokens

    def finish(self) -> FitResult:
        """End the task after its last step."""
        self._go.release()
        self._stands.acquire()
        if self._error is not None:
            raise self._error
        assert self._result is not None, "the task has steps left"
        return self._result

    def _stand(self, report: StepReport) -> None:
        self.report = report
        self._stands.release()
        self._go.acquire()


def _time_hooks(strategy: Strategy) -> dict[str, float]:
    """Make the strategy add up the seconds of its hooks that run once per task; return the sums."""
    seconds = dict.fromkeys(ONCE_PER_TASK, 0.0)

    def timed(key: str, hook: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = hook(*args, **kwargs)
            seconds[key] += time.perf_counter() - start
            return result

        return call

    for key, names in ONCE_PER_TASK.items():
        for name in names:
            setattr(strategy, name, timed(key, getattr(strategy, name)))
    return seconds


@dataclasses.dataclass(frozen=True)
class Step:
    """One pair of steps: seconds and tokens without and with the strategy."""

    plain_s: float
    strategy_s: float
    plain_tokens: int
    strategy_tokens: int


def race(plain: StandingTraining, other: StandingTraining, num_pairs: int, num_warmups: int) -> list[Step]:
    """Step both trainings in turn; who goes first changes with every pair, so that a drift cancels."""
    steps = []
    for pair in range(num_warmups + num_pairs):
        if pair % 2:
            (strategy_s, strategy_tokens), (plain_s, plain_tokens) = other.step(), plain.step()
        else:
            (plain_s, plain_tokens), (strategy_s, strategy_tokens) = plain.step(), other.step()
        if pair >= num_warmups:
            steps.append(Step(plain_s, strategy_s, plain_tokens, strategy_tokens))
    return steps


def held_bytes(held: object, model: nn.Module | None = None) -> int:
    """Return the bytes of every array that an object reaches through attributes, dicts and lists.

    A buffer that several arrays share counts once; buffers of the model's parameters do not count.
    """
    of_model = _buffers(model.parameters()) if model is not None else {}
    buffers = _buffers(_arrays(held, set()))
    return sum(size for address, size in buffers.items() if address not in of_model)


def _buffers(arrays: Iterator[Any]) -> dict[int, int]:
    """Return address -> bytes of the memory behind arrays."""
    found = {}
    for array in arrays:
        if isinstance(array, torch.Tensor):
            storage = array.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        else:
            while isinstance(array.base, np.ndarray):
                array = array.base
            found[array.ctypes.data] = array.nbytes
    return found


def _arrays(value: object, seen: set[int]) -> Iterator[Any]:
    if id(value) in seen or isinstance(value, nn.Module | MemorySession | torch.optim.Optimizer | str | type):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor | np.ndarray):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _arrays(item, seen)
    elif isinstance(value, list | tuple | set | frozenset | deque):
        for item in value:
            yield from _arrays(item, seen)
    elif type(value).__module__.startswith(("clcore.", "benchmarks.", "avalanche.", "types")):
        yield from _arrays(vars(value) if hasattr(value, "__dict__") else {}, seen)
