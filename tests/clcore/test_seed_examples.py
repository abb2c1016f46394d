"""Examples of the original module run after one replacement: its package name becomes clcore."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from clcore.engine.loss import completion_nll
from clcore.engine.params import Params
from clcore.engine.tasks import collate
from tests.clcore.tiny import mean_nll, tiny_dataset, tiny_gpt2_base, tiny_tokenizer

SEED_TEXT = Path(__file__).parents[3] / "shared" / "seed" / "CL-PEFT.md"


@pytest.mark.skipif(not SEED_TEXT.exists(), reason="the original module's text is not beside this checkout")
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
