"""Examples of the original module run after one replacement: its package name becomes clcore."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from clcore.engine.loop import TrainConfig, fit_task
from clcore.engine.loss import completion_nll
from clcore.engine.params import Params
from clcore.engine.tasks import collate
from clcore.strategies.none import NoStrategy
from tests.clcore.tiny import (
    mean_nll,
    new_session,
    tiny_dataset,
    tiny_gpt2_base,
    tiny_learner,
    tiny_stream,
    tiny_tokenizer,
)

SEED_TEXT = Path(__file__).parents[3] / "shared" / "seed" / "CL-PEFT.md"


needs_seed_text = pytest.mark.skipif(
    not SEED_TEXT.exists(), reason="the original module's text is not beside this checkout"
)


@needs_seed_text
def test_the_original_modules_ewc_example_runs_after_one_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    section = SEED_TEXT.read_text().split("### Basic Usage with EWC")[1]
    code = section.split("```python\n")[1].split("```")[0]
    assert "asf.medical.ml.cl_peft" in code
    code = code.replace("asf.medical.ml.cl_peft", "clcore")
    lines = [("train()" if line.startswith("# ... train model") else line) for line in code.splitlines()]
    assert lines.count("train()") == 2

    def named_gpt2(build: Callable[[], Any]) -> SimpleNamespace:
        return SimpleNamespace(from_pretrained={"gpt2": build()}.__getitem__)

    monkeypatch.setattr(transformers, "AutoModelForCausalLM", named_gpt2(tiny_gpt2_base))
    monkeypatch.setattr(transformers, "AutoTokenizer", named_gpt2(tiny_tokenizer))
    datasets = [tiny_dataset("task1"), tiny_dataset("task2", shift=7)]
    space: dict[str, Any] = {"task1_dataset": datasets[0], "task2_dataset": datasets[1]}
    losses: list[tuple[float, float]] = []
    penalties: list[float] = []

    def train() -> None:
        model, ewc, dataset = space["model"], space["ewc_strategy"], datasets[len(losses)]
        optimizer = torch.optim.AdamW(Params.of(model).values(), lr=1e-3)
        before = mean_nll(model, dataset)
        for _ in range(5):
            optimizer.zero_grad()
            nll, labels = completion_nll(model, collate(dataset, 0))
            ewc.modify_loss(nll.sum() / labels.sum()).backward()
            optimizer.step()
        losses.append((before, mean_nll(model, dataset)))
        penalties.append(float(ewc.penalty().detach()))

    space["train"] = train
    exec(compile("\n".join(lines), "seed example", "exec"), space)
    assert losses[0][1] < losses[0][0]
    assert penalties[0] == 0
    assert penalties[1] > 0
    assert space["ewc_strategy"].consolidated is not None


@needs_seed_text
def test_the_original_modules_evaluation_example_runs_after_one_replacement(
    capsys: pytest.CaptureFixture[str],
) -> None:
    section = SEED_TEXT.read_text().split("### Using Evaluation Framework")[1]
    code = section.split("```python\n")[1].split("```")[0]
    assert "asf.medical.ml.cl_peft" in code
    lines = []
    for line in code.replace("asf.medical.ml.cl_peft", "clcore").splitlines():
        if line.startswith("forgetting_metrics.after_task("):  # the example leaves training to the reader
            lines.append(line.replace("forgetting_metrics.after_task", "train"))
        lines.append(line)
    assert sum(line.startswith("train(") for line in lines) == 2
    model, tasks = tiny_learner(), {f"task{i + 1}": rows for i, (_, rows) in enumerate(tiny_stream(2))}

    def train(task_id: str) -> None:
        config = TrainConfig(num_steps=15, learning_rate=1e-2)
        rows = tasks[task_id]
        fit_task(model, NoStrategy(model), rows, task_id=task_id, config=config, memory=new_session())

    def compute_metrics(model: Any, dataset: Any) -> dict[str, float]:
        return {"likelihood": math.exp(-mean_nll(model, dataset))}

    space: dict[str, Any] = {"model": model, "train": train, "compute_metrics": compute_metrics}
    for i, rows in enumerate(tasks.values()):
        space[f"train_dataset{i + 1}"] = space[f"eval_dataset{i + 1}"] = rows
    exec(compile("\n".join(lines), "seed example", "exec"), space)
    metrics = space["metrics"]
    assert capsys.readouterr().out == f"Average forgetting: {metrics['avg_forgetting']}\n"
    (learnt, untouched), (now, _) = metrics["matrix"]
    assert metrics["avg_forgetting"] == pytest.approx(learnt - now)
    assert learnt > metrics["base_scores"][0]
    assert metrics["fwt"] == pytest.approx(untouched - metrics["base_scores"][1])
    assert space["visualizations"]
