"""The page about figures names each one, and every call on it runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import torch

from clcore.evaluation import eval_visualization

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation-figures.md").read_text()
CALLS = re.findall(r"^\| [^|]+ \| `(.*)` \|$", PAGE, re.MULTILINE)
NAME = "base_model.model.model.layers.0.self_attn.q_proj"


def snapshot(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {
        f"{NAME}.lora_A.default.weight": torch.randn(2, 4),
        f"{NAME}.lora_B.default.weight": torch.ones(3, 2),
    }


@pytest.mark.parametrize("call", CALLS)
def test_every_call_on_the_page_runs(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {name: getattr(eval_visualization, name) for name in eval_visualization.__all__}
    names |= {
        "tasks": ["dates", "units"],
        "matrix": [[0.9, 0.1], [0.7, 0.8]],
        "base_scores": [0.0, 0.1],
        "fisher": [[0.1, 0.2]],
        "model": None,
        "snapshots": {"dates": snapshot(0), "units": snapshot(1)},
        "importance": {"dates": {f"{NAME}.weight": torch.ones(2)}},
    }
    found = eval(call, names)
    if "dashboard" in call:
        assert (tmp_path / "page.html").read_text() == found
    else:
        assert isinstance(found, go.Figure)
        assert len(found.data) > 0


def test_every_public_name_is_on_the_page_and_loads_from_the_package() -> None:
    import clcore.evaluation as package

    for name in eval_visualization.__all__:
        assert f"{name}(" in PAGE
        assert name in package.__all__
        assert getattr(package, name) is getattr(eval_visualization, name)


def test_the_scalar_of_backward_transfer_is_not_hidden_by_a_figure() -> None:
    assert not hasattr(eval_visualization, "backward_transfer")
